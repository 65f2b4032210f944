"""Connected components of masks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def label_blobs(
    mask: NDArray[np.bool_], *, connectivity: int = 6
) -> tuple[NDArray[np.uint32], NDArray[np.intp]]:
    """Number the connected blobs of a 3-D mask and count their voxels.

    Parameters
    ----------
    mask
        Any axis order. The blobs are numbered in the order of their first voxels in memory, so a
        C-ordered mask has the numbers of ``scipy.ndimage.label``.
    connectivity
        Neighbours of a voxel: 6 with a common face, or 26 with a common corner.

    Returns
    -------
        The blob's number per voxel, 0 outside of the mask; and the voxels per number.
    """
    import cc3d

    blobs: NDArray[np.uint32] = cc3d.connected_components(mask, connectivity=connectivity)
    return blobs, np.bincount(blobs.ravel(order="K"))
