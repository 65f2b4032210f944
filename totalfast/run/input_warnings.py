"""Warnings for scans that the models were not made for; upstream gives none."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import nibabel as nib
import numpy as np

from totalfast.run.hounsfield import warn_of_other_units

if TYPE_CHECKING:
    from collections.abc import Sequence

    from totalfast.scan import ScannerImage

logger = logging.getLogger(__name__)

FEWEST_INTENSITIES = 10.0
"""Range of intensities below which rounding to whole numbers destroys the image. Radiologists'
windows are 80 HU and wider; images scaled to 0-1 or to a standard deviation of 1 are below."""

COARSEST_MM = 5.0
"""Spacing above which small structures lie between the slices; TotalSegmentator advises against
it."""

LARGEST_TURN_DEGREES = 30.0
"""Largest angle between the scan's axes and the body's without a warning. A model's input is only
flipped and permuted. The limit is ours: a gantry tilts by up to 30 degrees."""


def warn_of_unusual(
    image: ScannerImage,
    *,
    spacing_mm: Sequence[float] | None,
    crops: bool,
    modality: str,
) -> None:
    """Log one warning for each unusual property of a scan.

    Parameters
    ----------
    image
        The scan.
    spacing_mm
        The spacing that it will be resampled to; None if it will not be resampled.
    crops
        Whether only a region of it will be segmented.
    modality
        Scans that the models were trained on, "CT" or "MR".

    Notes
    -----
    Like upstream, totalfast truncates intensities to whole numbers if a scan is cropped or
    resampled.
    """
    keeps_spacing = spacing_mm is None or image.grid.canonical().has_spacing(spacing_mm)
    told = (crops or not keeps_spacing) and _warn_of_fractions(image)
    if modality == "CT" and not told:
        warn_of_other_units(image)
    coarsest = float(image.grid.spacing_mm.max())
    if coarsest > COARSEST_MM:
        logger.warning(
            "WARNING: the scan's voxels are %s mm; above %g mm small structures get lost.",
            " x ".join(f"{mm:.3g}" for mm in image.grid.spacing_mm),
            COARSEST_MM,
        )
    header = image.header
    if isinstance(header, nib.Nifti1Header) and header["sform_code"] == header["qform_code"] == 0:
        logger.warning(
            "WARNING: the scan's header has no orientation (sform and qform codes are 0); left and "
            "right may be swapped."
        )
    turn = _turn_degrees(image)
    if turn > LARGEST_TURN_DEGREES:
        logger.warning(
            "WARNING: the scan is rotated by %.0f degrees against the body's axes; the models were "
            "hardly trained on such scans.",
            turn,
        )


def _warn_of_fractions(image: ScannerImage) -> bool:
    """Warn if truncation destroys the image; return whether it does."""
    if image.stored.dtype.kind != "f" and (image.slope, image.intercept) == (1.0, 0.0):
        return False
    ends = np.asarray([image.stored.min(), image.stored.max()])
    low, high = sorted(image.scale(ends).tolist())
    # A comparison with NaN is false: no warning then.
    if not high - low < FEWEST_INTENSITIES:
        return False
    planes = (image.scale(image.stored[:, :, plane]) for plane in range(image.grid.shape[2]))
    destroyed = any(np.any(plane != np.trunc(plane)) for plane in planes)
    if destroyed:
        logger.warning(
            "WARNING: the scan's intensities lie between %.3g and %.3g; TotalSegmentator truncates "
            "them to whole numbers, which destroys the image. Give the scan as it came from the "
            "scanner (CT: Hounsfield units).",
            low,
            high,
        )
    return destroyed


def _turn_degrees(image: ScannerImage) -> float:
    """Largest angle between an axis of the scan and the body axis that it runs along."""
    columns = image.grid.affine[:3, :3]
    cosines = np.abs(columns) / np.linalg.norm(columns, axis=0)
    along = image.grid.orientation[:, 0].astype(int)
    return float(np.degrees(np.arccos(np.clip(cosines[along, range(3)].min(), 0.0, 1.0))))
