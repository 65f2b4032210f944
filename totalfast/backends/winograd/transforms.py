"""Winograd's convolution F(4x4x4, 3x3x3): 216 products for 64 voxels, instead of 1,728.

A. Lavin and S. Gray, Fast Algorithms for Convolutional Neural Networks, CVPR 2016, for two axes;
here for three. Each of the transforms acts on one axis after the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from totalfast.backends.winograd.products import BLOCK
from totalfast.system.loops import jit

if TYPE_CHECKING:
    from numpy.typing import NDArray

TILE, WINDOW = 4, 6
"""Voxels along each axis that are computed together, and that are read for them."""

PLANE, POINTS = WINDOW**2, WINDOW**3

KERNEL = np.array(
    [
        [1 / 4, 0, 0],
        [-1 / 6, -1 / 6, -1 / 6],
        [-1 / 6, 1 / 6, -1 / 6],
        [1 / 24, 1 / 12, 1 / 6],
        [1 / 24, -1 / 12, 1 / 6],
        [0, 0, 1],
    ]
)
"""Transform of a kernel along one axis: G."""


def transform_kernel(weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """Transform a kernel once, in float64.

    Parameters
    ----------
    weight
        (outputs, inputs, 3, 3, 3); the outputs fill whole blocks.

    Returns
    -------
        (blocks of outputs, 216, inputs, ``BLOCK``).
    """
    outputs, inputs = weight.shape[:2]
    wide = weight.astype(np.float64)
    for _ in range(3):  # the first axis becomes the last one
        wide = np.moveaxis(np.tensordot(KERNEL, wide, axes=(1, 2)), 0, -1)
    points = wide.reshape(outputs // BLOCK, BLOCK, inputs, POINTS)
    return np.ascontiguousarray(points.transpose(0, 3, 2, 1), dtype=np.float32)


@jit
def to_points(d0, d1, d2, d3, d4, d5):
    """Transform six voxels along one axis: B transposed."""
    even, odd = d4 - d2 * 4, d3 - d1 * 4
    far, near = d4 - d2, (d3 - d1) * 2
    return (
        d0 * 4 - d2 * 5 + d4,
        even + odd,
        even - odd,
        far + near,
        far - near,
        d1 * 4 - d3 * 5 + d5,
    )


@jit
def from_points(m0, m1, m2, m3, m4, m5):
    """Transform six points back to four voxels along one axis: A transposed."""
    sum_1, difference_1 = m1 + m2, m1 - m2
    sum_2, difference_2 = m3 + m4, m3 - m4
    return (
        m0 + sum_1 + sum_2,
        difference_1 + difference_2 * 2,
        sum_1 + sum_2 * 4,
        difference_1 + difference_2 * 8 + m5,
    )
