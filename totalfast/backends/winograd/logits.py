"""Weighted logits of the last layer, added to float16 sums, compiled, for several threads."""

from __future__ import annotations

from typing import NamedTuple

from totalfast.backends.winograd.products import BLOCK, multiply
from totalfast.backends.winograd.vectors import (
    FLOAT_BYTES,
    HALF_BYTES,
    LANES,
    add_to_half,
    add_to_halves,
    copy_number,
    repeated,
    store,
    take_number,
)
from totalfast.system.loops import jit


class Call(NamedTuple):
    """Addresses and strides in bytes, of (z, y, x) where nothing else is said."""

    shape: tuple[int, int, int]
    terms: int
    """Number of features."""
    classes: int
    layer: int
    """float32, (classes, features)."""
    bias: int
    """float32, (classes,)."""
    features: int
    feature_strides: tuple[int, int, int]
    sums: int
    sum_strides: tuple[int, int, int]
    """Of (classes, z, y)."""
    weights: int
    weight_strides: tuple[int, int, int]


def scratch_floats(width: int, terms: int, classes: int) -> int:
    """Return the size of a thread's scratch memory for ``add_logits``."""
    return BLOCK * terms + classes * -(-width // BLOCK) * BLOCK


@jit
def add_logits(call, work):
    """Add the logits of all voxels; a thread takes a row along x."""
    depth, height, width = call.shape
    logits = work.scratch + BLOCK * call.terms * FLOAT_BYTES
    length_bytes = (width + BLOCK - 1) // BLOCK * BLOCK * FLOAT_BYTES
    while True:
        row = take_number(work.counter)
        if row >= depth * height:
            return
        z, y = row // height, row % height
        features = call.features + z * call.feature_strides[0] + y * call.feature_strides[1]
        sums = call.sums + z * call.sum_strides[1] + y * call.sum_strides[2]
        weights = call.weights + z * call.weight_strides[0] + y * call.weight_strides[1]
        for x in range(0, width, BLOCK):
            here = features + x * call.feature_strides[2]
            for term in range(call.terms):
                for voxel in range(min(BLOCK, width - x)):
                    copy_number(
                        here + voxel * call.feature_strides[2] + term * FLOAT_BYTES,
                        True,
                        work.scratch + (term * BLOCK + voxel) * FLOAT_BYTES,
                    )
            there = logits + x * FLOAT_BYTES
            for number in range(call.classes):
                for vector in range(0, BLOCK, LANES):
                    bias = repeated(call.bias + number * FLOAT_BYTES)
                    store(there + number * length_bytes + vector * FLOAT_BYTES, bias)
            multiply(
                call.layer,
                call.terms * FLOAT_BYTES,
                work.scratch,
                there,
                length_bytes,
                call.classes,
                BLOCK,
                call.terms,
                False,
            )
        for number in range(call.classes):
            line = logits + number * length_bytes
            _add_line(sums + number * call.sum_strides[0], weights, line, width)


@jit
def _add_line(sums, weights, logits, count):
    voxel = 0
    while voxel + LANES <= count:
        place = voxel * HALF_BYTES
        add_to_halves(sums + place, weights + place, logits + voxel * FLOAT_BYTES)
        voxel += LANES
    while voxel < count:
        place = voxel * HALF_BYTES
        add_to_half(sums + place, weights + place, logits + voxel * FLOAT_BYTES)
        voxel += 1
