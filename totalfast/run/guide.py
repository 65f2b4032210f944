"""Where each of a task's models has something to do, found by a pass with a faster model.

Each model then runs only the tiles that touch a box around its classes. The labels in the box are
those of a run with all tiles; there are none outside.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from totalfast.labels.crop import box_around
from totalfast.tasks import ROUGH_MARGIN_MM

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from totalfast.geometry import Box, Grid
    from totalfast.tasks import Task


def boxes_of_models(labels: NDArray[np.uint8], task: Task, grid: Grid) -> tuple[Box | None, ...]:
    """Return the boxes around the classes of each of a task's models, with a margin of 20 mm.

    Parameters
    ----------
    labels
        Labels of the task's guide, (z, y, x), RAS+ axes.
    task
        Only its selected classes count.
    grid
        The task's model grid, RAS+, with the field of view of ``labels``.

    Returns
    -------
        One per model: slices along (z, y, x) of ``grid``, or None if the guide found none of the
        model's classes.
    """
    boxes: list[Box | None] = []
    for part in task.parts:
        wanted = [label for label in task.labels_of(part) if label in task.classes]
        box = box_around(labels, wanted, scanner=grid, margin_mm=ROUGH_MARGIN_MM)
        boxes.append(None if box is None else (box[2], box[1], box[0]))
    return tuple(boxes)


def box_in_piece(box: Box, slices: slice, shape: Sequence[int]) -> Box | None:
    """Return the part of a box that lies in a piece of the image.

    Parameters
    ----------
    box
        Slices along (z, y, x) of the image.
    slices
        The piece's slices of the image.
    shape
        The piece's shape, (z, y, x).

    Returns
    -------
        Slices along (z, y, x) of the piece; None if the box does not touch it.
    """
    first, stop = box[0].start - slices.start, box[0].stop - slices.start
    if first >= shape[0] or stop <= 0:
        return None
    return slice(max(first, 0), min(stop, shape[0])), box[1], box[2]
