"""Torch's settings while a network runs. They belong to the process, which may have other users."""

from __future__ import annotations

import contextlib
import os
import threading
from typing import TYPE_CHECKING

from totalfast.system.cores import network_threads
from totalfast.system.forks import threads_started

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch


SEARCH_VARIABLE = "TOTALFAST_CUDNN_SEARCH"
"""Environment variable: "1" lets cuDNN try all its algorithms at the first tile of each size.

nnU-Net lets it, and its labels differ between two runs, because another algorithm may win. The
search took 0.5 s per size of tiles on an H200, and the later tiles were not measurably faster
(scripts/results/gpu.json), so that totalfast takes the algorithm that cuDNN recommends."""


class _Shared:
    """The settings before the first of all predictions that run now, and their number."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.predictions = 0
        self.deterministic = 0
        """Number of predictions that must give the same bits in every run."""
        self.threads = 0
        self.cudnn = (False, False)
        """Whether cuDNN searched, and whether it was deterministic."""
        self.nested = threading.local()


_shared = _Shared()


@contextlib.contextmanager
def inference_settings(device: torch.device, *, deterministic: bool = False) -> Iterator[None]:
    """Set up torch for prediction like nnU-Net; restore it on every exit.

    On the CPU it uses all usable cores, at most eight, and not more threads than torch was set to;
    beside a GPU it uses one thread. Autocast is on for CUDA only.

    Parameters
    ----------
    device
        Where networks run.
    deterministic
        Whether a CUDA device must give the same bits in every run. Predictions that run at the
        same time then do so, too.

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
    deterministic = deterministic and cuda
    threads = _begin(network_threads() if device.type == "cpu" else 1, deterministic=deterministic)
    try:
        with (
            torch.inference_mode(),
            torch.autocast("cuda") if cuda else contextlib.nullcontext(),
        ):
            yield
    finally:
        _end(threads, deterministic=deterministic)


def _begin(threads: int, *, deterministic: bool) -> int:
    """Change the settings; return the number of threads to restore."""
    import torch

    cudnn = torch.backends.cudnn
    with _shared.lock:
        before = torch.get_num_threads()
        depth = getattr(_shared.nested, "depth", 0)
        if _shared.predictions == 0:
            _shared.threads = before
            _shared.cudnn = (cudnn.benchmark, cudnn.deterministic)
        elif depth == 0:
            before = _shared.threads
        _shared.nested.depth = depth + 1
        _shared.predictions += 1
        _shared.deterministic += deterministic
        torch.set_num_threads(min(threads, before))
        _set_cudnn()
    return before


def _end(threads: int, *, deterministic: bool) -> None:
    """Restore this thread's number of threads, and after the last prediction the rest."""
    import torch

    with _shared.lock:
        _shared.nested.depth -= 1
        _shared.predictions -= 1
        _shared.deterministic -= deterministic
        torch.set_num_threads(threads)
        _set_cudnn()


def _set_cudnn() -> None:
    """Set cuDNN's choice of algorithms: as the program has it, unless a prediction decides."""
    import torch

    search, deterministic = _shared.cudnn
    if _shared.deterministic:
        search, deterministic = False, True
    elif _shared.predictions:
        search = search or os.environ.get(SEARCH_VARIABLE) == "1"
    torch.backends.cudnn.benchmark = search
    torch.backends.cudnn.deterministic = deterministic
