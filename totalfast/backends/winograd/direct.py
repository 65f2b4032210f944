"""Convolutions of any stride and kernel as matrix products, compiled, for several threads.

A thread takes a row of the output: it copies the rows of the input that this needs, normalised and
rectified and with zeros around the image, and multiplies them with the weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from totalfast.backends.winograd.layers import Shape, rows_in_piece
from totalfast.backends.winograd.products import BLOCK, in_blocks, multiply
from totalfast.backends.winograd.vectors import (
    DOUBLE_BYTES,
    FLOAT_BYTES,
    LANES,
    add_moments,
    copy_number,
    fetch,
    load,
    load_normalisation,
    rectified,
    store,
    take_number,
    zeros,
)
from totalfast.system.loops import jit

if TYPE_CHECKING:
    from numpy.typing import NDArray

CACHED_WEIGHTS = 1 << 19
"""Bytes of weights up to which a row is computed for all outputs at once. Otherwise all rows are
computed for one block of outputs, so that its weights stay in the cache."""

FINISHED = 4096
"""Voxels that a thread finishes at a time."""


class Window(NamedTuple):
    """Kernel, stride and padding of a convolution."""

    kernel: Shape
    stride: Shape
    padding: Shape


def direct_weights(weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """Order a kernel for ``convolve``.

    Parameters
    ----------
    weight
        (outputs, inputs, z, y, x).

    Returns
    -------
        (z, y, x, inputs, outputs), in the blocks of ``in_blocks``.
    """
    return in_blocks(weight.transpose(2, 3, 4, 1, 0))


def transposed_weights(weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """Order the kernel of a transposed convolution, whose stride is its size, for ``enlarge``.

    Parameters
    ----------
    weight
        (inputs, outputs, z, y, x).

    Returns
    -------
        For each voxel of the kernel (inputs, outputs), in the blocks of ``in_blocks``.
    """
    taps = weight.reshape(*weight.shape[:2], -1).transpose(2, 0, 1)
    return np.concatenate([in_blocks(tap) for tap in taps])


@jit
def convolve(shape, source, second, new_shape, target, window, work):
    """Convolve one or two sources, which have their channels one after the other.

    Parameters
    ----------
    shape, new_shape
        Of the sources, and of the target.
    source, second
        Sources; ``second`` has no channels if there is one only.
    target
        Its weights are those of ``direct_weights``, for both sources together.
    window
        Kernel and stride.
    work
        The counter starts at zero. The scratch memory holds ``scratch_floats``.
    """
    inputs = source.channels + second.channels
    kernel = window.kernel
    taps = kernel.z * kernel.y * kernel.x
    block_bytes = taps * inputs * BLOCK * FLOAT_BYTES
    blocks = (target.channels + BLOCK - 1) // BLOCK
    together = blocks if blocks * block_bytes <= CACHED_WEIGHTS else 1
    rows = new_shape.z * new_shape.y
    length = shape.x + 2 * window.padding.x
    total = rows * (blocks // together)
    size = rows_in_piece(total)
    while True:
        piece = take_number(work.counter)
        if piece * size >= total:
            return
        sums = target.sums + piece * 2 * target.channels * DOUBLE_BYTES
        for number in range(piece * size, min((piece + 1) * size, total)):
            block, row = number // rows * together, number % rows
            _copy_lines(shape, source, second, row // new_shape.y, row % new_shape.y, window, work)
            for which in range(block, block + together):
                here = (row * new_shape.x * target.channels + which * BLOCK) * FLOAT_BYTES
                columns = min(BLOCK, target.channels - which * BLOCK)
                segment_bytes = kernel.x * inputs * columns * FLOAT_BYTES
                for part in range(kernel.z * kernel.y):
                    multiply(
                        work.scratch + part * length * inputs * FLOAT_BYTES,
                        window.stride.x * inputs * FLOAT_BYTES,
                        target.weights + which * block_bytes + part * segment_bytes,
                        target.data + here,
                        target.channels * FLOAT_BYTES,
                        new_shape.x,
                        columns,
                        kernel.x * inputs,
                        part == 0,
                    )
                _add_to_sums(target, here, new_shape.x, which * BLOCK, columns, sums)


@jit
def _copy_lines(shape, source, second, row, line, window, work):
    """Copy the lines of the input that a row of the output needs."""
    kernel = window.kernel
    inputs = source.channels + second.channels
    around = window.padding
    length = shape.x + 2 * around.x
    for part in range(kernel.z * kernel.y):
        place = work.scratch + part * length * inputs * FLOAT_BYTES
        z = row * window.stride.z + part // kernel.y - around.z
        y = line * window.stride.y + part % kernel.y - around.y
        is_inside = 0 <= z < shape.z and 0 <= y < shape.y
        _copy(shape, source, z, y, is_inside, around.x, place, inputs)
        if second.channels:
            there = place + source.channels * FLOAT_BYTES
            _copy(shape, second, z, y, is_inside, around.x, there, inputs)


def scratch_floats(width: int, window: Window, inputs: int) -> int:
    """Return the size of a thread's scratch memory for ``convolve``, for rows of ``width``."""
    return window.kernel.z * window.kernel.y * (width + 2 * window.padding.x) * inputs


