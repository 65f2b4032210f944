"""Where each of a task's models has something to do, found by a pass with a faster model.

Each model then runs only the tiles that touch its classes, with a margin. Voxels of which all tiles
were run get the labels of a run with all tiles; the others get none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from totalfast.engine.rough_mask import RoughMask
from totalfast.labels.blobs import label_blobs
from totalfast.tasks import ROUGH_MARGIN_MM

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from totalfast.geometry import Grid
    from totalfast.tasks import Task

LEAST_VOXELS = 10
"""Smaller pieces that the guide finds are noise: 0.3 ml in voxels of 3 mm, less than any class."""


def masks_of_models(
    labels: NDArray[np.uint8], task: Task, grid: Grid
) -> tuple[RoughMask | None, ...]:
    """Return where the classes of each of a task's models are, with a margin of 20 mm.

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
        One mask of ``grid`` per model; None if the guide found none of the model's classes.
    """
    margin = tuple(
        int(mm / spacing)
        for mm, spacing in zip(reversed(ROUGH_MARGIN_MM), reversed(grid.spacing_mm), strict=True)
    )
    masks: list[RoughMask | None] = []
    for part in task.parts:
        wanted = [label for label in task.labels_of(part) if label in task.classes]
        voxels = _without_specks(np.isin(labels, wanted, kind="table"))
        mask = RoughMask(voxels=voxels, shape=grid.shape[::-1], margin=margin)
        masks.append(mask if voxels.any() else None)
    return tuple(masks)


def _without_specks(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return a mask without its small pieces; all of it if there are no others."""
    blobs, sizes = label_blobs(mask)
    large = sizes >= LEAST_VOXELS
    large[0] = False
    return large[blobs] if large.any() else mask
