"""Volume and intensity of each class, from one pass over a label map.

The values equal those of TotalSegmentator 2.18.0, statistics.py, digit for digit, where intensities
fit int16, to which upstream casts them. As there, they are truncated to whole numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from totalfast.labels.boxes import label_boxes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from totalfast.geometry import Box
    from totalfast.scan import ScannerImage

Statistics = dict[str, dict[str, Any]]
"""Class name to statistic to number; ``json.dumps(..., indent=4)`` is upstream's file."""

BORDER = 3
"""Outermost slices of each side; a class with a voxel there counts as cut by the image's edge."""

INTENSITIES = 1 << 16
LOWEST = -(1 << 15)
"""Intensities that are counted in a histogram, and the lowest: those of int16. Others are rare."""

LARGEST = (1 << 31) - 1
"""Largest absolute intensity; larger ones are clipped."""

SLAB_VOXELS = 1 << 22
"""Voxels that are counted at a time, so that temporary arrays stay below 150 MB."""

DIGITS = 5
"""Decimals of an intensity."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Which statistics are wanted, and of which classes."""

    exclude_at_border: bool = True
    """Classes at the image's edge, which may be cut, get zeros."""
    aggregation: str = "mean"
    """Average of the intensities: "mean" or "median"."""
    normalized: bool = False
    """Intensities are mapped to 0..1 by the image's lowest and highest."""
    extra: bool = False
    """Also number of voxels, spread and range of the intensities, centroid and bounding box."""


def measure(
    labels: NDArray[np.uint8],
    image: ScannerImage,
    classes: Mapping[int, str],
    *,
    voxel_mm3: np.floating[Any],
    wanted: Wanted,
) -> Statistics:
    """Measure all classes of a label map.

    Parameters
    ----------
    labels
        (x, y, z); Fortran order is fastest.
    image
        The intensities, on the same grid; truncated to whole numbers.
    classes
        Label to class name, in the order of the result.
    voxel_mm3
        Volume of a voxel, float32 as in upstream: its rounding changes the volumes.
    wanted
        Which statistics.

    Returns
    -------
        For each class "volume" (mm3) and "intensity"; with ``wanted.extra`` also "n_voxels",
        "intensity_std", "intensity_min", "intensity_max", "centroid_vox" and "bbox_vox" (voxel
        indices; inclusive). An empty or excluded class has zeros.
    """
    boxes = label_boxes(labels)
    if wanted.exclude_at_border:
        boxes = {label: box for label, box in boxes.items() if not _is_cut(box, labels.shape)}
    measured = [label for label in classes if label in boxes]
    rows = _counts(labels, image, measured)
    scale = _normalisation(image) if wanted.normalized else _as_float
    statistics: Statistics = {}
    for label, name in classes.items():
        if label not in rows:
            statistics[name] = _zeros(extra=wanted.extra)
            continue
        values, counts = _ascending(*rows[label], scale)
        number = np.sum(counts)
        average = _median if wanted.aggregation == "median" else _mean
        statistics[name] = {
            "volume": float(number * voxel_mm3),
            "intensity": float(average(values, counts).round(DIGITS)),
        }
        if wanted.extra:
            statistics[name] |= {
                "n_voxels": int(number),
                "intensity_std": float(_deviation(values, counts).round(DIGITS)),
                "intensity_min": float(values[0]),
                "intensity_max": float(values[-1]),
                **_place(labels, label, boxes[label]),
            }
    return statistics


def _zeros(*, extra: bool) -> dict[str, Any]:
    zeros: dict[str, Any] = {"volume": 0.0, "intensity": 0.0}
    if extra:
        zeros |= {"n_voxels": 0, "intensity_std": 0.0}
        zeros |= {"intensity_min": 0.0, "intensity_max": 0.0}
        zeros |= {"centroid_vox": None, "bbox_vox": None}
    return zeros


def _is_cut(box: Box, shape: tuple[int, ...]) -> bool:
    return any(
        part.start < BORDER or part.stop > size - BORDER
        for part, size in zip(box, shape, strict=True)
    )


