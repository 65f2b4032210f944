"""Replace intensities that are no finite numbers, which would empty the result around them."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np

from totalfast.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from totalfast.scan import ScannerImage

logger = logging.getLogger(__name__)

AIR_HU = -1024.0
"""Intensity of voxels without a value in a CT: air, as scanners pad images."""


def replace_non_finite(image: ScannerImage, *, modality: str) -> ScannerImage:
    """Replace NaN and -infinity by the intensity of air, infinity by the highest finite one.

    Air is -1024 HU in CT. In MR it is 0, or the lowest finite intensity if that is negative. Logs a
    warning with the number of voxels; an image without such voxels is returned unchanged.

    Parameters
    ----------
    image
        The scan.
    modality
        "CT" or "MR".

    Raises
    ------
    InputError
        If no intensity is a finite number.

    Notes
    -----
    Upstream keeps these voxels. A network then returns NaN for each tile that contains one.
    """
    stored = image.stored
    if stored.dtype.kind != "f":
        return image
    planes = [index for index in range(stored.shape[2]) if not _is_finite(stored[:, :, index])]
    if not planes:
        return image
    finite = [_ends(stored[:, :, index]) for index in range(stored.shape[2])]
    ends = [pair for pair in finite if pair is not None]
    if not ends:
        raise InputError("all intensities of the scan are NaN or infinite.")
    low, high = min(pair[0] for pair in ends), max(pair[1] for pair in ends)
    air = AIR_HU if modality == "CT" else min(0.0, *image.scale(np.asarray([low, high])))
    stored_air = (air - image.intercept) / (image.slope or 1.0)
    replaced = np.array(stored, order="K")
    count = 0
    for index in planes:
        plane = replaced[:, :, index]
        count += int(np.count_nonzero(~np.isfinite(plane)))
        replaced[:, :, index] = np.nan_to_num(plane, nan=stored_air, neginf=stored_air, posinf=high)
    logger.warning(
        "WARNING: %d voxels of the scan (%.3g %%) are NaN or infinite; they are replaced by the "
        "intensity of air, %g (infinity by the scan's highest).",
        count,
        100 * count / stored.size,
        air,
    )
    return image.on_grid(replaced, image.grid)


def _is_finite(plane: NDArray[Any]) -> bool:
    # The sum is finite only if all values are; it is much faster than a test of each value.
    with np.errstate(invalid="ignore", over="ignore"):
        total = plane.sum(dtype=np.float64)
    return bool(np.isfinite(total)) or bool(np.isfinite(plane).all())


def _ends(plane: NDArray[Any]) -> tuple[float, float] | None:
    """Lowest and highest finite value; None if there is none."""
    values = plane[np.isfinite(plane)]
    return (float(values.min()), float(values.max())) if values.size else None
