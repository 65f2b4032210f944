"""The order in which source slices are taken and target slices are filled."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

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
        self._bits, self._low = MANTISSA_BITS[rounded_to]
        self._regions: NDArray[np.uint16] | None = None
        if regions is not None:
            self._regions = np.asarray(regions, dtype=np.uint16)
            self._threshold = region_threshold(rounded_to)
        needed: dict[int, list[int]] = {}
        for row, last in enumerate(np.maximum(axes[0].lower, axes[0].upper)):
            needed.setdefault(int(last), []).append(row)
        self._rows_of = needed
        self._used = {int(k) for axis in (axes[0].lower, axes[0].upper) for k in axis}

    def __enter__(self: AnyExport) -> AnyExport:
        return self

    @abstractmethod
    def __exit__(self, *_: object) -> None:
        """End the threads, if there are any."""

    def add(self, first: int, slab: torch.Tensor) -> None:
        """Take slices ``first, first + 1, ...``: logits (classes, slices, y, x), any device."""
        if self._out.size == 0:
            return
        for offset in range(slab.shape[1]):
            index = first + offset
            if index not in self._used:
                continue
            self._take(index, slab[:, offset])
            z = self._axes[0]
            for rows in _groups(self._rows_of.get(index, []), z):
                lower = int(z.lower[rows[0]])
                self._fill(rows, lower, int(z.upper[rows[0]]) if z.corners == 2 else lower)

    @abstractmethod
    def _take(self, index: int, logits: torch.Tensor) -> None:
        """Keep a slice (classes, y, x) until the slice after the next is taken."""

    @abstractmethod
    def _fill(self, rows: list[int], lower: int, upper: int) -> None:
        """Fill neighbouring target slices, all of which lie between the same two source slices."""


def _groups(rows: list[int], axis: LinearWeights) -> Iterator[list[int]]:
    """Split target slices into neighbours that lie between the same source slices."""
    group: list[int] = []
    for row in rows:
        if group and (row != group[-1] + 1 or axis.lower[row] != axis.lower[group[-1]]):
            yield group
            group = []
        group.append(row)
    if group:
        yield group


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
