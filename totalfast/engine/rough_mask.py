"""A mask on a coarser grid, which says where a model has something to do."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from totalfast.geometry import nearest_indices

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
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
        First voxel (z, y, x) of the part of the image in which boxes are given.
    """

    voxels: NDArray[np.bool_]
    shape: tuple[int, ...]
    margin: tuple[int, ...]
    start: tuple[int, ...] = (0, 0, 0)

    def touches(self, box: Sequence[slice]) -> bool:
        """Whether a voxel of a box, slices along (z, y, x) of the part, is in the mask."""
        places = []
        for axis, part in enumerate(box):
            first = self.start[axis] + part.start - self.margin[axis]
            last = self.start[axis] + part.stop - 1 + self.margin[axis]
            nearest = nearest_indices(self.voxels.shape[axis], self.shape[axis])
            first, last = max(first, 0), min(last, len(nearest) - 1)
            places.append(slice(int(nearest[first]), int(nearest[last]) + 1))
        return bool(self.voxels[tuple(places)].any())

    def part(self, box: Box) -> RoughMask:
        """Return the mask for boxes of a part of the image."""
        start = tuple(own + part.start for own, part in zip(self.start, box, strict=True))
        return replace(self, start=start)

    def transposed(self, axes: Sequence[int]) -> RoughMask:
        """Return the mask for the image with its axes in another order."""
        shape, margin, start = (
            tuple(values[axis] for axis in axes) for values in (self.shape, self.margin, self.start)
        )
        return RoughMask(
            voxels=self.voxels.transpose(axes), shape=shape, margin=margin, start=start
        )
