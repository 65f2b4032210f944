"""Compiled loops of ``linear`` over one layer of cells: which class wins at each target voxel.

Importing this module imports numba. Its first call in a fresh installation compiles for some
seconds; later processes load the compiled code from numba's cache.
"""

from __future__ import annotations

import functools
import math

import numpy as np

from totalfast.export.cell_data import Cell, Weights
from totalfast.export.jit import jit, smaller

# Inside of these loops, never rebind an array, never slice an array and never take one from a
# tuple: numba would count references atomically, which is slow, and threads would wait for one
# another. Tuples of numbers cost nothing.


@jit
def spacing_at(magnitude, rounding):
    """Distance of neighbouring numbers of the rounded dtype at a magnitude."""
    exponent = math.frexp(magnitude)[1] - 1
    return math.ldexp(1.0, max(exponent, rounding.lowest) - rounding.bits)


@jit
def rounded(value, rounding):
    """``value`` rounded to the dtype, ties to even: the hardware rounds the addition."""
    bits = rounding.bits
    if bits == 52 or not math.isfinite(value) or value == 0.0:
        return value
    exponent = max(math.frexp(value)[1] - 1, rounding.lowest)
    big = math.ldexp(1.5, exponent + 52 - bits)
    result = (value + big) - big
    if bits == 10 and abs(result) > 65504.0:
        return math.copysign(math.inf, value)
    return result


@jit
def take_corners(a, b, k, cell, shape, corners, c):
    """Fill ``corners[c]`` with the logits of class k at the corners of a cell, x fastest."""
    nz, ny, nx = shape
    n = 0
    for iz in range(nz):
        for iy in range(ny):
            for ix in range(nx):
                y, x = cell.ys[iy], cell.xs[ix]
                corners[c, n] = a[y, x, k] if iz == 0 else b[y, x, k]
                n += 1


@jit
def smallest_leads(a, b, j, cell, lead):
    """Smallest lead of class j over each class at the eight corners of a cell."""
    (y, v), (x, u) = cell.ys, cell.xs
    a0, a1, a2, a3 = a[y, x, j], a[y, u, j], a[v, x, j], a[v, u, j]
    b0, b1, b2, b3 = b[y, x, j], b[y, u, j], b[v, x, j], b[v, u, j]
    for k in range(len(lead)):
        one = smaller(a0 - a[y, x, k], a1 - a[y, u, k])
        two = smaller(a2 - a[v, x, k], a3 - a[v, u, k])
        three = smaller(b0 - b[y, x, k], b1 - b[y, u, k])
        four = smaller(b2 - b[v, x, k], b3 - b[v, u, k])
        lead[k] = smaller(smaller(one, two), smaller(three, four))


@jit
def smallest_lead(a, b, j, k, cell):
    """Smallest lead of class j over class k at the eight corners of a cell."""
    lead = np.inf
    for y in cell.ys:
        for x in cell.xs:
            lead = min(lead, min(a[y, x, j] - a[y, x, k], b[y, x, j] - b[y, x, k]))
    return lead


@jit
def loses(k, j, lead, tolerance):
    """Whether class k can't win where class j is ahead by ``lead``: the rule of ``linear``."""
    return (k < j and lead > tolerance) or (k > j and lead >= 0.0)


@jit
def four_corners(label, lead, size, cell):
    """Their common label or -1, their smallest lead and their largest magnitude."""
    (y, v), (x, u) = cell.ys, cell.xs
    first = label[y, x]
    alike = first == label[y, u] and first == label[v, x] and first == label[v, u]
    return (
        np.int64(first) if alike else -1,
        min(min(lead[y, x], lead[y, u]), min(lead[v, x], lead[v, u])),
        max(max(size[y, x], size[y, u]), max(size[v, x], size[v, u])),
    )