@jit
def _copy(shape, source, z, y, is_inside, around, place, stride):
    """Copy a line, normalised and rectified, with zeros at both ends."""
    data = source.data + (z * shape.y + y) * shape.x * source.channels * FLOAT_BYTES
    for channel in range(0, source.channels, LANES):
        mean, factor, shift = load_normalisation(source, channel)
        for x in range(-around, shape.x + around):
            voxel = fetch(
                data + (x * source.channels + channel) * FLOAT_BYTES,
                is_inside and 0 <= x < shape.x,
                mean,
                factor,
                shift,
                source.slope,
            )
            store(place + ((x + around) * stride + channel) * FLOAT_BYTES, voxel)


@jit
def _add_to_sums(target, here, length, channel, channels, all_sums):
    """Add a line of a block of channels to the sums, four voxels at a time."""
    step = target.channels * FLOAT_BYTES
    for vector in range(0, channels, LANES):
        address = target.data + here + vector * FLOAT_BYTES
        sums = all_sums + (channel + vector) * DOUBLE_BYTES
        squares = sums + target.channels * DOUBLE_BYTES
        for x in range(0, length, 4):
            place = address + x * step
            b = load(place + step) if x + 1 < length else zeros()
            c = load(place + 2 * step) if x + 2 < length else zeros()
            d = load(place + 3 * step) if x + 3 < length else zeros()
            add_moments(sums, squares, load(place), b, c, d)


@jit
def convolve_image(shape, image, channels, terms, new_shape, target, window, work):
    """Convolve the image itself, which has few channels: all values of a row's windows are listed.

    Parameters
    ----------
    shape, new_shape, target, window, work
        As for ``convolve``. The scratch memory holds ``terms`` for each voxel of a row.
    image
        Address of float32 (channels, z, y, x).
    channels
        Number of channels.
    terms
        Channels times voxels of the kernel.
    """
    rows = new_shape.z * new_shape.y
    size = rows_in_piece(rows)
    while True:
        piece = take_number(work.counter)
        if piece * size >= rows:
            return
        sums = target.sums + piece * 2 * target.channels * DOUBLE_BYTES
        for row in range(piece * size, min((piece + 1) * size, rows)):
            z, y = row // new_shape.y, row % new_shape.y
            _list_windows(shape, image, channels, terms, z, y, new_shape.x, window, work)
            for column in range(0, target.channels, BLOCK):
                here = (row * new_shape.x * target.channels + column) * FLOAT_BYTES
                columns = min(BLOCK, target.channels - column)
                multiply(
                    work.scratch,
                    terms * FLOAT_BYTES,
                    target.weights + column * terms * FLOAT_BYTES,
                    target.data + here,
                    target.channels * FLOAT_BYTES,
                    new_shape.x,
                    columns,
                    terms,
                    True,
                )
                _add_to_sums(target, here, new_shape.x, column, columns, sums)


