"""Winograd's convolution F(4x4x4, 3x3x3): 216 products for 64 voxels, instead of 1,728.

A. Lavin and S. Gray, Fast Algorithms for Convolutional Neural Networks, CVPR 2016, for two axes;
here for three. Each of the transforms acts on one axis after the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from totalfast.backends.winograd.products import in_blocks
from totalfast.system.loops import jit

if TYPE_CHECKING:
    from numpy.typing import NDArray

TILE, WINDOW = 4, 6
"""Voxels along each axis that are computed together, and that are read for them."""

PLANE, POINTS = WINDOW**2, WINDOW**3

NEAR, FAR = 0.625, 1.5
"""The points are 0, these two and their negatives, and infinity. With the usual points 0, 1, 2 the
largest error of a layer is nine times as large, and the mean error three times. These numbers and
their products that are needed are exact in float32."""

NEAR_2, FAR_2, NEAR_3, FAR_3 = NEAR**2, FAR**2, NEAR**3, FAR**3
BOTH_2, SUM_2 = NEAR_2 * FAR_2, NEAR_2 + FAR_2


def _kernel_transform() -> NDArray[np.float64]:
    """Transform of a kernel along one axis: G."""
    near, far = 2 * NEAR_2 * (NEAR_2 - FAR_2), 2 * FAR_2 * (FAR_2 - NEAR_2)
    rows = [np.array([1.0, 0.0, 0.0]) / BOTH_2]
    for point, divisor in ((NEAR, near), (-NEAR, near), (FAR, far), (-FAR, far)):
        rows.append(np.array([1.0, point, point**2]) / divisor)
    return np.stack([*rows, [0.0, 0.0, 1.0]])


def transform_kernel(weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """Transform a kernel once, in float64.

    Parameters
    ----------
    weight
        (outputs, inputs, 3, 3, 3).

    Returns
    -------
        (216, inputs, outputs), in the blocks of ``in_blocks``.
    """
    outputs, inputs = weight.shape[:2]
    wide, kernel = weight.astype(np.float64), _kernel_transform()
    for _ in range(3):  # the first axis becomes the last one
        wide = np.moveaxis(np.tensordot(kernel, wide, axes=(1, 2)), 0, -1)
    points = wide.reshape(outputs, inputs, POINTS).astype(np.float32)
    return in_blocks(points.transpose(2, 1, 0))


@jit
def to_points(d0, d1, d2, d3, d4, d5):
    """Transform six voxels along one axis: B transposed."""
    even, odd = d4 - d2 * FAR_2, (d3 - d1 * FAR_2) * NEAR
    far_even, far_odd = d4 - d2 * NEAR_2, (d3 - d1 * NEAR_2) * FAR
    return (
        d0 * BOTH_2 - d2 * SUM_2 + d4,
        even + odd,
        even - odd,
        far_even + far_odd,
        far_even - far_odd,
        d1 * BOTH_2 - d3 * SUM_2 + d5,
    )


@jit
def from_points(m0, m1, m2, m3, m4, m5):
    """Transform six points back to four voxels along one axis: A transposed."""
    near, near_odd = m1 + m2, m1 - m2
    far, far_odd = m3 + m4, m3 - m4
    return (
        m0 + near + far,
        near_odd * NEAR + far_odd * FAR,
        near * NEAR_2 + far * FAR_2,
        near_odd * NEAR_3 + far_odd * FAR_3 + m5,
    )