def _slabs(shape: tuple[int, ...]) -> Iterator[slice]:
    """Ranges of slices, along z, of about ``SLAB_VOXELS`` voxels each."""
    step = max(SLAB_VOXELS // (shape[0] * shape[1]), 1)
    for start in range(0, shape[2], step):
        yield slice(start, min(start + step, shape[2]))


def _whole(image: ScannerImage, stored: NDArray[Any]) -> NDArray[np.int64]:
    """Scale intensities and truncate them to whole numbers; NaN becomes 0, as in upstream."""
    values = np.clip(image.scale(stored), -LARGEST, LARGEST)
    return np.nan_to_num(values, copy=False, nan=0.0).astype(np.int64)


def _counts(
    labels: NDArray[np.uint8], image: ScannerImage, measured: Sequence[int]
) -> dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """The intensities that occur in each label, and how often."""
    # Pages without a count take no memory.
    histogram = np.zeros((len(measured), INTENSITIES), dtype=np.int64)
    far: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    row_of = np.full(256, -1, dtype=np.intp)
    row_of[list(measured)] = np.arange(len(measured))
    counted = row_of >= 0
    for planes in _slabs(labels.shape):
        part = labels[:, :, planes].ravel(order="F")
        inside = np.flatnonzero(counted[part])
        if not inside.size:
            continue
        stored = image.stored[:, :, planes].ravel(order="F")
        rows, values = row_of[part[inside]], _whole(image, stored[inside])
        if int(values.min()) < LOWEST or int(values.max()) >= LOWEST + INTENSITIES:
            beyond = (values < LOWEST) | (values >= LOWEST + INTENSITIES)
            far.append(_count_pairs(rows[beyond], values[beyond]))
            rows, values = rows[~beyond], values[~beyond]
        _add_up(histogram, rows, values)
    found = {}
    for row, label in enumerate(measured):
        used = np.flatnonzero(histogram[row])
        parts, part_counts = [used + LOWEST], [histogram[row][used]]
        for pairs, numbers in far:
            own = pairs[:, 0] == row
            parts.append(pairs[own, 1])
            part_counts.append(numbers[own])
        found[label] = (np.concatenate(parts), np.concatenate(part_counts))
    return found


def _count_pairs(
    rows: NDArray[np.intp], values: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Different pairs of (row, value), and how often each occurs."""
    codes, counts = np.unique((rows << 33) + values + LARGEST, return_counts=True)
    return np.stack([codes >> 33, (codes & ((1 << 33) - 1)) - LARGEST], axis=1), counts


def _add_up(
    histogram: NDArray[np.int64], rows: NDArray[np.intp], values: NDArray[np.int64]
) -> None:
    """Count pairs of (row, value) in a histogram, in place."""
    if not values.size:
        return
    low = int(values.min())
    width = int(values.max()) - low + 1
    counts = np.bincount(rows * width + (values - low), minlength=len(histogram) * width)
    start = low - LOWEST
    histogram[:, start : start + width] += counts.reshape(len(histogram), width)


def _as_float(values: NDArray[np.int64]) -> NDArray[np.float64]:
    return values.astype(np.float64)


def _normalisation(image: ScannerImage) -> Callable[[NDArray[np.int64]], NDArray[np.float64]]:
    """Map the image's intensities to 0..1, as upstream does."""
    extremes = [
        extreme(_whole(image, image.stored[:, :, planes]))
        for planes in _slabs(image.stored.shape)
        for extreme in (np.min, np.max)
    ]
    low, high = min(extremes), max(extremes)

    def normalise(values: NDArray[np.int64]) -> NDArray[np.float64]:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray((values - low) / (high - low), dtype=np.float64)

    return normalise


def _ascending(
    values: NDArray[np.int64],
    counts: NDArray[np.int64],
    scale: Callable[[NDArray[np.int64]], NDArray[np.float64]],
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Intensities, scaled, in ascending order, and their counts."""
    scaled = scale(values)
    order = np.argsort(scaled, kind="stable")
    return scaled[order], counts[order]


def _mean(values: NDArray[np.float64], counts: NDArray[np.int64]) -> np.floating[Any]:
    """Mean; exact for whole numbers, like upstream's sum of float64 up to 2**53."""
    mean: np.floating[Any] = np.average(values, weights=counts)
    return mean


def _median(values: NDArray[np.float64], counts: NDArray[np.int64]) -> np.floating[Any]:
    until = np.cumsum(counts)
    middle = [(until[-1] - 1) // 2, until[-1] // 2]
    median: np.floating[Any] = np.mean(values[np.searchsorted(until, middle, side="right")])
    return median


def _deviation(values: NDArray[np.float64], counts: NDArray[np.int64]) -> np.floating[Any]:
    squares = (values - _mean(values, counts)) ** 2
    deviation: np.floating[Any] = np.sqrt(np.average(squares, weights=counts))
    return deviation


def _place(labels: NDArray[np.uint8], label: int, box: Box) -> dict[str, Any]:
    """Centroid and bounding box of a label, along the axes of the array."""
    mask = labels[box] == label
    centroid = []
    for axis, part in enumerate(box):
        counts = np.count_nonzero(mask, axis=tuple(k for k in range(3) if k != axis))
        total = int(np.dot(counts, np.arange(part.start, part.stop)))
        centroid.append(round(total / int(counts.sum()), 2))
    return {
        "centroid_vox": centroid,
        "bbox_vox": [[int(part.start), int(part.stop) - 1] for part in box],
    }
