"""Voxel grids and the exact index maps between them.

Axis order is nibabel's (x, y, z) unless a name has another suffix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation

from totalfast.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


Box = tuple[slice, slice, slice]
"""Part of a grid: slices with a start and a stop, no step, along its three axes."""


def shifted(box: Box, origin: Box) -> Box:
    """Return a box counted from the first voxel of another one."""
    z, y, x = (
        slice(part.start - first.start, part.stop - first.start)
        for part, first in zip(box, origin, strict=True)
    )
    return z, y, x


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """A voxel grid in scanner space.

    Parameters
    ----------
    shape
        Number of voxels along (x, y, z).
    affine
        4x4 float64, voxel index to mm in RAS+ space.
    """

    shape: tuple[int, int, int]
    affine: NDArray[np.float64]

    def __post_init__(self) -> None:
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise InputError(f"a grid needs three sizes of at least 1 voxel, not {self.shape}.")
        if not np.all(np.isfinite(self.affine)):
            raise InputError("the image's affine holds NaN or infinite values; repair its header.")
        if np.any(self.spacing_mm <= 0):
            spacing = ", ".join(f"{mm:g}" for mm in self.spacing_mm)
            raise InputError(f"voxel spacing must be positive, not ({spacing}) mm.")

    @property
    def spacing_mm(self) -> NDArray[np.float32]:
        """Column norms of the affine, as the float32 zooms of a NIfTI header hold them."""
        columns = self.affine[:3, :3]
        spacing: NDArray[np.float32] = np.sqrt(np.sum(columns * columns, axis=0)).astype(np.float32)
        return spacing

    @property
    def orientation(self) -> NDArray[np.float64]:
        """(3, 2): for each axis, the RAS+ axis it runs along and its direction (1 or -1)."""
        orientation: NDArray[np.float64] = io_orientation(self.affine)
        if np.any(np.isnan(orientation)):
            raise InputError("the image's affine is singular; repair its header.")
        return orientation

    def canonical(self) -> Grid:
        """Return the grid of ``nibabel.as_closest_canonical``, whose axes run to RAS+."""
        orientation = self.orientation
        shape = [0, 0, 0]
        for axis, (target, _) in enumerate(orientation):
            shape[int(target)] = self.shape[axis]
        affine = self.affine @ inv_ornt_aff(orientation, self.shape)
        return Grid(shape=(shape[0], shape[1], shape[2]), affine=affine)

    def resampled(self, target_mm: Sequence[float]) -> Grid:
        """Return the grid after TotalSegmentator's ``change_spacing`` (2.18.0, resampling.py).

        Raises
        ------
        InputError
            If an axis would have no voxel left.
        """
        if self.has_spacing(target_mm):
            return self
        zoom = self.spacing_mm / np.asarray(target_mm, dtype=np.float64)
        sizes = [round(n * float(z)) for n, z in zip(self.shape, zoom, strict=True)]
        if min(sizes) < 1:
            extent = " x ".join(
                f"{n * mm:.3g}" for n, mm in zip(self.shape, self.spacing_mm, strict=True)
            )
            raise InputError(
                f"the image covers only {extent} mm; that leaves no voxel at the model's spacing "
                f"of {target_mm[0]:g} mm. Give a larger image or a finer model."
            )
        affine = self.affine.copy()
        affine[:3, :3] = affine[:3, :3] / zoom
        return Grid(shape=(sizes[0], sizes[1], sizes[2]), affine=affine)

    def has_spacing(self, target_mm: Sequence[float]) -> bool:
        """Whether upstream leaves the grid alone: float32 spacing equals the float64 target."""
        return bool(np.array_equal(self.spacing_mm, np.asarray(target_mm, dtype=np.float64)))

    def cropped(self, box: Box) -> Grid:
        """Return the grid of a box, along (x, y, z)."""
        affine = self.affine.copy()
        affine[:3, 3] = (self.affine @ [*(float(part.start) for part in box), 1.0])[:3]
        x, y, z = (int(part.stop - part.start) for part in box)
        return Grid(shape=(x, y, z), affine=affine)

    def stored(self) -> Grid:
        """Return the grid after a round trip through a NIfTI file, whose sform is float32."""
        return Grid(shape=self.shape, affine=self.affine.astype(np.float32).astype(np.float64))


def to_canonical(array: NDArray[np.generic], grid: Grid) -> NDArray[np.generic]:
    """View ``array`` (x, y, z of ``grid``) with its axes permuted and flipped to RAS+. No copy."""
    view: NDArray[np.generic] = apply_orientation(array, grid.orientation)
    return view


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearWeights:
    """The two source samples of each target sample of one axis, and their weights.

    ``corners`` is 1 for nearest neighbour: only the lower sample is used.
    """

    lower: NDArray[np.intp]
    upper: NDArray[np.intp]
    lower_weight: NDArray[np.float64]
    upper_weight: NDArray[np.float64]
    corners: int = 2


CORNERS, CENTERS = "corners", "centers"
"""What coincides on both grids: the centres of the corner voxels (scipy.ndimage.zoom,
TotalSegmentator), or the outer edges of the corner voxels (skimage, nnU-Net)."""


def sample_positions(
    source_size: int, target_size: int, coordinates: str = CORNERS
) -> NDArray[np.float64]:
    """Source coordinate of each target voxel of one axis.

    Notes
    -----
    scipy.ndimage.zoom, in float64 and in this order of operations. "corners" is grid_mode=False:
    ``c = j * ((n - 1) / (m - 1))``, the factor is 1 if the target has one voxel. "centers" is
    grid_mode=True: ``c = (j + 0.5) * (n / m) - 0.5``, which at the edges is outside of the source.
    """
    target = np.arange(target_size, dtype=np.float64)
    if coordinates == CENTERS:
        return (target + 0.5) * (source_size / target_size) - 0.5
    factor = (source_size - 1) / (target_size - 1) if target_size > 1 else 1.0
    return target * factor


def nearest_indices(
    source_size: int, target_size: int, coordinates: str = CORNERS
) -> NDArray[np.intp]:
    """Source index of each target voxel of one axis, as scipy.ndimage.zoom(order=0) picks it."""
    positions = sample_positions(source_size, target_size, coordinates)
    return np.clip(np.floor(positions + 0.5).astype(np.intp), 0, source_size - 1)


def linear_weights(source_size: int, target_size: int, coordinates: str = CORNERS) -> LinearWeights:
    """Neighbours and weights of each target voxel, as scipy.ndimage.zoom(order=1) has them.

    Beyond the edge (mode="nearest") both neighbours are the edge voxel, with unequal weights.
    """
    return interpolation_weights(
        sample_positions(source_size, target_size, coordinates), source_size
    )


def interpolation_weights(positions: NDArray[np.float64], source_size: int) -> LinearWeights:
    """Neighbours and weights at given source coordinates."""
    start = np.floor(positions)
    lower_weight = 1.0 - (positions - start)
    lower = start.astype(np.intp)
    return LinearWeights(
        lower=np.clip(lower, 0, source_size - 1),
        upper=np.clip(lower + 1, 0, source_size - 1),
        lower_weight=lower_weight,
        upper_weight=1.0 - lower_weight,
    )


def nearest_weights(
    source_size: int, target_size: int, coordinates: str = CORNERS
) -> LinearWeights:
    """``nearest_indices`` in the form of ``linear_weights``."""
    index = nearest_indices(source_size, target_size, coordinates)
    one = np.ones(target_size)
    return LinearWeights(
        lower=index, upper=index, lower_weight=one, upper_weight=0 * one, corners=1
    )
