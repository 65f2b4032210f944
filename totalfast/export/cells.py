"""The compiled inner loops of ``linear``: what happens within one layer of cells.

Knows arrays only. Importing this module imports numba; its first call in a fresh installation
compiles for some seconds, later processes take the compiled code from numba's cache.
"""

from __future__ import annotations

import functools
import math

import numba
import numpy as np

jit = functools.partial(numba.njit, nogil=True, cache=True, error_model="numpy")


@numba.extending.intrinsic
def choose(typing_context, condition, one, other):
    """``one if condition else other`` without a branch.

    A branch that leaves an array's element as it is becomes a masked store, which costs some
    processors more than all else in a loop.
    """

    def generate(context, builder, signature, arguments):
        return builder.select(*arguments)

    return one(numba.types.boolean, one, one), generate


@jit
def smaller(one, other):
    """The smaller of two numbers, without a branch."""
    return choose(other < one, other, one)


@jit
def spacing_at(magnitude, bits, low):
    """Distance of neighbouring numbers of the rounded dtype at a magnitude."""
    exponent = math.frexp(magnitude)[1] - 1
    return math.ldexp(1.0, max(exponent, low) - bits)


@jit
def rounded(value, bits, low):
    """``value`` rounded to the dtype, ties to even: the hardware rounds the addition."""
    if bits == 52 or not math.isfinite(value) or value == 0.0:
        return value
    exponent = max(math.frexp(value)[1] - 1, low)
    big = math.ldexp(1.5, exponent + 52 - bits)
    result = (value + big) - big
    if bits == 10 and abs(result) > 65504.0:
        return math.copysign(math.inf, value)
    return result


VOXELS_A_BLOCK = 512
"""So many that a block's logits of all classes stay in the second cache."""
ROW = VOXELS_A_BLOCK + 16
"""Length of a block's row: with a power of two, a voxel's classes would evict one another."""


def load_row(source, start, count, block, bits, k):
    """Put logits ``source[start : start + count]`` into row k of ``block``, float32 or float64.

    Half-precision numbers come as uint16, as numba knows no float16. ``bits`` is the memory of
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
    """Maximum, what it leads, first maximum and magnitude, with one value more."""
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

    Of the voxels from ``first`` to before ``last``. Logit k of voxel n is ``source[k*stride + n]``;
    ``by_voxel`` gets it at ``[n, k]``, so that the classes of a cell's corner lie side by side. All
    arrays are contiguous, else the loops can't be vectorised. A block of voxels is done at a time:
    what waits is the memory, so that nothing but ``by_voxel`` may be written there.
    """
    classes = by_voxel.shape[1]
    block = np.empty((classes, ROW), dtype=by_voxel.dtype)
    bits = block.view(np.int32)
    # All of one width, so that a vector holds as many of each.
    best = np.empty(VOXELS_A_BLOCK, dtype=by_voxel.dtype)
    before, largest = np.empty_like(best), np.empty_like(best)
    winner, odd = np.empty_like(best), np.empty_like(best)
    number = best.dtype.type
    for start in range(first, last, VOXELS_A_BLOCK):
        count = min(VOXELS_A_BLOCK, last - start)
        for k in range(classes):
            load_row(source, k * stride + start, count, block, bits, k)
        for n in range(count):
            value = block[0, n]
            best[n], before[n], largest[n] = value, -np.inf, abs(value)
            winner[n], odd[n] = 0, value - value
        # Four classes a turn: what runs stays in registers for so long.
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
            # NaN and infinity send their cells the long way.
            magnitude[start + n] = largest[n] if odd[n] == 0 else np.inf


# Below, a name never stands for one array here and another there, nor for a part of one: numba
# would count references, and threads would wait for each other's counting.


@jit
def take_corners(a, b, k, nz, ys, ny, xs, nx, corners, c):
    """Fill ``corners[c]`` with the logits of class k at the corners of a cell, x fastest."""
    n = 0
    for iz in range(nz):
        for iy in range(ny):
            for ix in range(nx):
                corners[c, n] = a[ys[iy], xs[ix], k] if iz == 0 else b[ys[iy], xs[ix], k]
                n += 1


@jit
def smallest_leads(a, b, j, ys, xs, lead):
    """How far class j is ahead of each class at the eight corners of a cell, at least."""
    (y, v), (x, u) = ys, xs
    a0, a1, a2, a3 = a[y, x, j], a[y, u, j], a[v, x, j], a[v, u, j]
    b0, b1, b2, b3 = b[y, x, j], b[y, u, j], b[v, x, j], b[v, u, j]
    for k in range(len(lead)):
        one = smaller(a0 - a[y, x, k], a1 - a[y, u, k])
        two = smaller(a2 - a[v, x, k], a3 - a[v, u, k])
        three = smaller(b0 - b[y, x, k], b1 - b[y, u, k])
        four = smaller(b2 - b[v, x, k], b3 - b[v, u, k])
        lead[k] = smaller(smaller(one, two), smaller(three, four))


