"""The region of a scan that a task segments: the box around structures of a rough label map.

Upstream builds the rough mask on the scanner grid. Here its box follows from the index map.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from totalfast.export.nearest import ScannerMap, nearest_to_scanner_grid

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from numpy.typing import NDArray

    from totalfast.geometry import Box, Grid


def box_around(
    labels: NDArray[np.uint8],
    wanted: Collection[int],
    *,
    scanner: Grid,
    margin_mm: Sequence[float],
) -> Box | None:
    """Box of the scanner grid around structures, with a margin.

    Parameters
    ----------
    labels
        Rough labels, (z, y, x), RAS+ axes.
    wanted
        Labels of the structures.
    scanner
        Grid of the scan.
    margin_mm
        Along the scanner grid's (x, y, z).

    Returns
    -------
        Slices along (x, y, z); None if no voxel of the scan would get one of the labels.

    Notes
    -----
    The margin is whole voxels, ``int(mm / float32 spacing)``, and ends at the image's edges
    (TotalSegmentator 2.18.0, cropping.py).
    """
    mapped = ScannerMap.of(labels, scanner)
    # Rough voxels that are not nearest to any voxel of the scan must not count.
    used = [np.unique(index) for index in mapped.indices]
    mask = is_one_of(mapped.labels[np.ix_(*used)], wanted)
    if not mask.any():
        return None
    margins = (np.asarray(margin_mm) / scanner.spacing_mm).astype(int)
    box = []
    for axis in range(3):
        hit = used[axis][mask.any(axis=tuple(k for k in range(3) if k != axis))]
        inside = np.flatnonzero(np.isin(mapped.indices[axis], hit))
        low, high = int(inside[0]) - int(margins[axis]), int(inside[-1]) + 1 + int(margins[axis])
        box.append(slice(max(low, 0), min(high, scanner.shape[axis])))
    return box[0], box[1], box[2]


def remove_outside(
    result: NDArray[np.uint8],
    box: Box,
    labels: NDArray[np.uint8],
    wanted: Collection[int],
    *,
    scanner: Grid,
    zooms_mm: Sequence[np.float32],
    distance_mm: float,
    threads: int,
) -> None:
    """Set the labels outside of rough structures and a margin around them to 0, in place.

    Parameters
    ----------
    result
        (x, y, z) of the scanner grid; 0 outside of ``box``.
    box
        Part of ``result`` that can have labels.
    labels, wanted
        Rough labels (z, y, x) and the structures among them.
    scanner
        Grid of the scan.
    zooms_mm
        Spacing (x, y, z) as the scan's header has it, float32.
    distance_mm
        Margin: ``int(distance / mean zoom)`` 6-connected dilations by one voxel, in NumPy's
        arithmetic of a Python number and a float32. Less than one voxel dilates until nothing
        changes, as scipy's ``iterations=0`` does in upstream.
    threads
        Slices that are worked on at a time.
    """
    from scipy.ndimage import binary_dilation

    steps = int(distance_mm / np.mean(zooms_mm))
    reach = max(scanner.shape) if steps < 1 else steps
    wide = tuple(
        slice(max(part.start - reach, 0), min(part.stop + reach, n))
        for part, n in zip(box, scanner.shape, strict=True)
    )
    rough = nearest_to_scanner_grid(
        labels, scanner=scanner, threads=threads, box=(wide[0], wide[1], wide[2])
    )
    near = binary_dilation(is_one_of(rough, wanted), iterations=steps)
    inside = tuple(
        slice(part.start - outer.start, part.stop - outer.start)
        for part, outer in zip(box, wide, strict=True)
    )
    result[box][~near[inside]] = 0


def is_one_of(labels: NDArray[np.uint8], wanted: Collection[int]) -> NDArray[np.bool_]:
    """Return a mask of the voxels that have one of some labels, of the shape of ``labels``."""
    table = np.zeros(256, dtype=bool)
    table[list(wanted)] = True
    return table[labels]