@jit
def add_pivots(label, cell, pivots, count):
    """Append the labels at four corners that are new among ``count`` pivots; return the count."""
    for y in cell.ys:
        for x in cell.xs:
            at_corner, new = label[y, x], True
            for p in range(count):
                new = new and pivots[p] != at_corner
            if new:
                pivots[count] = at_corner
                count += 1
    return count


@jit
def possible_winners(a, b, pivots, pivot_count, cell, tolerance, lead, candidates):
    """Put the classes that can win over the pivots into ``candidates``; return their number.

    ``tolerance`` is the spacing of the rounded dtype at the cell's largest magnitude.
    """
    smallest_leads(a, b, pivots[0], cell, lead)
    count = 0
    for k in range(len(lead)):
        if not loses(k, pivots[0], lead[k], tolerance):
            candidates[count] = k
            count += 1
    for p in range(1, pivot_count):
        j, kept = pivots[p], 0
        for c in range(count):
            k = candidates[c]
            if not loses(k, j, smallest_lead(a, b, j, k, cell), tolerance):
                candidates[kept] = k
                kept += 1
        count = kept
    return count


@jit
def interpolated(corners, c, shape, weights):
    """Scipy's sum over ``corners[c]``: each times its three weights one by one, x fastest."""
    nz, ny, nx = shape
    total = 0.0
    n = 0
    for iz in range(nz):
        for iy in range(ny):
            for ix in range(nx):
                term = corners[c, n]
                if nz == 2:
                    term = term * weights.z[iz]
                if ny == 2:
                    term = term * weights.y[iy]
                if nx == 2:
                    term = term * weights.x[ix]
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
def exact_winner(corners, candidates, kept, shape, weights, rounding):
    """First maximum of the candidates, interpolated and rounded as scipy and nnU-Net do."""
    winner, best = 0, 0.0
    for c in range(kept):
        value = rounded(interpolated(corners, c, shape, weights), rounding)
        # The first NaN wins over all, as in torch's and NumPy's argmax.
        if c == 0 or (best == best and (value > best or value != value)):
            winner, best = candidates[c], value
    return winner


@functools.partial(jit, inline="always")  # a call would cost a tenth of the whole export
def first_of(on_line, candidates, count, corners, wx):
    """The first maximum of the candidates interpolated along x, and its lead over the others."""
    winner, best, second = 0, -np.inf, -np.inf
    for c in range(count):
        value = on_line[c, 0]
        if corners == 2:
            value = value * wx[0] + on_line[c, 1] * wx[1]
        if value > best:
            winner, second, best = candidates[c], best, value
        elif value > second:
            second = value
    return winner, best - second


@jit
def fill_box(out, y_start, y_stop, x_start, x_stop, label):
    """Set all slices of a box to a label; -1 leaves them unchanged."""
    if label >= 0:
        for row in range(out.shape[0]):
            for y in range(y_start, y_stop):
                out[row, y, x_start:x_stop] = label


