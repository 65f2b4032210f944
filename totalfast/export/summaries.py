"""Compiled loops over the logits of one source slice: the numbers per voxel that decide most cells.

Importing this module imports numba. Its first call in a fresh installation compiles for some
seconds; later processes load the compiled code from numba's cache.
"""

from __future__ import annotations

import numba
import numpy as np

from totalfast.export.jit import choose, jit

VOXELS_PER_BLOCK = 512
"""Chosen so that a block's logits of all classes stay in the second-level cache."""
ROW = VOXELS_PER_BLOCK + 16
"""Length of a block's row: with a power of two, a voxel's classes would evict one another."""


def load_row(source, start, count, block, bits, k):
    """Put logits ``source[start : start + count]`` into row k of ``block``, float32 or float64.

    Half-precision numbers come as uint16, because numba has no float16. ``bits`` is the memory of
    ``block``, as int32.
    """


@numba.extending.overload(load_row, jit_options={"error_model": "numpy"})
def _load_row(source, start, count, block, bits, k):
    if source.dtype != numba.types.uint16:

        def copy(source, start, count, block, bits, k):
            for n in range(count):
                block[k, n] = source[start + n]

        return copy

    def widen(source, start, count, block, bits, k):
        largest = np.int32(0)
        for n in range(count):
            half = np.int32(source[start + n])
            rest = half & np.int32(0x7FFF)
            largest = max(largest, rest)
            bits[k, n] = ((half & np.int32(0x8000)) << np.int32(16)) | (rest << np.int32(13))
        # The exponent's bias grows from 15 to 127; multiplying does that for tiny numbers too.
        for n in range(count):
            block[k, n] *= np.float32(2.0**112)
        if largest >= np.int32(0x7C00):
            for n in range(count):
                if abs(block[k, n]) >= np.float32(65536.0):  # infinity or NaN
                    bits[k, n] |= np.int32(0x7F800000)

    return widen


@jit
def ranked(value, number, best, before, winner, largest):
    """Update maximum, previous maximum, first maximum's class and magnitude with a value."""
    ahead = value > best
    return (
        choose(ahead, value, best),
        choose(ahead, best, before),
        choose(ahead, number, winner),
        choose(largest >= abs(value), largest, abs(value)),
    )


@jit
def summarise(source, stride, first, last, by_voxel, label, lead, magnitude):
    """Per voxel: first maximum, its lead over smaller labels, largest absolute logit.

    For the voxels ``first`` to ``last - 1``. Logit k of voxel n is ``source[k*stride + n]``;
    ``by_voxel`` gets it at ``[n, k]``, so that the classes of a cell's corner lie side by side. All
    arrays are contiguous, otherwise the loops are not vectorised. One block of voxels is done at a
    time: memory is the bottleneck, so temporary arrays must stay in the cache.
    """
    classes = by_voxel.shape[1]
    block = np.empty((classes, ROW), dtype=by_voxel.dtype)
    bits = block.view(np.int32)
    # All of one width, so that a vector register holds the same number of each.
    best = np.empty(VOXELS_PER_BLOCK, dtype=by_voxel.dtype)
    before, largest = np.empty_like(best), np.empty_like(best)
    winner, odd = np.empty_like(best), np.empty_like(best)
    number = best.dtype.type
    for start in range(first, last, VOXELS_PER_BLOCK):
        count = min(VOXELS_PER_BLOCK, last - start)
        for k in range(classes):
            load_row(source, k * stride + start, count, block, bits, k)
        for n in range(count):
            value = block[0, n]
            best[n], before[n], largest[n] = value, -np.inf, abs(value)
            winner[n], odd[n] = 0, value - value
        # Four classes per turn, so that the running values stay in registers.
        for k in range(1, classes - 3, 4):
            one, two, three, four = number(k), number(k + 1), number(k + 2), number(k + 3)
            for n in range(count):
                a, b, c, d = block[k, n], block[k + 1, n], block[k + 2, n], block[k + 3, n]
                top, second, at, size = ranked(a, one, best[n], before[n], winner[n], largest[n])
                top, second, at, size = ranked(b, two, top, second, at, size)
                top, second, at, size = ranked(c, three, top, second, at, size)
                top, second, at, size = ranked(d, four, top, second, at, size)
                best[n], before[n], winner[n], largest[n] = top, second, at, size
                odd[n] += ((a - a) + (b - b)) + ((c - c) + (d - d))
        for k in range(classes - (classes - 1) % 4, classes):
            for n in range(count):
                a = block[k, n]
                top, second, at, size = ranked(
                    a, number(k), best[n], before[n], winner[n], largest[n]
                )
                best[n], before[n], winner[n], largest[n] = top, second, at, size
                odd[n] += a - a
        for n in range(count):
            for k in range(classes):
                by_voxel[start + n, k] = block[k, n]
            label[start + n] = winner[n]
            lead[start + n] = best[n] - before[n]
            # With NaN or infinity, a cell compares all classes exactly.
            magnitude[start + n] = largest[n] if odd[n] == 0 else np.inf