@jit
def _list_windows(shape, image, channels, terms, row, line, length, window, work):
    """List the values of the windows of a row of the output, with zeros outside of the image."""
    kernel, stride, around = window.kernel, window.stride, window.padding
    term = 0
    for part in range(kernel.z * kernel.y * kernel.x):
        z = row * stride.z + part // (kernel.y * kernel.x) - around.z
        y = line * stride.y + part // kernel.x % kernel.y - around.y
        first = part % kernel.x - around.x
        is_inside = 0 <= z < shape.z and 0 <= y < shape.y
        for channel in range(channels):
            data = image + ((channel * shape.z + z) * shape.y + y) * shape.x * FLOAT_BYTES
            for number in range(length):
                x = number * stride.x + first
                copy_number(
                    data + x * FLOAT_BYTES,
                    is_inside and 0 <= x < shape.x,
                    work.scratch + (number * terms + term) * FLOAT_BYTES,
                )
            term += 1


@jit
def enlarge(shape, source, target, stride, work):
    """Convolve transposed, with a kernel of the size of the stride: each voxel becomes a block.

    Parameters
    ----------
    shape
        Of the source; the target has ``stride`` times as many voxels along each axis.
    source, target, work
        As for ``convolve``; the weights are those of ``transposed_weights``. No sums are added.
    stride
        Voxels along each axis.
    """
    rows = shape.z * shape.y
    width = shape.x * stride.x
    column_bytes = source.channels * FLOAT_BYTES
    while True:
        row = take_number(work.counter)
        if row >= rows:
            return
        z, y = row // shape.y, row % shape.y
        _copy(shape, source, z, y, True, 0, work.scratch, source.channels)
        for part in range(stride.z * stride.y):
            line = (z * stride.z + part // stride.y) * shape.y * stride.y
            line += y * stride.y + part % stride.y
            for tap in range(stride.x):
                for block in range(0, target.channels, BLOCK):
                    voxel = (line * width + tap) * target.channels + block
                    before = (part * stride.x + tap) * target.channels + block
                    multiply(
                        work.scratch,
                        source.channels * FLOAT_BYTES,
                        target.weights + before * column_bytes,
                        target.data + voxel * FLOAT_BYTES,
                        stride.x * target.channels * FLOAT_BYTES,
                        shape.x,
                        min(BLOCK, target.channels - block),
                        source.channels,
                        True,
                    )


@jit
def add(voxels, first, second, slope, work):
    """Add features to others, in place, and rectify the sums.

    Parameters
    ----------
    voxels
        Number of voxels.
    first, second
        What is added; the sums take the place of the first.
    slope
        Of the leaky ReLU behind the sums.
    work
        The counter starts at zero.
    """
    while True:
        start = take_number(work.counter) * FINISHED
        if start >= voxels:
            return
        for channel in range(0, first.channels, LANES):
            mean, factor, shift = load_normalisation(first, channel)
            other_mean, other_factor, other_shift = load_normalisation(second, channel)
            for voxel in range(start, min(start + FINISHED, voxels)):
                offset = (voxel * first.channels + channel) * FLOAT_BYTES
                one = fetch(first.data + offset, True, mean, factor, shift, first.slope)
                other = fetch(
                    second.data + offset, True, other_mean, other_factor, other_shift, second.slope
                )
                store(first.data + offset, rectified(one + other, slope))


@jit
def finish(voxels, source, work):
    """Normalise and rectify features in place, some thousand voxels at a time."""
    while True:
        start = take_number(work.counter) * FINISHED
        if start >= voxels:
            return
        for voxel in range(start, min(start + FINISHED, voxels)):
            for channel in range(0, source.channels, LANES):
                mean, factor, shift = load_normalisation(source, channel)
                address = source.data + (voxel * source.channels + channel) * FLOAT_BYTES
                store(address, fetch(address, True, mean, factor, shift, source.slope))