@jit
def fill_labels(lower, upper, layer, rounding, out):
    """Fill the target slices of one layer of cells with the winning labels.

    ``lower`` and ``upper`` are the planes that the layer lies between.
    """
    a, label_a, lead_a, size_a = lower
    b, label_b, lead_b, size_b = upper
    shape, runs_y, runs_x, weights_z, weights_y, weights_x = layer
    nz, ny, nx = shape
    classes = a.shape[2]
    candidates = np.empty(classes, dtype=np.int64)
    leads = np.empty(classes, dtype=a.dtype)
    corners = np.empty((classes, nz * ny * nx), dtype=np.float64)
    on_plane = np.empty((classes, ny * nx), dtype=np.float64)
    on_line = np.empty((classes, nx), dtype=np.float64)
    pivots = np.empty(8, dtype=np.int64)
    for run_y in range(runs_y.shape[0]):
        y_start, y_stop = runs_y[run_y, 0], runs_y[run_y, 1]
        ys = (runs_y[run_y, 2], runs_y[run_y, 3])
        # Neighbouring cells that one label fills are filled together, when the label changes.
        alike, alike_from = -1, 0
        for run_x in range(runs_x.shape[0]):
            x_start, x_stop = runs_x[run_x, 0], runs_x[run_x, 1]
            cell = Cell(ys, (runs_x[run_x, 2], runs_x[run_x, 3]))
            common, lead, size = four_corners(label_a, lead_a, size_a, cell)
            common_above, lead_above, size_above = four_corners(label_b, lead_b, size_b, cell)
            lead, size = min(lead, lead_above), max(size, size_above)
            finite = math.isfinite(size)
            tolerance = spacing_at(size, rounding) if finite else np.inf
            if common >= 0 and common == common_above and lead > tolerance:
                candidates[0] = common
                kept = 1
            elif finite:
                count = add_pivots(label_a, cell, pivots, 0)
                count = add_pivots(label_b, cell, pivots, count)
                kept = possible_winners(a, b, pivots, count, cell, tolerance, leads, candidates)
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

            # Axis by axis needs an eighth of the operations of scipy's sum and differs from it in
            # the last bits of float64. A larger lead decides for both, rounding included.
            clear = tolerance + 1e-12 * size
            compared = kept if finite else 0
            for c in range(kept):
                take_corners(a, b, candidates[c], cell, shape, corners, c)
            for row in range(out.shape[0]):
                wz = (weights_z[0, row], weights_z[1, row])
                halve(corners, compared, ny * nx, wz, nz, on_plane)
                for y in range(y_start, y_stop):
                    wy = (weights_y[0, y], weights_y[1, y])
                    halve(on_plane, compared, nx, wy, ny, on_line)
                    for x in range(x_start, x_stop):
                        wx = (weights_x[0, x], weights_x[1, x])
                        winner, ahead = first_of(on_line, candidates, compared, nx, wx)
                        if not ahead > clear:
                            weights = Weights(wz, wy, wx)
                            winner = exact_winner(
                                corners, candidates, kept, shape, weights, rounding
                            )
                        out[row, y, x] = winner
        fill_box(out, y_start, y_stop, alike_from, out.shape[2], alike)


@jit
def fill_regions(lower, upper, regions, layer, rounding, out):
    """Like ``fill_labels`` for regions: paint each where its probability exceeds 0.5."""
    a, b = lower.logits, upper.logits
    labels, threshold = regions
    shape, runs_y, runs_x, weights_z, weights_y, weights_x = layer
    nz, ny, nx = shape
    corners = np.empty((1, nz * ny * nx), dtype=np.float64)
    for run_y in range(runs_y.shape[0]):
        y_start, y_stop = runs_y[run_y, 0], runs_y[run_y, 1]
        ys = (runs_y[run_y, 2], runs_y[run_y, 3])
        for run_x in range(runs_x.shape[0]):
            x_start, x_stop = runs_x[run_x, 0], runs_x[run_x, 1]
            cell = Cell(ys, (runs_x[run_x, 2], runs_x[run_x, 3]))
            fill_box(out, y_start, y_stop, x_start, x_stop, 0)
            for k in range(a.shape[2]):
                take_corners(a, b, k, cell, shape, corners, 0)
                above = below = 0
                for n in range(corners.shape[1]):
                    value = corners[0, n]
                    above += math.isfinite(value) and value >= threshold
                    below += math.isfinite(value) and value < threshold
                if above == corners.shape[1]:
                    fill_box(out, y_start, y_stop, x_start, x_stop, labels[k])
                elif below < corners.shape[1]:
                    for row in range(out.shape[0]):
                        wz = (weights_z[0, row], weights_z[1, row])
                        for y in range(y_start, y_stop):
                            wy = (weights_y[0, y], weights_y[1, y])
                            for x in range(x_start, x_stop):
                                weights = Weights(wz, wy, (weights_x[0, x], weights_x[1, x]))
                                value = rounded(interpolated(corners, 0, shape, weights), rounding)
                                if value >= threshold:
                                    out[row, y, x] = labels[k]
