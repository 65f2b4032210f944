"""Compare label maps and folders of masks, on all cores."""

from __future__ import annotations

import filecmp
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nibabel as nib
import numpy as np
from isal import igzip

if TYPE_CHECKING:
    from numpy.typing import NDArray

LEAST_VOXELS = 100
"""Smaller structures do not count for the lowest Dice."""


def differing(one: Path, other: Path) -> dict[str, Any]:
    """Return differing voxels of two label maps or folders of masks, and the lowest Dice."""
    if not one.exists() or not other.exists():
        return {"missing": [path.name for path in (one, other) if not path.exists()]}
    if one.is_dir():
        names = sorted(path.name for path in one.glob("*.nii.gz"))
        others = sorted(path.name for path in other.glob("*.nii.gz"))
        if names != others:
            return {"other files": sorted(set(names) ^ set(others))}
        with ProcessPoolExecutor() as pool:
            rows = list(pool.map(compare_files, [(one / name, other / name) for name in names]))
    else:
        rows = [compare_files((one, other))]
    scores = [score for row in rows for score in row[2]]
    lowest, where = min(scores, default=(1.0, ""))
    return {
        "differing": sum(row[0] for row in rows),
        "voxels": sum(row[1] for row in rows),
        f"lowest_dice_of_{LEAST_VOXELS}_voxels": lowest,
        "where": where,
    }


def compare_files(pair: tuple[Path, Path]) -> tuple[int, int, list[tuple[float, str]]]:
    """Return differing voxels, voxels, and Dice and name of each structure that differs.

    Files of equal bytes are not decompressed.
    """
    one, other = pair
    if filecmp.cmp(one, other, shallow=False):
        return 0, int(np.prod(nib.load(one).shape)), []
    a, b = (stored_labels(path) for path in pair)
    if a.shape != b.shape:
        return max(a.size, b.size), a.size, [(0.0, f"{one.name}: {a.size}, {b.size} voxels")]
    others = np.flatnonzero(a != b)
    of_a, of_b = label_sizes(a), label_sizes(b)
    common = of_a - np.bincount(a[others], minlength=256)
    scores = [
        (float(2 * common[label] / (of_a[label] + of_b[label])), f"{one.name}:{label}")
        for label in range(1, 256)
        if common[label] != max(of_a[label], of_b[label]) >= LEAST_VOXELS
    ]
    return int(others.size), int(a.size), scores


def stored_labels(path: Path) -> NDArray[np.uint8]:
    """All voxels of a compressed NIfTI file of labels below 256, in the order of the file."""
    proxy = nib.load(path).dataobj
    with igzip.open(path, "rb") as stream:
        content = stream.read()
    return np.frombuffer(content, dtype=proxy.dtype, offset=proxy.offset).astype(
        np.uint8, copy=False
    )


def label_sizes(labels: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Voxels of each label, 256 numbers."""
    present = np.count_nonzero(labels)
    if labels.max(initial=0) <= 1:
        sizes = np.zeros(256, dtype=np.int64)
        sizes[:2] = labels.size - present, present
        return sizes
    return np.bincount(labels, minlength=256)
