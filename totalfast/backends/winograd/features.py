"""Features between layers: their memory, and the normalisation with which they are read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from totalfast.backends.winograd.layers import Shape, Source
from totalfast.backends.winograd.products import NARROW

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from totalfast.backends.winograd.network import Normalisation


def padded(channels: int) -> int:
    """Return the number of channels with those that fill the last block."""
    return -(-channels // NARROW) * NARROW


def with_zeros(array: NDArray[np.float32], sizes: dict[int, int]) -> NDArray[np.float32]:
    """Append zeros along axes (axis to its new size)."""
    widths = [(0, sizes.get(axis, size) - size) for axis, size in enumerate(array.shape)]
    return np.pad(array, widths)


@dataclass(slots=True, eq=False)
class Features:
    """Values of a layer, channels last, before normalisation and leaky ReLU.

    Parameters
    ----------
    shape
        Numbers of voxels.
    count
        Number of channels; the last block is filled with zeros.
    slope
        Of the leaky ReLU with which they are read.
    """

    shape: Shape
    count: int
    slope: float
    normalisation: NDArray[np.float32] = field(init=False)
    """(3, channels): what is subtracted, the factor, and what is added."""
    place: int = -1
    """Number of the piece of memory."""

    def __post_init__(self) -> None:
        self.normalisation = np.zeros((3, padded(self.count)), dtype=np.float32)
        self.normalisation[1] = 1.0

    @property
    def channels(self) -> int:
        """Number of channels, with those that fill the last block."""
        return int(self.normalisation.shape[1])

    @property
    def size(self) -> int:
        """Number of float32."""
        return int(np.prod(self.shape)) * self.channels

    def source(self, memory: Sequence[NDArray[np.float32]]) -> Source:
        """Return what a layer reads."""
        return Source(
            data=memory[self.place].ctypes.data,
            normalisation=self.normalisation.ctypes.data,
            channels=self.channels,
            slope=self.slope,
        )

    def normalise(self, how: Normalisation, sums: NDArray[np.float64]) -> None:
        """Set the normalisation from the sums (2, channels) of the values and their squares.

        The convolution's bias is not in the values: a normalisation would subtract it again.
        """
        mean, mean_of_squares = sums / np.prod(self.shape)
        variance = np.maximum(mean_of_squares - mean * mean, 0.0)
        scale = 1.0 / np.sqrt(variance + how.eps)
        self.normalisation[0] = mean
        self.normalisation[1, : self.count] = how.weight * scale[: self.count]
        self.normalisation[2, : self.count] = how.bias


NOTHING = Source(data=0, normalisation=0, channels=0, slope=1.0)
"""Stands for a second source where there is none."""


class Use(NamedTuple):
    """Features, and how long they are in use."""

    features: Features
    last: int
    """Number of the last ones that are computed from them."""
    replaced: Features | None = None
    """Others, whose memory they take."""


def assign_places(uses: Sequence[Use]) -> list[int]:
    """Give features that are in use at the same time different pieces of memory.

    Parameters
    ----------
    uses
        In the order in which the features are computed.

    Returns
    -------
        The number of float32 of each piece.
    """
    sizes: list[int] = []
    used_until: list[int] = []
    for number, (each, last_use, replaced) in enumerate(uses):
        if replaced is not None:
            each.place = replaced.place
            used_until[each.place] = last_use
            continue
        free = [place for place, until in enumerate(used_until) if until < number]
        fitting = [place for place in free if sizes[place] >= each.size]
        if fitting:
            each.place = min(fitting, key=sizes.__getitem__)
        elif free:
            each.place = max(free, key=sizes.__getitem__)
            sizes[each.place] = each.size
        else:
            each.place = len(sizes)
            sizes.append(each.size)
            used_until.append(-1)
        used_until[each.place] = last_use
    return sizes
