"""Data types of a scan: as stored in its file, and on a model's grid.

``files.read`` reads a scan, ``resampling.model_grid`` resamples it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from nibabel.volumeutils import apply_read_scaling

if TYPE_CHECKING:
    import nibabel as nib
    from numpy.typing import NDArray

    from totalfast.geometry import Box, Grid

ALIKE = 0.01
"""Relative difference of a header's voxel sizes and its affine's that is read as rounding."""


def in_unit(affine: NDArray[np.float64], mm_per_unit: float) -> NDArray[np.float64]:
    """Return an affine in mm in another unit of length."""
    if mm_per_unit == 1.0:
        return affine
    scaled = affine.copy()
    scaled[:3] /= mm_per_unit
    return scaled


class ScannerImage:
    """A scan as it came: voxels in the file's dtype, and how to read them.

    Parameters
    ----------
    stored
        (x, y, z), the file's dtype, unscaled.
    slope, intercept
        value = stored * slope + intercept, as nibabel computes it in float64.
    grid
        Scanner grid.
    header
        The NIfTI header that results are written with.
    truncated
        Intensities are truncated to int32, towards zero, before any other step. Upstream does
        this to cropped scans.
    mm_per_unit
        Size of the unit of length of ``header``; the grid is in mm.
    """

    __slots__ = ("_stored", "grid", "header", "intercept", "mm_per_unit", "slope", "truncated")

    def __init__(
        self,
        *,
        stored: NDArray[Any],
        slope: float,
        intercept: float,
        grid: Grid,
        header: nib.Nifti1Header,
        truncated: bool = False,
        mm_per_unit: float = 1.0,
    ) -> None:
        self._stored: NDArray[Any] | None = stored
        self.slope = slope
        self.intercept = intercept
        self.grid = grid
        self.header = header
        self.truncated = truncated
        self.mm_per_unit = mm_per_unit

    @property
    def zooms_mm(self) -> tuple[np.floating[Any], ...]:
        """Voxel sizes (x, y, z), float32: the header's, or the grid's if the two are unlike."""
        spacing = self.grid.spacing_mm
        zooms = tuple(np.float32(zoom * self.mm_per_unit) for zoom in self.header.get_zooms()[:3])
        return zooms if np.allclose(zooms, spacing, rtol=ALIKE, atol=0) else tuple(spacing)

    @property
    def written_affine(self) -> NDArray[np.float64]:
        """The grid's affine in the unit of ``header``."""
        return in_unit(self.grid.affine, self.mm_per_unit)

    @property
    def stored(self) -> NDArray[Any]:
        """Voxels (x, y, z), the file's dtype, unscaled.

        Raises
        ------
        RuntimeError
            After ``drop_voxels``: a later step needs voxels that were dropped, which is a defect.
        """
        if self._stored is None:
            raise RuntimeError("the scan's voxels were dropped; a later step must keep them")
        return self._stored

    def scale(self, stored: NDArray[Any]) -> NDArray[np.float64]:
        """Turn part of ``stored`` into float64 intensities, as ``get_fdata`` does for the whole."""
        slope, intercept = np.float64(self.slope), np.float64(self.intercept)
        scaled = apply_read_scaling(stored, np.asarray(slope), np.asarray(intercept))
        if self.truncated:
            scaled = truncate(scaled)
        return np.asarray(scaled, dtype=np.float64)

    def cropped(self, box: Box) -> ScannerImage:
        """Return part of the scan; its voxels are a view, its intensities truncated."""
        part = self.on_grid(self.stored[box], self.grid.cropped(box))
        part.truncated = True
        return part

    def on_grid(self, stored: NDArray[Any], grid: Grid) -> ScannerImage:
        """Return a scan with the same scaling and header, and other voxels on another grid."""
        return ScannerImage(
            stored=stored,
            slope=self.slope,
            intercept=self.intercept,
            grid=grid,
            header=self.header,
            truncated=self.truncated,
            mm_per_unit=self.mm_per_unit,
        )

    def drop_voxels(self) -> None:
        """Free the memory of the voxels; reading them later is an error."""
        self._stored = None


def truncate(values: NDArray[Any]) -> NDArray[np.int32]:
    """Cut to int32, towards zero; NaN, infinity and overflow become what the CPU makes of them."""
    with np.errstate(invalid="ignore"):
        return np.asarray(values, dtype=np.float64).astype(np.int32)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelImage:
    """A scan on the model's grid, as nnU-Net's reader would return it.

    Parameters
    ----------
    voxels
        float32, (z, y, x), C order, RAS+ axes.
    grid
        The model grid, (x, y, z).
    canonical
        The scanner grid, its axes permuted and flipped to RAS+.
    keeps_scanner_grid
        Whether the scan was not resampled: ``grid`` is ``canonical``.
    """

    voxels: NDArray[np.float32]
    grid: Grid
    canonical: Grid
    keeps_scanner_grid: bool

    def __post_init__(self) -> None:
        if self.voxels.shape != self.grid.shape[::-1]:
            raise ValueError(f"voxels {self.voxels.shape} do not lie on the grid {self.grid.shape}")
