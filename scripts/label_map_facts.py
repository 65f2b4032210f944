"""How structured a label map is."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def label_map_facts(labels: NDArray[Any]) -> tuple[int, float]:
    """Measure how structured a label map is.

    Parameters
    ----------
    labels
        Integers, 3-D; 0 is background.

    Returns
    -------
        The number of foreground classes present, and the share of 2x2x2 voxel cells that hold
        more than one label: about 0.05 for anatomy, close to 1 for noise.

    Raises
    ------
    ValueError
        If the map is not 3-D or thinner than two voxels.
    """
    if labels.ndim != 3 or min(labels.shape) < 2:
        message = f"labels have shape {labels.shape}; expected 3-D with at least 2 voxels per axis."
        raise ValueError(message)
    low = high = labels
    for axis in range(3):
        head: list[slice] = [slice(None)] * 3
        tail: list[slice] = [slice(None)] * 3
        head[axis], tail[axis] = slice(None, -1), slice(1, None)
        low = np.minimum(low[tuple(head)], low[tuple(tail)])
        high = np.maximum(high[tuple(head)], high[tuple(tail)])
    classes = int(np.count_nonzero(np.unique(labels)))
    return classes, float(np.mean(low != high))
