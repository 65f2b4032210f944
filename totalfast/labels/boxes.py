"""Bounding boxes of the labels of a label map."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from totalfast.geometry import Box


def label_boxes(labels: NDArray[np.uint8]) -> dict[int, Box]:
    """Bounding box of each label that occurs, along the axes of ``labels`` (3-D)."""
    from scipy.ndimage import find_objects

    turned = labels.flags.f_contiguous  # scipy visits voxels in C order
    boxes = find_objects(labels.T if turned else labels)
    return {
        label: box[::-1] if turned else box
        for label, box in enumerate(boxes, start=1)
        if box is not None
    }