@jit
def smallest_lead(a, b, j, k, ys, xs):
    """How far class j is ahead of class k at the eight corners of a cell, at least."""
    lead = np.inf
    for y in ys:
        for x in xs:
            lead = min(lead, min(a[y, x, j] - a[y, x, k], b[y, x, j] - b[y, x, k]))
    return lead


@jit
def loses(k, j, lead, tolerance):
    """Whether class k can't win where class j is ahead by ``lead``: the rule of ``linear``."""
    return (k < j and lead > tolerance) or (k > j and lead >= 0.0)


@jit
def possible_winners(a, b, pivots, found, ys, xs, tolerance, lead, candidates):
    """Put those classes into ``candidates`` that can win over ``found`` pivots; return how many.

    ``tolerance`` is the spacing of the rounded dtype at the cell's largest magnitude.
    """
    smallest_leads(a, b, pivots[0], ys, xs, lead)
    count = 0
    for k in range(len(lead)):
        if not loses(k, pivots[0], lead[k], tolerance):
            candidates[count] = k
            count += 1
    for p in range(1, found):
        j, kept = pivots[p], 0
        for c in range(count):
            k = candidates[c]
            if not loses(k, j, smallest_lead(a, b, j, k, ys, xs), tolerance):
                candidates[kept] = k
                kept += 1
        count = kept
    return count


@jit
def four_corners(label, lead, size, ys, xs):
    """Their common label or -1, their smallest lead and their largest magnitude."""
    (y, v), (x, u) = ys, xs
    first = label[y, x]
    alike = first == label[y, u] and first == label[v, x] and first == label[v, u]
    return (
        np.int64(first) if alike else -1,
        min(min(lead[y, x], lead[y, u]), min(lead[v, x], lead[v, u])),
        max(max(size[y, x], size[y, u]), max(size[v, x], size[v, u])),
    )


@jit
def add_pivots(label, ys, xs, pivots, found):
    """Append the labels at four corners that are not yet among the ``found`` pivots."""
    for y in ys:
        for x in xs:
            at_corner, new = label[y, x], True
            for p in range(found):
                new = new and pivots[p] != at_corner
            if new:
                pivots[found] = at_corner
                found += 1
    return found


@jit
def interpolated(corners, c, wz, nz, wy, ny, wx, nx):
    """Scipy's sum over ``corners[c]``: each times its three weights one by one, x fastest."""
    total = 0.0
    n = 0
    for iz in range(nz):
        for iy in range(ny):
            for ix in range(nx):
                term = corners[c, n]
                if nz == 2:
                    term = term * wz[iz]
                if ny == 2:
                    term = term * wy[iy]
                if nx == 2:
                    term = term * wx[ix]
                total += term
                n += 1
    return total


@jit
def halve(values, kept, count, weights, corners, out):
    """Interpolate along the slowest axis of ``corners`` samples: ``count`` are left of each."""
    for c in range(kept):
        for n in range(count):
            value = values[c, n]
            if corners == 2:
                value = value * weights[0] + values[c, count + n] * weights[1]
            out[c, n] = value


@jit
def exact_winner(corners, candidates, kept, wz, nz, wy, ny, wx, nx, bits, low):
    """First maximum of the candidates, interpolated and rounded as scipy and nnU-Net do."""
    winner, best = 0, 0.0
    for c in range(kept):
        value = rounded(interpolated(corners, c, wz, nz, wy, ny, wx, nx), bits, low)
        # The first NaN wins over all, as in torch's and NumPy's argmax.
        if c == 0 or (best == best and (value > best or value != value)):
            winner, best = candidates[c], value
    return winner


@jit
def fill_box(out, y_start, y_stop, x_start, x_stop, label):
    """Set all slices of a box to a label; -1 leaves them as they are."""
    if label >= 0:
        for row in range(out.shape[0]):
            for y in range(y_start, y_stop):
                out[row, y, x_start:x_stop] = label


