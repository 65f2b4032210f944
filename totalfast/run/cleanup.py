"""Clean a task's labels on the model grid, and refine vertebrae on the scanner grid."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from totalfast.labels.clean import clean_labels, remove_small_blobs
from totalfast.labels.merge import keep_labels
from totalfast.labels.vertebrae import refine_vertebrae, separate_vertebrae
from totalfast.run.empty_classes import CLEANED, NOT_FOUND, REFINED, TOO_SMALL
from totalfast.run.prediction import label_grid
from totalfast.system.progress import timed

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from totalfast.run.context import RunContext
    from totalfast.run.restoring import LabelMap
    from totalfast.scan import ModelImage, ScannerImage
    from totalfast.tasks import Task

VERTEBRAE_TASKS = ("vertebrae_pp", "vertebrae_pp_refined")


def clean(
    context: RunContext, labels: NDArray[np.uint8], model_image: ModelImage, task: Task
) -> NDArray[np.uint8]:
    """Apply a task's clean-up, drop classes that were not asked for, remove small blobs.

    ``labels`` and the result are uint8, (z, y, x), RAS+ axes, of ``label_grid``.
    """
    context.empty_classes.note(labels, NOT_FOUND)
    grid = label_grid(model_image, context.options).stored()
    voxel_mm3 = np.prod(grid.spacing_mm)
    labels = clean_labels(labels, task=task.name, classes=task.classes, voxel_mm3=voxel_mm3)
    if task.name in VERTEBRAE_TASKS:
        labels = separate_vertebrae(labels, task.classes, zooms_mm=grid.spacing_mm)
    context.empty_classes.note(labels, CLEANED)
    # Upstream drops the other classes at the very end; no step between looks at more than one.
    if task.selected:
        labels = keep_labels(labels, task.classes)
    blob_mm3 = context.options.blob_mm3
    if blob_mm3 is not None:
        with timed("Removing small blobs...", "  Removed in"):
            labels = remove_small_blobs(
                labels, task.classes, up_to_mm3=blob_mm3, voxel_mm3=voxel_mm3
            )
        context.empty_classes.note(labels, TOO_SMALL)
    return labels


def refine(
    context: RunContext, label_map: LabelMap, bodies: LabelMap, image: ScannerImage, task: Task
) -> None:
    """Cut vertebrae, dilated, to the vertebral bodies of another task, in place."""
    label_map.voxels[...] = refine_vertebrae(
        label_map.voxels,
        bodies.voxels,
        task.classes,
        zooms_mm=image.zooms_mm,
    )
    context.empty_classes.note(label_map.voxels, REFINED)
