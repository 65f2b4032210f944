"""Cubic spline resampling of a volume, bit for bit as scipy.ndimage.zoom, in slabs and threads.

Unlike scipy it makes no float64 copy of the whole volume. ``totalfast.resampling.spline`` has the
arithmetic. Importing this module imports numba.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from totalfast.geometry import nearest_indices, sample_positions
from totalfast.resampling.spline import (
    PADDING,
    TAPS,
    Clip,
    Neighbours,
    filter_columns,
    filter_rows,
    interpolate,
    pad_edges,
    take_rows,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    LineReader = Callable[[int, slice], NDArray[Any]]
    PlaneWriter = Callable[[slice, NDArray[np.float64]], None]

HALO = 42
"""Planes beside a slab that its spline coefficients depend on: 0.268**42 is 1e-24, below
half a unit in the last place of a float64."""
PLANES_PER_SLAB = 48
"""Source planes per slab, if there are enough."""
VOXELS_PER_SLAB = 2**24
"""Most coefficients per slab: 128 MB per thread."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """Which source voxels each target voxel of one axis is the sum of.

    Parameters
    ----------
    first
        (target,), first of its neighbours, in the padded source.
    weights
        (target, 4), or (target, 1) where the nearest voxel is taken.
    """

    first: NDArray[np.intp]
    weights: NDArray[np.float64]

    @property
    def is_filtered(self) -> bool:
        """Whether the neighbours are spline coefficients, not voxels."""
        return bool(self.weights.shape[1] > 1)


def cubic_axis(source_size: int, target_size: int, coordinates: str) -> Axis:
    """Neighbours and weights of a cubic B-spline (get_spline_interpolation_weights)."""
    positions = sample_positions(source_size, target_size, coordinates) + PADDING
    floor = np.floor(positions)
    y = positions - floor
    z = 1.0 - y
    weights = np.empty((target_size, TAPS))
    weights[:, 1] = (y * y * (y - 2.0) * 3.0 + 4.0) / 6.0
    weights[:, 2] = (z * z * (z - 2.0) * 3.0 + 4.0) / 6.0
    weights[:, 0] = z * z * z / 6.0
    weights[:, 3] = 1.0 - weights[:, 0] - weights[:, 1] - weights[:, 2]
    return Axis(first=floor.astype(np.intp) - 1, weights=weights)


def nearest_axis(source_size: int, target_size: int, coordinates: str) -> Axis:
    """Only the nearest voxel."""
    index = nearest_indices(source_size, target_size, coordinates)
    return Axis(first=index + PADDING, weights=np.ones((target_size, 1)))


def resample_cubic(
    read: LineReader,
    sizes: Sequence[int],
    axes: Sequence[Axis],
    write: PlaneWriter,
    *,
    bounds: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None,
    threads: int,
) -> None:
    """Resample a volume, some planes at a time.

    Parameters
    ----------
    read
        ``read(j, planes)`` gives the source's voxels ``[planes, j, :]`` as (planes, voxels).
    sizes
        Source shape, along the axes in scipy's order.
    axes
        One for each axis. Only the first may be one of nearest voxels; then planes are resampled
        one by one.
    write
        ``write(planes, values)`` gets float64 target planes (planes, second axis, third axis).
    bounds
        Smallest and largest value of each target plane; values are clipped to them. None clips
        nothing.
    threads
        How many slabs are worked on at a time; ``read`` and ``write`` are called in them.
    """
    z, y, x = axes
    low, high = bounds or (np.full(len(z.first), -np.inf), np.full(len(z.first), np.inf))
    weights_x = np.ascontiguousarray(x.weights.T)

    def fill(planes: slice) -> None:
        coefficients, start = _coefficients(read, sizes, z, planes)
        values = np.empty((planes.stop - planes.start, len(y.first), len(x.first)))
        interpolate(
            coefficients,
            Neighbours(z.first[planes] - start, z.weights[planes]),
            Neighbours(y.first, y.weights),
            Neighbours(x.first, weights_x),
            Clip(low[planes], high[planes]),
            values,
        )
        write(planes, values)

    plane = math.prod(n + 2 * PADDING for n in sizes[1:])
    most = min(max(VOXELS_PER_SLAB // plane, TAPS), PLANES_PER_SLAB)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(fill, _slabs(z, most, threads)))


def _slabs(axis: Axis, most: int, threads: int) -> list[slice]:
    """Target planes in runs that span at most ``most`` source planes."""
    count = len(axis.first)
    spanned = int(axis.first[-1] - axis.first[0]) + axis.weights.shape[1]
    parts = min(max(-(-spanned // most), threads), count)
    bounds = np.linspace(0, count, parts + 1).astype(int)
    return [slice(int(a), int(b)) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]


def _coefficients(
    read: LineReader, sizes: Sequence[int], axis: Axis, planes: slice
) -> tuple[NDArray[np.float64], int]:
    """Spline coefficients for some target planes, and the padded index of the first."""
    first = int(axis.first[planes][0])
    last = int(axis.first[planes][-1]) + axis.weights.shape[1]
    halo = HALO if axis.is_filtered else 0
    start = max(first - halo, 0)
    stop = min(last + halo, sizes[0] + 2 * PADDING)
    # Source plane of each padded plane of the slab.
    source = np.clip(np.arange(start, stop) - PADDING, 0, sizes[0] - 1)
    own = slice(int(source[0]), int(source[-1]) + 1)
    coefficients = np.empty((last - first, *(n + 2 * PADDING for n in sizes[1:])))
    tile = np.empty((stop - start, sizes[2]))
    for j in range(sizes[1]):
        take_rows(np.asarray(read(j, own)), source - source[0], tile)
        if axis.is_filtered:
            filter_columns(tile)
        coefficients[:, PADDING + j, PADDING:-PADDING] = tile[first - start : last - start]
    for plane in coefficients:
        pad_edges(plane)
        filter_columns(plane)
        filter_rows(plane)
    return coefficients, first
