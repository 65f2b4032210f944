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


@jit
def summarise(logits, label, lead, magnitude):
    """Per voxel: first maximum, its lead over smaller labels, largest absolute logit."""
    classes, height, width = logits.shape
    for y in range(height):
        best = logits[0, y].copy()
        before = np.full_like(best, -np.inf)
        largest = np.abs(best)
        winner = np.zeros(width, dtype=np.uint16)
        for k in range(1, classes):
            for x in range(width):
                value = logits[k, y, x]
                ahead = value > best[x]
                before[x] = best[x] if ahead else before[x]
                winner[x] = k if ahead else winner[x]
                best[x] = value if ahead else best[x]
                size = abs(value)
                # NaN and infinity stay, and send their cells the long way.
                largest[x] = largest[x] if largest[x] >= size else size
        for x in range(width):
            label[y, x] = winner[x]
            lead[y, x] = best[x] - before[x]
            magnitude[y, x] = largest[x]
        for k in range(classes):
            for x in range(width):
                if logits[k, y, x] != logits[k, y, x]:
                    magnitude[y, x] = np.inf


@jit
def take_corners(a, b, k, nz, ys, ny, xs, nx, corners):
    """Fill in the logits of class k at the corners of a cell, x fastest."""
    n = 0
    for iz in range(nz):
        logits = a if iz == 0 else b
        for iy in range(ny):
            for ix in range(nx):
                corners[n] = logits[k, ys[iy], xs[ix]]
                n += 1


@jit
def beats(mine, other, first, bits, low):
    """Whether a class can't lose to the other in a cell, given the corner logits of both.

    ``first`` says whether it has the smaller label, so that a tie is its own. This is the rule at
    the top of ``linear``.
    """
    gap, largest = np.inf, 0.0
    for n in range(len(mine)):
        gap = min(gap, mine[n] - other[n])
        largest = max(largest, abs(mine[n]), abs(other[n]))
    return (first and gap >= 0.0) or (gap > 0.0 and gap > spacing_at(largest, bits, low))


@jit
def interpolated(corners, wz, nz, wy, ny, wx, nx):
    """Scipy's sum: each corner times its three weights one by one, x fastest."""
    total = 0.0
    n = 0
    for iz in range(nz):
        for iy in range(ny):
            for ix in range(nx):
                term = corners[n]
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
def fill_labels(lower, upper, weights_z, nz, axis_y, runs_y, axis_x, runs_x, bits, low, out):
    """Fill the target slices of one layer of cells with the winning labels."""
    a, label_a, lead_a, size_a = lower
    b, label_b, lead_b, size_b = upper
    y_lower, y_upper, wy_lower, wy_upper, ny = axis_y
    x_lower, x_upper, wx_lower, wx_upper, nx = axis_x
    classes = a.shape[0]
    candidates = np.empty(classes, dtype=np.int64)
    corners = np.empty((classes, nz * ny * nx), dtype=np.float64)
    pivots = np.empty(8, dtype=np.int64)
    for run_y in range(runs_y.shape[0]):
        y_start, y_stop = runs_y[run_y]
        ys = (y_lower[y_start], y_upper[y_start])
        for run_x in range(runs_x.shape[0]):
            x_start, x_stop = runs_x[run_x]
            xs = (x_lower[x_start], x_upper[x_start])
            found = 0
            lead, size = np.inf, 0.0
            for iz in range(nz):
                label = label_a if iz == 0 else label_b
                leads = lead_a if iz == 0 else lead_b
                sizes = size_a if iz == 0 else size_b
                for iy in range(ny):
                    for ix in range(nx):
                        y, x = ys[iy], xs[ix]
                        lead = min(lead, leads[y, x])
                        size = max(size, sizes[y, x])
                        at_corner = label[y, x]
                        new = True
                        for p in range(found):
                            new = new and pivots[p] != at_corner
                        if new:
                            pivots[found] = at_corner
                            found += 1
            finite = math.isfinite(size)
            if found == 1 and finite and lead > spacing_at(size, bits, low):
                for row in range(out.shape[0]):
                    for y in range(y_start, y_stop):
                        for x in range(x_start, x_stop):
                            out[row, y, x] = pivots[0]
                continue

            for k in range(classes):
                take_corners(a, b, k, nz, ys, ny, xs, nx, corners[k])
            kept = 0
            for k in range(classes):
                dropped = False
                if finite:
                    for p in range(found):
                        j = pivots[p]
                        if j != k and not dropped:
                            dropped = beats(corners[j], corners[k], j < k, bits, low)
                if not dropped:
                    candidates[kept] = k
                    kept += 1
            for row in range(out.shape[0]):
                wz = (weights_z[0, row], weights_z[1, row])
                for y in range(y_start, y_stop):
                    wy = (wy_lower[y], wy_upper[y])
                    for x in range(x_start, x_stop):
                        wx = (wx_lower[x], wx_upper[x])
                        winner, best = 0, 0.0
                        for c in range(kept):
                            own = corners[candidates[c]]
                            value = rounded(interpolated(own, wz, nz, wy, ny, wx, nx), bits, low)
                            # The first NaN wins over all, as in torch's and NumPy's argmax.
                            if c == 0 or (best == best and (value > best or value != value)):
                                winner, best = candidates[c], value
                        out[row, y, x] = winner


@jit
def fill_regions(
    a, b, regions, threshold, weights_z, nz, axis_y, runs_y, axis_x, runs_x, bits, low, out
):
    """Like ``fill_labels`` for regions: paint each where its probability exceeds 0.5."""
    y_lower, y_upper, wy_lower, wy_upper, ny = axis_y
    x_lower, x_upper, wx_lower, wx_upper, nx = axis_x
    corners = np.empty(nz * ny * nx, dtype=np.float64)
    for run_y in range(runs_y.shape[0]):
        y_start, y_stop = runs_y[run_y]
        ys = (y_lower[y_start], y_upper[y_start])
        for run_x in range(runs_x.shape[0]):
            x_start, x_stop = runs_x[run_x]
            xs = (x_lower[x_start], x_upper[x_start])
            out[:, y_start:y_stop, x_start:x_stop] = 0
            for k in range(a.shape[0]):
                take_corners(a, b, k, nz, ys, ny, xs, nx, corners)
                above = below = 0
                for value in corners:
                    above += math.isfinite(value) and value >= threshold
                    below += math.isfinite(value) and value < threshold
                if below == len(corners):
                    continue
                for row in range(out.shape[0]):
                    wz = (weights_z[0, row], weights_z[1, row])
                    for y in range(y_start, y_stop):
                        wy = (wy_lower[y], wy_upper[y])
                        for x in range(x_start, x_stop):
                            wx = (wx_lower[x], wx_upper[x])
                            if (
                                above == len(corners)
                                or rounded(interpolated(corners, wz, nz, wy, ny, wx, nx), bits, low)
                                >= threshold
                            ):
                                out[row, y, x] = regions[k]
