"""Torch's settings while a network runs. They belong to the process, which may have other users."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

from totalfast.system.cores import network_threads
from totalfast.system.forks import threads_started

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch


class _Shared:
    """The settings before the first of all predictions that run now, and their number."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.predictions = 0
        self.threads = 0
        self.benchmark = False
        self.nested = threading.local()


_shared = _Shared()


@contextlib.contextmanager
def inference_settings(device: torch.device) -> Iterator[None]:
    """Set up torch for prediction like nnU-Net; restore it on every exit.

    On the CPU it uses all usable cores, at most eight, and not more threads than torch was set to;
    beside a GPU it uses one thread. Autocast is on for CUDA only.

    Raises
    ------
    ForkError
        If the process was forked after a network had run.

    Notes
    -----
    Predictions may overlap in several threads. The first one notes the settings, and each restores
    these. Torch keeps its number of threads once per thread of the program, but a new thread starts
    with the number that was set last anywhere, which can be that of another thread's prediction.
    """
    import torch

    threads_started()
    cuda = device.type == "cuda"
    threads = _begin(network_threads() if device.type == "cpu" else 1, benchmark=cuda)
    try:
        with (
            torch.inference_mode(),
            torch.autocast("cuda") if cuda else contextlib.nullcontext(),
        ):
            yield
    finally:
        _end(threads)


def _begin(threads: int, *, benchmark: bool) -> int:
    """Change the settings; return the number of threads to restore."""
    import torch

    with _shared.lock:
        before = torch.get_num_threads()
        depth = getattr(_shared.nested, "depth", 0)
        if _shared.predictions == 0:
            _shared.threads, _shared.benchmark = before, torch.backends.cudnn.benchmark
        elif depth == 0:
            before = _shared.threads
        _shared.nested.depth = depth + 1
        _shared.predictions += 1
        torch.set_num_threads(min(threads, before))
        torch.backends.cudnn.benchmark = benchmark or torch.backends.cudnn.benchmark
    return before


def _end(threads: int) -> None:
    """Restore this thread's number of threads, and after the last prediction the rest."""
    import torch

    with _shared.lock:
        _shared.nested.depth -= 1
        _shared.predictions -= 1
        torch.set_num_threads(threads)
        if _shared.predictions == 0:
            torch.backends.cudnn.benchmark = _shared.benchmark
