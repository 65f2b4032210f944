"""The data that the compiled loops of ``cells`` work on.

Named tuples, because numba compiles them to plain arguments.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import DTypeLike, NDArray


class Plane(NamedTuple):
    """One source slice: its logits, and the numbers per voxel that decide most cells."""

    logits: NDArray[Any]
    """float32 or float64, (y, x, classes)."""
    label: NDArray[np.uint16]
    """First maximum, (y, x)."""
    lead: NDArray[Any]
    """Maximum minus the largest logit of the smaller labels; infinite for label 0."""
    magnitude: NDArray[Any]
    """Largest absolute logit."""

    @classmethod
    def empty(cls, classes: int, shape: Sequence[int], dtype: DTypeLike) -> Plane:
        """Allocate the arrays for a slice of a (y, x) shape."""
        return cls(
            logits=np.empty((*shape, classes), dtype),
            label=np.empty(shape, np.uint16),
            lead=np.empty(shape, dtype),
            magnitude=np.empty(shape, dtype),
        )


class Layer(NamedTuple):
    """The cells between two source slices, and the target voxels in them."""

    corners: tuple[int, int, int]
    """Corners of a cell along (z, y, x): 1 if only the lower neighbour counts, otherwise 2."""
    runs_y: NDArray[np.intp]
    """(cells, 4): for each run of target rows with the same neighbours the first row, the last
    row + 1, and the lower and upper source row; both are the lower one if only that counts."""
    runs_x: NDArray[np.intp]
    """The same along x."""
    weights_z: NDArray[np.float64]
    """(target slices, 2): weights of the lower and the upper neighbour."""
    weights_y: NDArray[np.float64]
    weights_x: NDArray[np.float64]


class Rounding(NamedTuple):
    """The dtype that interpolated logits are rounded to."""

    bits: int
    """Stored bits of the mantissa."""
    lowest: int
    """Smallest exponent of a normal number."""


class Regions(NamedTuple):
    """The channels of a region-based model."""

    labels: NDArray[np.uint16]
    """Label of each channel, in the order in which they are painted."""
    threshold: float
    """Smallest logit that is inside a region."""


class Cell(NamedTuple):
    """The corners of one cell in the source slices."""

    ys: tuple[int, int]
    """Lower and upper source row."""
    xs: tuple[int, int]
    """Lower and upper source column."""


class Weights(NamedTuple):
    """Weights of the lower and upper neighbour of one target voxel along each axis."""

    z: tuple[float, float]
    y: tuple[float, float]
    x: tuple[float, float]
