"""A 3x3x3 convolution of stride 1 by Winograd's method, compiled, for several threads.

A thread takes a row of some tiles of 4x4x4 voxels, transforms their windows, multiplies the 216
points of each with the transformed kernel, and transforms back. What is between these steps stays
in the processor's second-level cache.
"""

from __future__ import annotations

from totalfast.backends.winograd.layers import rows_in_piece
from totalfast.backends.winograd.products import BLOCK, multiply
from totalfast.backends.winograd.transforms import (
    PLANE,
    POINTS,
    TILE,
    WINDOW,
    from_points,
    to_points,
)
from totalfast.backends.winograd.vectors import (
    DOUBLE_BYTES,
    FLOAT_BYTES,
    LANES,
    VECTOR_BYTES,
    add_moments,
    fetch,
    load,
    load_normalisation,
    store,
    take_number,
    zeros,
)
from totalfast.system.loops import jit

GAP_BYTES = 64
"""Between the values of two points, so that their addresses do not fall on the same cache lines."""

CACHE_BYTES = 1 << 20
"""Of the second-level cache."""


def tiles_at_a_time(inputs: int, outputs: int) -> int:
    """Number of tiles that a thread has in work: fewer, if there are many channels."""
    many = POINTS * 16 * (inputs + outputs) * FLOAT_BYTES <= CACHE_BYTES
    return 16 if many else 8


def scratch_floats(inputs: int, outputs: int, tiles: int) -> int:
    """Return the size of a thread's scratch memory."""
    gap = GAP_BYTES // FLOAT_BYTES
    points = POINTS * (tiles * (inputs + outputs) + 2 * gap)
    columns = PLANE * LANES * (1 + TILE * tiles + 2)
    back = LANES * (PLANE * TILE + TILE * WINDOW)
    return points + max(columns, back) + gap


