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
def summarise(logits, by_voxel, label, lead, magnitude):
    """Per voxel: first maximum, its lead over smaller labels, largest absolute logit.

    ``logits`` are (classes, y, x); ``by_voxel`` gets the same as (y, x, classes), in which
    the classes of a cell's corner lie side by side.
    """
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
            for k in range(classes):
                by_voxel[y, x, k] = logits[k, y, x]
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
                corners[n] = logits[ys[iy], xs[ix], k]
                n += 1


@jit
def drop_losers(a, b, j, nz, ys, ny, xs, nx, tolerance, gap, possible):
    """Unmark the classes that can't win over class j in a cell: the rule at the top of ``linear``.

    ``tolerance`` is the spacing of the rounded dtype at the cell's largest magnitude.
    """
    gap[:] = np.inf
    for iz in range(nz):
        logits = a if iz == 0 else b
        for iy in range(ny):
            for ix in range(nx):
                corner = logits[ys[iy], xs[ix]]
                top = corner[j]
                for k in range(len(gap)):
                    ahead = top - corner[k]
                    gap[k] = ahead if ahead < gap[k] else gap[k]
    for k in range(len(gap)):
        if k != j and (gap[k] > tolerance or (k > j and gap[k] >= 0.0)):
            possible[k] = False


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
def halve(values, count, weights, corners):
    """Interpolate along the slowest axis of ``corners`` samples: leaves the first ``count``."""
    if corners == 2:
        for n in range(count):
            values[n] = values[n] * weights[0] + values[count + n] * weights[1]


@jit
def exact_winner(corners, candidates, kept, wz, nz, wy, ny, wx, nx, bits, low):
    """First maximum of the candidates, interpolated and rounded as scipy and nnU-Net do."""
    winner, best = 0, 0.0
    for c in range(kept):
        value = rounded(interpolated(corners[c], wz, nz, wy, ny, wx, nx), bits, low)
        # The first NaN wins over all, as in torch's and NumPy's argmax.
        if c == 0 or (best == best and (value > best or value != value)):
            winner, best = candidates[c], value
    return winner


@jit
def fill_labels(lower, upper, weights_z, nz, axis_y, runs_y, axis_x, runs_x, bits, low, out):
    """Fill the target slices of one layer of cells with the winning labels."""
    a, label_a, lead_a, size_a = lower
    b, label_b, lead_b, size_b = upper
    y_lower, y_upper, wy_lower, wy_upper, ny = axis_y
    x_lower, x_upper, wx_lower, wx_upper, nx = axis_x
    classes = a.shape[2]
    candidates = np.empty(classes, dtype=np.int64)
    possible = np.empty(classes, dtype=np.bool_)
    gap = np.empty(classes, dtype=a.dtype)
    corners = np.empty((classes, nz * ny * nx), dtype=np.float64)
    on_plane = np.empty((classes, nz * ny * nx), dtype=np.float64)
    on_line = np.empty((classes, ny * nx), dtype=np.float64)
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
            tolerance = spacing_at(size, bits, low) if finite else np.inf
            kept = 0
            if found == 1 and lead > tolerance:
                candidates[0] = pivots[0]
                kept = 1
            else:
                possible[:] = True
                for p in range(found if finite else 0):
                    drop_losers(a, b, pivots[p], nz, ys, ny, xs, nx, tolerance, gap, possible)
                for k in range(classes):
                    if possible[k]:
                        candidates[kept] = k
                        kept += 1
            if kept == 1:
                for row in range(out.shape[0]):
                    for y in range(y_start, y_stop):
                        for x in range(x_start, x_stop):
                            out[row, y, x] = candidates[0]
                continue

            for c in range(kept):
                take_corners(a, b, candidates[c], nz, ys, ny, xs, nx, corners[c])
            # Axis by axis is eight times less work than scipy's sum and differs from it in the last
            # bits of float64, so that a lead beyond this decides for both, rounding included.
            clear = tolerance + 1e-12 * size
            for row in range(out.shape[0]):
                wz = (weights_z[0, row], weights_z[1, row])
                for c in range(kept if finite else 0):
                    on_plane[c] = corners[c]
                    halve(on_plane[c], ny * nx, wz, nz)
                for y in range(y_start, y_stop):
                    wy = (wy_lower[y], wy_upper[y])
                    for c in range(kept if finite else 0):
                        on_line[c] = on_plane[c, : ny * nx]
                        halve(on_line[c], nx, wy, ny)
                    for x in range(x_start, x_stop):
                        wx = (wx_lower[x], wx_upper[x])
                        winner, best, second = 0, -np.inf, -np.inf
                        for c in range(kept if finite else 0):
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
            for k in range(a.shape[2]):
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
