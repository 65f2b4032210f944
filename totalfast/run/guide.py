"""Where each of a task's models has something to do, found by a pass with a faster model.

Each model then runs only the tiles that touch the box around its classes. Voxels of which all tiles
were run, and so all in the box, get the labels of a run with all tiles; the others get none.

The tiles that touch the found voxels themselves are fewer, but structures that the fast model had
missed at the border of a scan were lost.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from totalfast.labels.blobs import label_blobs
from totalfast.labels.crop import box_around, is_one_of
from totalfast.tasks import ROUGH_MARGIN_MM

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from totalfast.geometry import Box, Grid
    from totalfast.tasks import Task

LEAST_VOXELS = 10
"""Smaller pieces that the guide finds are noise: 0.3 ml in voxels of 3 mm, less than any class."""


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
        found = _without_specks(is_one_of(labels, wanted))
        box = box_around(found.view(np.uint8), [1], scanner=grid, margin_mm=ROUGH_MARGIN_MM)
        boxes.append(None if box is None else (box[2], box[1], box[0]))
    return tuple(boxes)


def _without_specks(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return a mask without its small pieces; all of it if there are no others."""
    blobs, sizes = label_blobs(mask, connectivity=26)  # a thin oblique vessel is one piece
    large = sizes >= LEAST_VOXELS
    large[0] = False
    return large[blobs] if large.any() else mask
