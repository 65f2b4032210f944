"""What compiled layers are called with: addresses and sizes."""

from __future__ import annotations

from typing import NamedTuple

from totalfast.system.loops import jit

PIECES = 256
"""Number of pieces into which a layer's work is divided, at most."""


class Source(NamedTuple):
    """Features that a layer reads: channels last, normalised and rectified while they are read."""

    data: int
    """Address of float32 (z, y, x, channels)."""
    normalisation: int
    """Address of float32 (3, channels): what is subtracted, the factor, and what is added."""
    channels: int
    """Number of channels, with those that fill the last vector."""
    slope: float
    """Of the leaky ReLU; 1 for none."""


class Shape(NamedTuple):
    """Numbers of voxels."""

    z: int
    y: int
    x: int


class Target(NamedTuple):
    """What a layer writes: its weighted sums, without bias."""

    data: int
    """Address of float32 (z, y, x, channels)."""
    sums: int
    """Address of float64 (PIECES, 2, channels): sums of the values and of their squares are added
    to those of the piece that is in work, so that the sums do not depend on the threads."""
    channels: int
    weights: int
    """Address of the weights, in the order of the layer's kind."""


class Work(NamedTuple):
    """What belongs to the threads of a layer."""

    counter: int
    """Address of an integer, the number of the next piece of work for all threads."""
    scratch: int
    """Address of this thread's scratch memory."""


@jit
def rows_in_piece(rows: int) -> int:
    """Return the number of rows of voxels in a piece of work."""
    return (rows + PIECES - 1) // PIECES
