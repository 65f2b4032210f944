"""A CUDA device works through a queue. The host fills it ahead and waits for results only.

On other devices each call has ended when it returns.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from totalfast.errors import PredictionError
from totalfast.export.host_labels import page_locked

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

TILES_AHEAD = 4
"""Most tiles that wait in the queue. The device does not run dry, the progress bar tells what is
done and not what is queued, and Ctrl-C does not wait for hundreds of tiles."""


class TileQueue:
    """Counts the tiles that a device has done, and keeps the host a few tiles ahead of it.

    Parameters
    ----------
    device
        Where networks run.
    on_tile
        Called for each tile that is done.
    """

    def __init__(self, device: torch.device, on_tile: Callable[[], None]) -> None:
        self._device = device
        self._on_tile = on_tile
        self._waiting: deque[torch.cuda.Event] = deque()

    def add(self) -> None:
        """Note that all work of a tile was queued; wait if too many are unfinished."""
        if self._device.type != "cuda":
            self._on_tile()
            return
        self._waiting.append(_mark(self._device))
        while len(self._waiting) > TILES_AHEAD or self._is_next_done():
            self._waiting.popleft().synchronize()
            self._on_tile()

    def end(self) -> None:
        """Count the tiles that are still queued, so that another model's tiles can follow them."""
        while self._waiting:
            self._waiting.popleft()
            self._on_tile()

    def _is_next_done(self) -> bool:
        return bool(self._waiting and self._waiting[0].query())  # type: ignore[no-untyped-call]


class HostCopy:
    """A tensor on its way from a device to the host.

    Parameters
    ----------
    tensor
        On any device. On a CUDA device it is copied when all work before it is done; until then
        the host goes on. It must not be changed by work that is queued on another stream.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._done: torch.cuda.Event | None = None
        if tensor.device.type != "cuda":
            self._host = tensor.to("cpu")
            return
        self._host = page_locked(tensor.shape, tensor.dtype)
        self._host.copy_(tensor, non_blocking=True)
        self._done = _mark(tensor.device)

    def wait(self) -> torch.Tensor:
        """Return the copy when it is complete."""
        if self._done is not None:
            self._done.synchronize()
        return self._host


class FiniteCheck:
    """Whether all logits of a model are finite. A device is asked once, at the model's end.

    Parameters
    ----------
    name
        Of the model, for the error.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._sums: list[torch.Tensor] = []

    def add(self, logits: torch.Tensor) -> None:
        """Look at some logits, float16: on the CPU at once, else later.

        Raises
        ------
        PredictionError
            If a logit is infinite or NaN.
        """
        import torch

        # A finite sum means that all logits are finite, and takes a tenth of the time.
        total = logits.sum(dtype=torch.float32)
        if logits.device.type != "cpu":
            self._sums.append(total)
        elif not torch.isfinite(total) and not torch.all(torch.isfinite(logits)):
            raise self._error()

    def on_the_way(self) -> HostCopy | None:
        """Start to copy what a device was asked; None if there is nothing."""
        import torch

        return HostCopy(torch.stack(self._sums)) if self._sums else None

    def end(self, sums: HostCopy | None) -> None:
        """Look at the answers of a device.

        Raises
        ------
        PredictionError
            If a logit was infinite or NaN: float32 holds the sum of any number of finite float16
            numbers.
        """
        import torch

        if sums is not None and not torch.isfinite(sums.wait()).all():
            raise self._error()

    def _error(self) -> PredictionError:
        return PredictionError(
            f"a logit of {self._name} is infinite or NaN. The image's intensities may be NaN or "
            "far outside of the range that the model was trained on, or the model may be damaged."
        )


def _mark(device: torch.device) -> torch.cuda.Event:
    """Return an event that happens when all work is done that was queued before."""
    import torch

    # Blocking: the waiting thread sleeps, and other threads get its core.
    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event
