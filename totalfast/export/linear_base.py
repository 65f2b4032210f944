"""What both linear exports have in common: arguments, rounding, and cells along an axis."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from totalfast.export.cell_data import Rounding

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from numpy.typing import NDArray

    from totalfast.geometry import LinearWeights


AnyExport = TypeVar("AnyExport", bound="LinearExport")

MANTISSA_BITS = {"float16": (10, -14), "float32": (23, -126), "float64": (52, -1022)}
"""Stored mantissa bits and smallest normal exponent of the dtypes that logits come in."""


class LinearExport(ABC):
    """Takes the source slices in order and fills the target slices that they complete.

    Use it in a ``with`` statement, which ends the threads of an export.

    Parameters
    ----------
    axes
        Neighbours and weights of every target voxel along z, y and x.
    out
        Filled: unsigned integers, (z, y, x); its shape is that of ``axes``.
    rounded_to
        "float16", "float32" or "float64": what nnU-Net's array of resampled logits would hold.
    regions
        For region-based models, the label of each channel in the order of painting; None
        takes the first maximum.
    """

    def __init__(
        self,
        axes: Sequence[LinearWeights],
        out: NDArray[np.unsignedinteger],
        *,
        rounded_to: str,
        regions: Sequence[int] | None = None,
    ) -> None:
        self._axes = axes
        self._out = out
        self._rounding = Rounding(*MANTISSA_BITS[rounded_to])
        self._regions: NDArray[np.uint16] | None = None
        if regions is not None:
            self._regions = np.asarray(regions, dtype=np.uint16)
            self._threshold = region_threshold(rounded_to)

    def __enter__(self: AnyExport) -> AnyExport:
        return self

    @abstractmethod
    def __exit__(self, *_: object) -> None:
        """End the threads, or wait for the device."""

    @abstractmethod
    def add(self, first: int, slab: torch.Tensor) -> None:
        """Take slices ``first, first + 1, ...``: logits (classes, slices, y, x), any device.

        The memory of ``slab`` may be used again afterwards.
        """


def runs(axis: LinearWeights) -> NDArray[np.intp]:
    """Split an axis into runs of target voxels with the same neighbours; see ``Layer.runs_y``."""
    changes = (np.diff(axis.lower) != 0) | (np.diff(axis.upper) != 0)
    first = np.flatnonzero(np.append(True, changes)[: len(axis.lower)])
    stop = np.append(first, len(axis.lower))[1:]
    upper = axis.upper if axis.corners == 2 else axis.lower
    return np.stack([first, stop, axis.lower[first], upper[first]], axis=1).astype(np.intp)


@functools.cache
def region_threshold(dtype: str) -> float:
    """Smallest logit whose float32 sigmoid exceeds 0.5, so that nnU-Net paints the region."""
    import torch

    # Positive floats and their bits have the same order.
    kind = torch.int16 if dtype == "float16" else torch.int32
    real = torch.half if dtype == "float16" else torch.float32

    def logit(bits: int) -> torch.Tensor:
        return torch.tensor(bits, dtype=kind).view(real).float()

    lowest, highest = 0, int(torch.tensor(1.0, dtype=real).view(kind))
    while highest - lowest > 1:
        middle = (lowest + highest) // 2
        if torch.sigmoid(logit(middle)) > 0.5:
            highest = middle
        else:
            lowest = middle
    return float(logit(highest))
