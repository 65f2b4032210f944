"""A mask on a coarser grid, which says where a model has something to do."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from totalfast.geometry import nearest_indices

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from totalfast.geometry import Box


@dataclass(frozen=True, slots=True, kw_only=True)
class RoughMask:
    """Voxels of an image, on a coarser grid with the same corner voxels, widened by a margin.

    Parameters
    ----------
    voxels
        bool, (z, y, x), coarse grid.
    shape
        Shape (z, y, x) of the image.
    margin
        Voxels of the image, along (z, y, x), by which the mask is wider than ``voxels``.
    start
        First voxel (z, y, x) of the part of the image that is asked about.
    """

    voxels: NDArray[np.bool_]
    shape: tuple[int, ...]
    margin: tuple[int, ...]
    start: tuple[int, ...] = (0, 0, 0)

    def touched(self, spans: Sequence[Sequence[slice]]) -> NDArray[np.bool_]:
        """Return which boxes have a voxel of the mask: bool, (spans along z, along y, along x).

        ``spans`` are slices of the part along z, y and x; every combination of them is a box.
        """
        touched = self.voxels
        for axis, own in enumerate(spans):
            planes = np.moveaxis(touched, axis, 0)
            found = np.stack([planes[some].any(axis=0) for some in self._coarse(axis, own)])
            touched = np.moveaxis(found, 0, axis)
        return touched

    def _coarse(self, axis: int, spans: Sequence[slice]) -> list[slice]:
        """The coarse voxels of slices along an axis of the part, and of the margin around them."""
        nearest = nearest_indices(self.voxels.shape[axis], self.shape[axis])
        low = self.start[axis] - self.margin[axis]
        high = self.start[axis] + self.margin[axis] - 1
        last = len(nearest) - 1
        return [
            slice(
                int(nearest[max(span.start + low, 0)]),
                int(nearest[min(span.stop + high, last)]) + 1,
            )
            for span in spans
        ]

    def part(self, box: Box) -> RoughMask:
        """Return the mask of a part of the image."""
        start = tuple(own + part.start for own, part in zip(self.start, box, strict=True))
        return replace(self, start=start)

    def transposed(self, axes: Sequence[int]) -> RoughMask:
        """Return the mask of the image with its axes in another order."""
        shape, margin, start = (
            tuple(values[axis] for axis in axes) for values in (self.shape, self.margin, self.start)
        )
        return RoughMask(
            voxels=self.voxels.transpose(axes), shape=shape, margin=margin, start=start
        )
