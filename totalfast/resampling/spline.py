"""The compiled inner loops of cubic resampling: spline coefficients, and sums of them.

The filter and the order of every float64 operation are scipy.ndimage.zoom's (1.17, ni_splines.c and
ni_interpolation.c, with mode="nearest"), so the values are equal. Neighbouring lines are filtered
side by side. Importing this module imports numba. Its first call in a fresh installation compiles
for some seconds; later processes load the compiled code (``system/loops.py``).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from totalfast.system.loops import jit

TAPS = 4
PADDING = 12
"""Edge voxels that scipy.ndimage.zoom adds on each side before it filters."""

POLE = -0.267949192431122706472553658494127633
"""sqrt(3) - 2, written as in scipy: the square root minus 2 has other last bits."""
GAIN = (1.0 - POLE) * (1.0 - 1.0 / POLE)
SUMMED = 128
"""Voxels whose sum is the first coefficient of a line; later ones are below rounding."""

ROWS_PER_TILE = 16
"""Lines along the last axis that are filtered side by side."""


@jit
def take_rows(rows, source, tile):
    """``tile[n] = rows[source[n]]``, as float64."""
    for n in range(len(source)):
        for x in range(tile.shape[1]):
            tile[n, x] = rows[source[n], x]


@jit
def pad_edges(plane):
    """Repeat the edges of the middle part of a plane."""
    height, width = plane.shape
    for y in range(PADDING, height - PADDING):
        plane[y, :PADDING] = plane[y, PADDING]
        plane[y, width - PADDING :] = plane[y, width - PADDING - 1]
    for y in range(PADDING):
        plane[y] = plane[PADDING]
        plane[height - 1 - y] = plane[height - PADDING - 1]


@jit
def filter_columns(lines):
    """Turn voxels into spline coefficients along the first axis of (voxels, lines), in place.

    scipy's recursion for mode="nearest", which mirrors a line about the edge of its last voxel.
    """
    count, width = lines.shape
    for i in range(count):
        for x in range(width):
            lines[i, x] *= GAIN
    end = math.pow(POLE, count)
    begun = lines[0].copy()
    for x in range(width):
        lines[0, x] = begun[x] + end * lines[count - 1, x]
    power = POLE
    for i in range(1, min(count, SUMMED)):
        for x in range(width):
            lines[0, x] += power * (lines[i, x] + end * lines[count - 1 - i, x])
        power *= POLE
    scale = POLE / (1.0 - end * end)
    for x in range(width):
        lines[0, x] = lines[0, x] * scale + begun[x]
    for i in range(1, count):
        for x in range(width):
            lines[i, x] += POLE * lines[i - 1, x]
    scale = POLE / (POLE - 1.0)
    for x in range(width):
        lines[count - 1, x] *= scale
    for i in range(count - 2, -1, -1):
        for x in range(width):
            lines[i, x] = POLE * (lines[i + 1, x] - lines[i, x])


@jit
def filter_rows(plane):
    """``filter_columns`` along the second axis."""
    height, width = plane.shape
    tile = np.zeros((width, ROWS_PER_TILE))
    for start in range(0, height, ROWS_PER_TILE):
        rows = min(ROWS_PER_TILE, height - start)
        for r in range(rows):
            for x in range(width):
                tile[x, r] = plane[start + r, x]
        filter_columns(tile)
        for r in range(rows):
            for x in range(width):
                plane[start + r, x] = tile[x, r]


class Neighbours(NamedTuple):
    """Which coefficients each target voxel of one axis is the sum of."""

    first: NDArray[np.intp]
    """(target,): first of the neighbours."""
    weights: NDArray[np.float64]
    """(target, taps); along x (taps, target)."""


class Clip(NamedTuple):
    """Bounds of the values, (target planes,) each."""

    low: NDArray[np.float64]
    high: NDArray[np.float64]


@jit
def interpolate(coefficients, along_z, along_y, along_x, clip, out):
    """Sum of ``((c * wz) * wy) * wx`` over the neighbours, x fastest, clipped."""
    first_z, weights_z = along_z
    first_y, weights_y = along_y
    first_x, weights_x = along_x
    low, high = clip
    taps_z, width = weights_z.shape[1], coefficients.shape[2]
    products = np.empty(width)
    sums = np.empty(out.shape[2])
    for k in range(out.shape[0]):
        for j in range(out.shape[1]):
            sums[:] = 0.0
            for a in range(taps_z):
                for b in range(TAPS):
                    z, y = weights_z[k, a], weights_y[j, b]
                    row = coefficients[first_z[k] + a, first_y[j] + b]
                    for x in range(width):
                        products[x] = (row[x] * z) * y
                    for c in range(TAPS):
                        for i in range(out.shape[2]):
                            sums[i] += products[first_x[i] + c] * weights_x[c, i]
            for i in range(out.shape[2]):
                out[k, j, i] = min(max(sums[i], low[k]), high[k])
