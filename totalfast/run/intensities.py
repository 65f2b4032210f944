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


def replace_non_finite(image: ScannerImage) -> ScannerImage:
    """Replace NaN and -infinity by the lowest finite intensity, infinity by the highest one.

    The lowest intensity of a CT or MR image is air. Logs a warning with the number of voxels; an
    image without such voxels is returned unchanged.

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
    replaced = np.array(stored, order="K")
    count = 0
    for index in planes:
        plane = replaced[:, :, index]
        count += int(np.count_nonzero(~np.isfinite(plane)))
        replaced[:, :, index] = np.nan_to_num(plane, nan=low, neginf=low, posinf=high)
    value = float(image.scale(np.asarray([low], dtype=stored.dtype))[0])
    logger.warning(
        "WARNING: %d voxels of the scan (%.3g %%) are NaN or infinite; they are replaced by its "
        "lowest intensity, %g (infinity by the highest).",
        count,
        100 * count / stored.size,
        value,
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
