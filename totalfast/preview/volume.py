"""A scan and its labels with RAS+ axes, from which slices are cut."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.ndimage import map_coordinates

from totalfast.errors import InputError
from totalfast.geometry import Grid, to_canonical

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from totalfast.scan import ScannerImage

SURVEY_MM = 2.5
"""Spacing at which structures are counted to select the slices that are shown."""
WINDOW_HU = (-160.0, 240.0)
"""Soft-tissue window of CT."""


@dataclass(frozen=True)
class LabelledVolume:
    """Labels and the scan that they belong to; their grids may differ.

    Parameters
    ----------
    scan
        Intensities.
    labels
        Unsigned integers, (x, y, z) of ``grid``.
    grid
        The labels' grid.
    """

    scan: ScannerImage
    labels: NDArray[Any]
    grid: Grid

    @cached_property
    def canonical_labels(self) -> NDArray[Any]:
        """(x, y, z), RAS+ axes; a view."""
        return to_canonical(self.labels, self.grid)

    @cached_property
    def canonical_grid(self) -> Grid:
        """Grid of ``canonical_labels``."""
        return self.grid.canonical()

    @cached_property
    def extent_mm(self) -> NDArray[np.float64]:
        """Size of the field of view along (x, y, z) in mm."""
        grid = self.canonical_grid
        return np.asarray(grid.shape) * grid.spacing_mm.astype(np.float64)

    @cached_property
    def _survey(self) -> tuple[NDArray[Any], list[int]]:
        """Every n-th label along each axis, (x, y, z), and n per axis."""
        steps = [
            max(int(SURVEY_MM / mm), 1) if n * mm > 20 * SURVEY_MM else 1
            for n, mm in zip(self.canonical_grid.shape, self.canonical_grid.spacing_mm, strict=True)
        ]
        x, y, z = steps
        return np.ascontiguousarray(self.canonical_labels[::x, ::y, ::z]), steps

    @cached_property
    def volumes_ml(self) -> dict[int, float]:
        """Label to volume in ml; absent labels are left out."""
        size = int(self.labels.max()) + 1
        counts = np.zeros(size, np.int64)
        for plane in np.moveaxis(self.labels, 2, 0):
            counts += np.bincount(plane.ravel(order="K"), minlength=size)
        voxel_ml = float(np.prod(self.canonical_grid.spacing_mm)) / 1000
        return {
            int(label): float(counts[label]) * voxel_ml for label in np.flatnonzero(counts) if label
        }

    def slice_with_most_structures(self, axis: int) -> int:
        """Index along ``axis`` of the slice with most structures, larger ones weighted more."""
        survey, steps = self._survey
        size = int(survey.max()) + 1
        counts = np.stack(
            [
                np.bincount(plane.ravel(), minlength=size)[1:]
                for plane in np.moveaxis(survey, axis, 0)
            ]
        )
        if not counts.any():
            return int(self.canonical_grid.shape[axis]) // 2
        # The square root keeps the weight of a kidney significant beside the liver.
        best = int(np.argmax(np.sqrt(counts).sum(axis=1)))
        return min(best * steps[axis] + steps[axis] // 2, self.canonical_grid.shape[axis] - 1)

    def label_slice(self, axis: int, index: int) -> NDArray[Any]:
        """Labels of one slice; its two axes keep the order of (x, y, z)."""
        return np.asarray(np.take(self.canonical_labels, index, axis=axis))

    def scan_slice(self, axis: int, index: int, shape: tuple[int, int]) -> NDArray[np.float64]:
        """Intensities in the plane of ``label_slice``, interpolated linearly to ``shape``.

        Raises
        ------
        InputError
            If the plane lies outside of the scan.
        """
        grid = self.canonical_grid
        first, second = (k for k in range(3) if k != axis)
        where = np.empty((3, *shape))
        where[axis] = index
        for k, count, view in ((first, shape[0], (-1, 1)), (second, shape[1], (1, -1))):
            where[k] = ((np.arange(count) + 0.5) * grid.shape[k] / count - 0.5).reshape(view)
        to_scan = np.linalg.inv(self.scan.grid.affine) @ grid.affine
        source = np.tensordot(to_scan[:3, :3], where, axes=1) + to_scan[:3, 3, None, None]
        # Only the box around the plane is scaled, without a copy of the scan.
        low = np.floor(source.min(axis=(1, 2))).astype(int)
        high = np.ceil(source.max(axis=(1, 2))).astype(int) + 1
        if np.any(high <= 0) or np.any(low >= self.scan.stored.shape):
            raise InputError(
                "the scan and the labels lie apart in space; they do not belong together."
            )
        low = np.maximum(low, 0)
        box = self.scan.stored[
            tuple(slice(a, max(b, a + 1)) for a, b in zip(low, high, strict=True))
        ]
        values = self.scan.scale(box)
        return np.asarray(
            map_coordinates(values, source - low[:, None, None], order=1, mode="nearest")
        )

    @cached_property
    def window(self) -> tuple[float, float]:
        """Intensities of black and white: a soft-tissue window for CT, else percentiles."""
        thin = self.scan.stored[::4, ::4, :: max(self.scan.stored.shape[2] // 60, 1)]
        values = self.scan.scale(thin)
        values = values[np.isfinite(values)]
        if values.size == 0:
            return 0.0, 1.0
        low, high = (float(v) for v in np.percentile(values, (1, 99.5)))
        if low < -500 and high > WINDOW_HU[0]:
            return WINDOW_HU
        return low, max(high, low + 1e-6)
