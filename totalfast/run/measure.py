"""Measure the classes' statistics on the scanner grid or on the model grid."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from totalfast.geometry import to_canonical
from totalfast.labels.statistics import Wanted, measure
from totalfast.scan import ALIKE, ScannerImage
from totalfast.system.progress import timed

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import nibabel as nib
    from numpy.typing import NDArray

    from totalfast.geometry import Grid
    from totalfast.labels.statistics import Statistics
    from totalfast.options import Options
    from totalfast.scan import ModelImage, ScannerImage


def measure_model_image(
    labels: NDArray[np.uint8],
    model_image: ModelImage,
    image: ScannerImage,
    classes: Mapping[int, str],
    options: Options,
) -> Statistics:
    """Measure on the model grid, like upstream with ``fast``: without the extra statistics.

    Parameters
    ----------
    labels
        (z, y, x), RAS+ axes, model grid.
    model_image, image
        The model's input, and the part of the scan that it was resampled from.
    classes
        Label to class name.
    options
        Which statistics to compute.
    """
    grid = model_image.grid
    if model_image.keeps_scanner_grid:
        # Upstream measures float64 intensities here; float32 would round some up to the next
        # whole number.
        measured = image.on_grid(to_canonical(image.stored, image.grid), grid)
    else:
        stored = model_image.voxels.transpose(2, 1, 0)
        measured = ScannerImage(
            stored=stored, slope=1.0, intercept=0.0, grid=grid, header=image.header
        )
    with timed("Calculating statistics fast...", "  calculated in"):
        return measure(
            labels.transpose(2, 1, 0),
            measured,
            classes,
            voxel_mm3=_voxel_mm3(grid, grid.spacing_mm),
            wanted=_wanted(options, extra=False),
        )


def measure_scan(
    labels: nib.Nifti1Image,
    image: ScannerImage,
    classes: Mapping[int, str],
    options: Options,
) -> Statistics:
    """Measure on the scanner grid; volumes use the spacing of the scan's header."""
    with timed("Calculating statistics...", "  calculated in"):
        return measure(
            np.asfortranarray(labels.dataobj),
            image,
            classes,
            voxel_mm3=_voxel_mm3(image.grid, image.zooms_mm),
            wanted=_wanted(options, extra=options.statistics_extra),
        )


def _voxel_mm3(grid: Grid, zooms_mm: Iterable[np.floating[Any]]) -> np.floating[Any]:
    """Volume of a voxel, float32: upstream's product of voxel sizes, if the axes are perpendicular.

    A sheared voxel is smaller than the product.
    """
    product: np.floating[Any] = np.prod(tuple(zooms_mm))
    volume = abs(float(np.linalg.det(grid.affine[:3, :3])))
    return product if math.isclose(volume, product, rel_tol=ALIKE) else np.float32(volume)


def _wanted(options: Options, *, extra: bool) -> Wanted:
    return Wanted(
        exclude_at_border=options.statistics_exclude_masks_at_border,
        aggregation=options.stats_aggregation,
        normalized=options.statistics_normalized_intensities,
        extra=extra,
    )
