"""Recognise scans that are not in Hounsfield units, which models for CT expect.

A scan of which this is not certain gives no warning: crops without air, masked scans with negative
intensities, metal, padding below air.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from totalfast.scan import ScannerImage

logger = logging.getLogger(__name__)

LARGEST_HU = 32767.0
"""Scanners store CT in 16 bits with a sign; metal reaches 30710 HU in extended scales."""

SAMPLE_STEP = 4
"""Every fourth voxel along each axis is looked at, where the range decides nothing."""

FEWEST_INTENSITIES = 10.0
"""Range of intensities below which an image is a mask, or empty."""

SHIFTED, ABOVE = (1000.0, 1150.0), (1150.0, 1300.0)
"""Where soft tissue lies in a CT that is stored with an offset of 1000 or 1024; and the range
above, which is as common as the first where both are bone."""

SOFT = (-250.0, 350.0)
"""Fat, soft tissue and contrast in HU."""

NOISE = 60.0
"""Ratio of bright tissue to the noise around the body in MR, at least."""

LARGE_SHARE, SMALL_SHARE = 0.1, 0.02
"""Shares of a sample's voxels."""


def warn_of_other_units(image: ScannerImage) -> None:
    """Log one warning if a scan's intensities can't be Hounsfield units."""
    stored = image.stored
    low, high = sorted(image.scale(np.asarray([stored.min(), stored.max()])).tolist())
    what = unlike_hounsfield(image, low=low, high=high)
    if what is not None:
        logger.warning(
            "WARNING: the scan's intensities lie between %.5g and %.5g: %s. Models for CT expect "
            "Hounsfield units (air -1000, water 0). Apply the scanner's rescale slope and "
            "intercept; for MR scans use a task for MR, such as total_mr.",
            low,
            high,
            what,
        )


def unlike_hounsfield(image: ScannerImage, *, low: float, high: float) -> str | None:
    """Describe why intensities are no Hounsfield units; None if they may be.

    Parameters
    ----------
    image
        A scan without NaN.
    low, high
        Its lowest and highest intensity.
    """
    if not high - low >= FEWEST_INTENSITIES:
        return None
    if high > LARGEST_HU or low < -LARGEST_HU - 1:
        return "no CT has such intensities; padding may have lost its sign"
    dtype = image.stored.dtype
    if low >= 0 and dtype.kind == "u" and (image.slope, image.intercept) == (1.0, 0.0):
        if dtype.itemsize == 1:
            return "8 bits without negative intensities, as in pictures of a window"
        return "stored without a sign, and no intensity is negative"
    sample = _sample(image)
    if low >= 0:
        return _without_negative(sample, low=low, high=high)
    if low < -1500 and _share(sample, SOFT) < SMALL_SHARE:
        return "hardly any intensity is that of soft tissue; an offset may be applied twice"
    return None


def _without_negative(sample: NDArray[np.float64], *, low: float, high: float) -> str | None:
    """Tell an image without negative intensities from a crop of a CT without air and fat."""
    if (low, high) == (0.0, 255.0):
        return "a range of 8 bits, as in pictures of a window"
    if _share(sample, SHIFTED) >= max(LARGE_SHARE, 3 * _share(sample, ABOVE)):
        return "none is negative, and many are near 1000, as if an offset were missing"
    tenth, most = np.percentile(sample, [10, 95])
    if np.mean(sample <= low) >= LARGE_SHARE:
        return "none is negative, and the background is not that of air"
    if most > SOFT[1] and tenth < most / NOISE:
        return "none is negative, as in an MR scan"
    return None


def _sample(image: ScannerImage) -> NDArray[np.float64]:
    step = [min(SAMPLE_STEP, max(size // 8, 1)) for size in image.stored.shape]
    part: NDArray[Any] = image.stored[:: step[0], :: step[1], :: step[2]]
    return image.scale(part).ravel()


def _share(sample: NDArray[np.float64], between: tuple[float, float]) -> float:
    return float(np.mean((sample >= between[0]) & (sample <= between[1])))
