"""The region that a task segments: its box, and the way back into the whole scan."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from totalfast.files.write import label_image
from totalfast.labels.crop import box_around, remove_outside
from totalfast.run.restoring import LabelMap
from totalfast.system.cores import usable_cores
from totalfast.system.progress import timed

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from totalfast.geometry import Box
    from totalfast.scan import ScannerImage
    from totalfast.tasks import Crop, Task

logger = logging.getLogger(__name__)


def find_region(rough_labels: NDArray[np.uint8], crop: Crop, image: ScannerImage) -> Box | None:
    """Return the box of the scanner grid around the rough structures; None if there are none.

    ``rough_labels`` are (z, y, x), RAS+ axes.
    """
    box = box_around(rough_labels, crop.labels, scanner=image.grid, margin_mm=crop.margin_mm)
    if box is None:
        logger.info("INFO: Crop is empty. Returning empty segmentation.")
        return None
    shape = tuple(part.stop - part.start for part in box)
    logger.info("  cropping from %s to %s", image.grid.shape, shape)
    return box


def empty_result(image: ScannerImage, task: Task) -> LabelMap:
    """Return an empty label map; like upstream's, it has a fresh header (in mm)."""
    voxels = np.zeros(image.grid.shape, dtype=np.uint8, order="F")
    header = None if image.mm_per_unit == 1.0 else image.header
    affine = image.written_affine
    return LabelMap(image=label_image(voxels, affine=affine, header=header, names=task.classes))


def uncrop(
    label_map: LabelMap, image: ScannerImage, box: Box, names: Mapping[int, str]
) -> LabelMap:
    """Put the labels of a box back into the whole scan's grid."""
    voxels = np.zeros(image.grid.shape, dtype=np.uint8, order="F")
    voxels[box] = label_map.voxels
    whole = label_image(voxels, affine=image.written_affine, header=image.header, names=names)
    return replace(label_map, image=whole)


def keep_near(
    label_map: LabelMap, box: Box, rough_labels: NDArray[np.uint8], crop: Crop, image: ScannerImage
) -> None:
    """Remove labels far from the rough structures, in place."""
    with timed("Applying postprocessing: remove outside of crop mask...", "  Applied in"):
        remove_outside(
            label_map.voxels,
            box,
            rough_labels,
            crop.outside or (),
            scanner=image.grid,
            zooms_mm=image.zooms_mm,
            distance_mm=crop.outside_mm,
            threads=usable_cores(),
        )
