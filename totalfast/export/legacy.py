"""Upstream's former way to smooth masks: each label's mask resampled linearly.

The resampling is TotalSegmentator's own function (2.18.0, resampling.py and nnunet.py), because the
flag is rarely used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from nibabel.orientations import apply_orientation, axcodes2ornt, ornt_transform

from totalfast.upstream import resample_each_label

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from totalfast.geometry import Grid


def smooth_to_scanner_grid(
    labels: NDArray[np.uint8], *, scanner: Grid, threads: int
) -> NDArray[np.uint8]:
    """Map labels from the model grid back to the scanner grid.

    Parameters
    ----------
    labels
        uint8, (z, y, x), RAS+ axes, model grid.
    scanner
        The grid to fill; any orientation.
    threads
        How many labels are worked on at a time.

    Returns
    -------
        uint8, (x, y, z) of the scanner grid, Fortran order.

    Notes
    -----
    Labels that are already on the scanner grid are not changed: upstream does not resample them.
    """
    canonical = scanner.canonical().shape
    smooth = np.ascontiguousarray(labels.T)
    if smooth.shape != canonical:
        smooth = resample_each_label(smooth, canonical, threads=threads)
    to_scanner = ornt_transform(axcodes2ornt("RAS"), scanner.orientation)
    return np.asfortranarray(apply_orientation(smooth, to_scanner))