@jit
def fill_labels(lower, upper, weights_z, nz, axis_y, runs_y, axis_x, runs_x, bits, low, out):
    """Fill the target slices of one layer of cells with the winning labels."""
    a, label_a, lead_a, size_a = lower
    b, label_b, lead_b, size_b = upper
    y_lower, y_upper, wy_lower, wy_upper, ny = axis_y
    x_lower, x_upper, wx_lower, wx_upper, nx = axis_x
    classes = a.shape[2]
    candidates = np.empty(classes, dtype=np.int64)
    leads = np.empty(classes, dtype=a.dtype)
    corners = np.empty((classes, nz * ny * nx), dtype=np.float64)
    on_plane = np.empty((classes, ny * nx), dtype=np.float64)
    on_line = np.empty((classes, nx), dtype=np.float64)
    pivots = np.empty(8, dtype=np.int64)
    for run_y in range(runs_y.shape[0]):
        y_start, y_stop = runs_y[run_y, 0], runs_y[run_y, 1]
        # Where an axis has one corner only, both are that one.
        ys = (y_lower[y_start], y_upper[y_start] if ny == 2 else y_lower[y_start])
        # Cells side by side that one label fills are filled at once, when their row ends.
        alike, alike_from = -1, 0
        for run_x in range(runs_x.shape[0]):
            x_start, x_stop = runs_x[run_x, 0], runs_x[run_x, 1]
            xs = (x_lower[x_start], x_upper[x_start] if nx == 2 else x_lower[x_start])
            common, lead, size = four_corners(label_a, lead_a, size_a, ys, xs)
            common_above, lead_above, size_above = four_corners(label_b, lead_b, size_b, ys, xs)
            lead, size = min(lead, lead_above), max(size, size_above)
            finite = math.isfinite(size)
            tolerance = spacing_at(size, bits, low) if finite else np.inf
            if common >= 0 and common == common_above and lead > tolerance:
                candidates[0] = common
                kept = 1
            elif finite:
                found = add_pivots(label_a, ys, xs, pivots, 0)
                found = add_pivots(label_b, ys, xs, pivots, found)
                kept = possible_winners(a, b, pivots, found, ys, xs, tolerance, leads, candidates)
            else:
                for k in range(classes):
                    candidates[k] = k
                kept = classes
            label = candidates[0] if kept == 1 else -1
            if label != alike:
                fill_box(out, y_start, y_stop, alike_from, x_start, alike)
                alike, alike_from = label, x_start
            if kept == 1:
                continue

            compared = kept if finite else 0
            for c in range(kept):
                take_corners(a, b, candidates[c], nz, ys, ny, xs, nx, corners, c)
            # Axis by axis is eight times less work than scipy's sum and differs from it in the last
            # bits of float64, so that a lead beyond this decides for both, rounding included.
            clear = tolerance + 1e-12 * size
            for row in range(out.shape[0]):
                wz = (weights_z[0, row], weights_z[1, row])
                halve(corners, compared, ny * nx, wz, nz, on_plane)
                for y in range(y_start, y_stop):
                    wy = (wy_lower[y], wy_upper[y])
                    halve(on_plane, compared, nx, wy, ny, on_line)
                    for x in range(x_start, x_stop):
                        wx = (wx_lower[x], wx_upper[x])
                        winner, best, second = 0, -np.inf, -np.inf
                        for c in range(compared):
                            value = on_line[c, 0]
                            if nx == 2:
                                value = value * wx[0] + on_line[c, 1] * wx[1]
                            if value > best:
                                winner, second, best = candidates[c], best, value
                            elif value > second:
                                second = value
                        if not best - second > clear:
                            winner = exact_winner(
                                corners, candidates, kept, wz, nz, wy, ny, wx, nx, bits, low
                            )
                        out[row, y, x] = winner
        fill_box(out, y_start, y_stop, alike_from, out.shape[2], alike)


@jit
def fill_regions(
    a, b, regions, threshold, weights_z, nz, axis_y, runs_y, axis_x, runs_x, bits, low, out
):
    """Like ``fill_labels`` for regions: paint each where its probability exceeds 0.5."""
    y_lower, y_upper, wy_lower, wy_upper, ny = axis_y
    x_lower, x_upper, wx_lower, wx_upper, nx = axis_x
    corners = np.empty((1, nz * ny * nx), dtype=np.float64)
    for run_y in range(runs_y.shape[0]):
        y_start, y_stop = runs_y[run_y]
        ys = (y_lower[y_start], y_upper[y_start])
        for run_x in range(runs_x.shape[0]):
            x_start, x_stop = runs_x[run_x]
            xs = (x_lower[x_start], x_upper[x_start])
            out[:, y_start:y_stop, x_start:x_stop] = 0
            for k in range(a.shape[2]):
                take_corners(a, b, k, nz, ys, ny, xs, nx, corners, 0)
                above = below = 0
                for value in corners[0]:
                    above += math.isfinite(value) and value >= threshold
                    below += math.isfinite(value) and value < threshold
                if below == corners.shape[1]:
                    continue
                for row in range(out.shape[0]):
                    wz = (weights_z[0, row], weights_z[1, row])
                    for y in range(y_start, y_stop):
                        wy = (wy_lower[y], wy_upper[y])
                        for x in range(x_start, x_stop):
                            wx = (wx_lower[x], wx_upper[x])
                            if (
                                above == corners.shape[1]
                                or rounded(
                                    interpolated(corners, 0, wz, nz, wy, ny, wx, nx), bits, low
                                )
                                >= threshold
                            ):
                                out[row, y, x] = regions[k]
