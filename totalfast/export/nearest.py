"""One nearest-neighbour gather back to the scanner grid, fused with flips and axis permutation.

Knows label maps and grids; knows nothing of tasks, files or networks.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from totalfast.geometry import Grid, nearest_indices

if TYPE_CHECKING:
    from numpy.typing import NDArray


def nearest_to_scanner_grid(
    labels: NDArray[np.unsignedinteger], *, scanner: Grid, threads: int
) -> NDArray[np.unsignedinteger]:
    """Map labels from the model grid back to the scanner grid.

    Parameters
    ----------
    labels
        (z, y, x), RAS+ axes, model grid.
    scanner
        The grid to fill; any orientation.
    threads
        How many slices are worked on at a time.

    Returns
    -------
        Same dtype, (x, y, z) of the scanner grid, Fortran order; a new array.

    Notes
    -----
    Index rule of scipy.ndimage.zoom(order=0) (TotalSegmentator 2.18.0, resampling.py), then
    nibabel's orientation transform. Neighbouring output slices that come from one model slice are
    gathered once and copied.
    """
    canonical = scanner.canonical().shape
    orientation = scanner.orientation
    source = labels.T.transpose([int(axis) for axis, _ in orientation])
    x, y, z = (
        nearest_indices(labels.shape[2 - int(axis)], canonical[int(axis)])[:: int(direction)]
        for axis, direction in orientation
    )
    out = np.empty(scanner.shape, dtype=labels.dtype, order="F")

    def fill(run: NDArray[np.intp]) -> None:
        first = run[0]
        out[:, :, first] = source[:, :, z[first]].T[y[:, None], x].T
        for other in run[1:]:
            out[:, :, other] = out[:, :, first]

    runs = np.split(np.arange(len(z)), np.flatnonzero(np.diff(z)) + 1)
    with ThreadPoolExecutor(max_workers=threads) as pool:
        list(pool.map(fill, runs))
    return out
