"""Export with the resampling function that a model's plans name, one class at a time.

Memory holds the logits, the best score and label, and one resampled channel per thread, but never
all channels at the target's size.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    from numpy.typing import NDArray


def resampled_maximum(
    logits: torch.Tensor,
    shape: Sequence[int],
    resample: Callable[[NDArray[np.floating]], NDArray[np.floating] | torch.Tensor],
    *,
    threads: int,
    regions: Sequence[int] | None,
) -> NDArray[np.unsignedinteger]:
    """Resample class by class and keep the first maximum.

    Parameters
    ----------
    logits
        (classes, z, y, x), on the CPU.
    shape
        Target (z, y, x).
    resample
        Takes (1, z, y, x) and returns it at the target's shape.
    threads
        Classes that are resampled at a time.
    regions
        Label of each channel of a region-based model; None takes the first maximum.

    Returns
    -------
        uint16, (z, y, x).

    Notes
    -----
    Equals the argmax of all classes resampled at once, except with torch's resize: its rounding of
    the last bit depends on the number of channels, so classes within one unit in the last place of
    float32 may swap.
    """
    import torch

    shape = tuple(shape)
    labels = np.zeros(shape, dtype=np.uint16)
    best: NDArray[np.floating] | None = None
    lock = threading.Lock()

    def paint(k: int, values: torch.Tensor) -> None:
        """Later channels paint over earlier ones; ``labels`` holds the channel number plus one."""
        inside = (torch.sigmoid(values.float()) > 0.5).numpy()
        with lock:
            np.copyto(labels, k + 1, where=inside & (labels < k + 1))

    def score(k: int, channel: torch.Tensor) -> None:
        """NaN wins over all; of equals the smaller label wins, in any order of the channels."""
        nonlocal best
        values = channel.numpy()
        with lock:
            if best is None:
                best = values.copy()
                labels[...] = k
                return
            for row, rival, label in zip(values, best, labels, strict=True):
                nan, rival_nan = np.isnan(row), np.isnan(rival)
                equal = (row == rival) | (nan & rival_nan)
                wins = (row > rival) | (nan & ~rival_nan) | (equal & (label > k))
                np.copyto(rival, row, where=wins)
                np.copyto(label, k, where=wins)

    take = score if regions is None else paint

    def one(k: int) -> None:
        take(k, torch.as_tensor(resample(logits[k : k + 1].numpy()))[0])

    with ThreadPoolExecutor(max_workers=threads) as pool:
        list(pool.map(one, range(logits.shape[0])))
    if regions is not None:
        labels = np.asarray([0, *regions], dtype=np.uint16)[labels]
    return labels