@jit
def convolve(shape, first, second, target, work, tiles):
    """Convolve one or two sources, which have their channels one after the other.

    Parameters
    ----------
    shape
        Of sources and target.
    first, second
        Sources; ``second`` has no channels if there is one only.
    target
        Its weights are those of ``transform_kernel`` for the first source, then for the second.
    work
        The counter starts at zero.
    tiles
        Of ``tiles_at_a_time``.
    """
    inputs = max(first.channels, second.channels)
    columns = BLOCK if second.channels == 0 else target.channels
    point_bytes = tiles * inputs * FLOAT_BYTES + GAP_BYTES
    result_bytes = tiles * columns * FLOAT_BYTES + GAP_BYTES
    results = work.scratch + POINTS * point_bytes
    scratch = results + POINTS * result_bytes
    second_weights = target.weights + POINTS * first.channels * target.channels * FLOAT_BYTES
    rows, across = _tiles(shape.y), -(-_tiles(shape.x) // tiles)
    total = _tiles(shape.z) * rows * across
    size = rows_in_piece(total)
    while True:
        piece = take_number(work.counter)
        if piece * size >= total:
            return
        sums = target.sums + piece * 2 * target.channels * DOUBLE_BYTES
        for number in range(piece * size, min((piece + 1) * size, total)):
            z, y = number // (across * rows) * TILE, number // across % rows * TILE
            start = number % across * tiles
            count = min(tiles, _tiles(shape.x) - start)
            corner = (z, y, start * TILE)
            for is_second in range(2 if second.channels else 1):
                source = second if is_second else first
                source_weights = second_weights if is_second else target.weights
                _windows(shape, source, corner, count, work.scratch, point_bytes, scratch)
                for column in range(0, target.channels, BLOCK):
                    place = results + column % columns * FLOAT_BYTES
                    weights = source_weights + column * POINTS * source.channels * FLOAT_BYTES
                    width = min(BLOCK, target.channels - column)
                    _multiply_points(
                        work.scratch, point_bytes, source.channels, weights, place, result_bytes,
                        columns, width, count, not is_second,
                    )  # fmt: skip
                    if is_second or second.channels == 0:
                        _voxels(
                            shape, target, corner, column, width, count, place, result_bytes,
                            columns, scratch, sums,
                        )  # fmt: skip


@jit
def _tiles(voxels):
    return (voxels + TILE - 1) // TILE


@jit
def _windows(shape, source, corner, tiles, points, point_bytes, scratch):
    """Read the windows of a row of tiles, normalise and rectify them, and transform them."""
    z, y, x = corner
    line_bytes = shape.x * source.channels * FLOAT_BYTES
    slice_bytes = shape.y * line_bytes
    length = TILE * tiles + 2
    point = length * VECTOR_BYTES
    is_inner = z > 0 and z + TILE < shape.z and y > 0 and y + TILE < shape.y
    for channel in range(0, source.channels, LANES):
        mean, factor, shift = load_normalisation(source, channel)
        for column in range(length):
            here = scratch + PLANE * VECTOR_BYTES + column * VECTOR_BYTES
            across = x + column - 1
            if not 0 <= across < shape.x:
                for number in range(PLANE):
                    store(here + number * point, zeros())
                continue
            corner_address = (
                source.data
                + (z - 1) * slice_bytes
                + (y - 1) * line_bytes
                + (across * source.channels + channel) * FLOAT_BYTES
            )
            for row in range(WINDOW):
                address = corner_address + row * line_bytes
                is_row = is_inner or 0 <= y + row - 1 < shape.y
                p0, p1, p2, p3, p4, p5 = to_points(
                    fetch(address, is_row and z > 0, mean, factor, shift, source.slope),
                    fetch(address + slice_bytes, is_row, mean, factor, shift, source.slope),
                    fetch(address + 2 * slice_bytes, is_row and (is_inner or z + 1 < shape.z),
                          mean, factor, shift, source.slope),
                    fetch(address + 3 * slice_bytes, is_row and (is_inner or z + 2 < shape.z),
                          mean, factor, shift, source.slope),
                    fetch(address + 4 * slice_bytes, is_row and (is_inner or z + 3 < shape.z),
                          mean, factor, shift, source.slope),
                    fetch(address + 5 * slice_bytes, is_row and (is_inner or z + 4 < shape.z),
                          mean, factor, shift, source.slope),
                )  # fmt: skip
                place = scratch + row * VECTOR_BYTES
                _store(place, WINDOW * VECTOR_BYTES, p0, p1, p2, p3, p4, p5)
            for number in range(WINDOW):
                place = scratch + number * WINDOW * VECTOR_BYTES
                p0, p1, p2, p3, p4, p5 = to_points(*_load(place, VECTOR_BYTES))
                _store(here + number * WINDOW * point, point, p0, p1, p2, p3, p4, p5)
        for number in range(PLANE):
            line = scratch + PLANE * VECTOR_BYTES + number * point
            place = points + number * WINDOW * point_bytes + channel * FLOAT_BYTES
            for tile in range(tiles):
                voxels = _load(line + tile * TILE * VECTOR_BYTES, VECTOR_BYTES)
                p0, p1, p2, p3, p4, p5 = to_points(*voxels)
                there = place + tile * source.channels * FLOAT_BYTES
                _store(there, point_bytes, p0, p1, p2, p3, p4, p5)


@jit
def _load(address, step):
    return (
        load(address),
        load(address + step),
        load(address + 2 * step),
        load(address + 3 * step),
        load(address + 4 * step),
        load(address + 5 * step),
    )


@jit
def _store(address, step, p0, p1, p2, p3, p4, p5):
    store(address, p0)
    store(address + step, p1)
    store(address + 2 * step, p2)
    store(address + 3 * step, p3)
    store(address + 4 * step, p4)
    store(address + 5 * step, p5)


@jit
def _multiply_points(
    points, point_bytes, inputs, weights, results, result_bytes, columns, width, tiles, is_first
):
    for number in range(POINTS):
        multiply(
            points + number * point_bytes,
            inputs * FLOAT_BYTES,
            weights + number * inputs * width * FLOAT_BYTES,
            results + number * result_bytes,
            columns * FLOAT_BYTES,
            tiles,
            width,
            inputs,
            is_first,
        )


@jit
def _voxels(
    shape, target, corner, column, width, tiles, results, result_bytes, columns, scratch, all_sums
):
    """Transform a row of tiles back, write its voxels, and add to the sums."""
    z, y, x = corner
    line_bytes = shape.x * target.channels * FLOAT_BYTES
    slice_bytes = shape.y * line_bytes
    slices, rows = min(TILE, shape.z - z), min(TILE, shape.y - y)
    for tile in range(tiles):
        for channel in range(0, width, LANES):
            result = results + (tile * columns + channel) * FLOAT_BYTES
            for number in range(PLANE):
                here = result + number * WINDOW * result_bytes
                a, b, c, d = from_points(*_load(here, result_bytes))
                place = scratch + number * VECTOR_BYTES
                store(place, a)
                store(place + PLANE * VECTOR_BYTES, b)
                store(place + 2 * PLANE * VECTOR_BYTES, c)
                store(place + 3 * PLANE * VECTOR_BYTES, d)
            first = x + tile * TILE
            sums = all_sums + (column + channel) * DOUBLE_BYTES
            for across in range(min(TILE, shape.x - first)):
                _plane(scratch, across)
                address = (
                    target.data
                    + z * slice_bytes
                    + y * line_bytes
                    + ((first + across) * target.channels + column + channel) * FLOAT_BYTES
                )
                for number in range(slices):
                    place = scratch + (TILE * PLANE + number * WINDOW) * VECTOR_BYTES
                    a, b, c, d = from_points(*_load(place, VECTOR_BYTES))
                    _write_line(
                        address + number * slice_bytes, line_bytes, rows, a, b, c, d,
                        sums, sums + target.channels * DOUBLE_BYTES,
                    )  # fmt: skip


@jit
def _plane(scratch, across):
    """Transform a plane of points back along z."""
    for row in range(WINDOW):
        place = scratch + (across * PLANE + row) * VECTOR_BYTES
        a, b, c, d = from_points(*_load(place, WINDOW * VECTOR_BYTES))
        there = scratch + (TILE * PLANE + row) * VECTOR_BYTES
        store(there, a)
        store(there + WINDOW * VECTOR_BYTES, b)
        store(there + 2 * WINDOW * VECTOR_BYTES, c)
        store(there + 3 * WINDOW * VECTOR_BYTES, d)


@jit
def _write_line(address, step, count, a, b, c, d, sums, squares):
    """Write up to four voxels along y, and add to the sums."""
    b = b if count > 1 else zeros()
    c = c if count > 2 else zeros()
    d = d if count > 3 else zeros()
    add_moments(sums, squares, a, b, c, d)
    store(address, a)
    if count > 1:
        store(address + step, b)
    if count > 2:
        store(address + 2 * step, c)
    if count > 3:
        store(address + 3 * step, d)
