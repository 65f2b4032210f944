"""From a scan to labels on its grid: around which region, through which models, in which order.

Knows what is said meanwhile, and nothing of how a step is done: each is a module of ``stages``.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import nibabel as nib
import numpy as np
from nibabel.orientations import axcodes2ornt, ornt_transform

from totalfast.engine.predict import predict_part, predict_probabilities
from totalfast.engine.sliding_window import Tiling, plan_tiles, prepare_tiles
from totalfast.export import nearest_to_scanner_grid
from totalfast.export.legacy import smooth_to_scanner_grid
from totalfast.files.write import label_image, write_probabilities
from totalfast.geometry import to_canonical
from totalfast.labels.clean import clean_labels, remove_small_blobs
from totalfast.labels.crop import box_around, remove_outside
from totalfast.labels.merge import keep_labels, merge_part, thirds, wants_split, whole
from totalfast.labels.vertebrae import refine_vertebrae, separate_vertebrae
from totalfast.resampling.model_grid import to_model_grid
from totalfast.run.empty_classes import (
    CLEANED,
    NO_REGION,
    NOT_FOUND,
    NOT_RESTORED,
    OUTSIDE,
    REFINED,
    TOO_SMALL,
    Losses,
)
from totalfast.run.measure import measure_model_image
from totalfast.run.memory_plan import Network, plan_memory
from totalfast.system.cores import usable_cores
from totalfast.system.pending_files import PendingFiles
from totalfast.system.progress import timed

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from totalfast.engine.models import Model
    from totalfast.engine.predict import Probabilities
    from totalfast.geometry import Box, Grid
    from totalfast.labels.statistics import Statistics
    from totalfast.options import Options
    from totalfast.run.budget import Budget
    from totalfast.run.memory_plan import MemoryPlan, StoredScan
    from totalfast.run.work import Work
    from totalfast.scan import ModelImage, ScannerImage
    from totalfast.session import Session
    from totalfast.system.progress import Progress
    from totalfast.tasks import Crop, Part, Task

logger = logging.getLogger(__name__)

VERTEBRAE_TASKS = ("vertebrae_pp", "vertebrae_pp_refined")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What one run has at hand at every step."""

    options: Options
    session: Session
    progress: Progress
    work: Work
    scan: StoredScan
    budget: Budget
    losses: Losses
    models: tuple[tuple[Task, Part], ...]
    """All that will be needed, in that order."""

    @property
    def keeps_scan(self) -> bool:
        """Whether the scan's intensities are needed once more at the end."""
        return self.scan.kept

    def begin_loading(self, number: int) -> None:
        """Begin to load one of ``models``, if there are that many."""
        if number < len(self.models):
            device, backend = self.options.device, self.options.backend
            self.session.load(*self.models[number], device=device, backend=backend)

    def take(self, task: Task, part: Part) -> Model:
        """Wait until a model of a task is loaded, and begin to load what is needed after it."""
        device, backend = self.options.device, self.options.backend
        model = self.session.take(task, part, device=device, backend=backend)
        for number, (other_task, other_part) in enumerate(self.models, start=1):
            if other_task is task and other_part is part:
                self.begin_loading(number)
        return model

    def plan_memory(self, region: Grid, task: Task) -> MemoryPlan:
        """Estimate what labelling a region of the scan takes."""
        return plan_memory(
            self.scan,
            region,
            task=task,
            options=self.options,
            budget=self.budget,
            keeps_models=self.session.keep_models,
        )

    def rough(self) -> Run:
        """What a run has at hand that only looks for something: no option but the basic ones."""
        options = replace(
            self.options,
            export="auto",
            force_split=False,
            save_probabilities=None,
            statistics=False,
            remove_small_blobs=False,
            higher_order_resampling_LEGACY=False,
        )
        work = replace(self.work, part=self.work.rough or self.work.part, resample=0.0)
        losses = Losses({}, wanted=False)
        scan = replace(self.scan, kept=True)
        return replace(self, options=options, work=work, scan=scan, losses=losses)


@dataclass(frozen=True, slots=True, kw_only=True)
class Labelled:
    """An image's labels, and the figures that were taken before they came to its grid."""

    image: nib.Nifti1Image
    statistics: Statistics | None = None


def segment(run: Run, image: ScannerImage, task: Task) -> Labelled:
    """Label an image on its own grid: all of it, or what lies around a region of it."""
    if task.crop is None:
        return segment_all(run, image, task)
    return segment_region(run, image, task, task.crop)


def segment_all(run: Run, image: ScannerImage, task: Task) -> Labelled:
    """Label all of an image; drops its voxels on the way, unless the run needs them again."""
    model_image = resample(image, task, run.options)
    run.progress.advance(run.work.resample)
    if not run.keeps_scan:
        image.drop_voxels()
    labels = label(run, model_image, task)
    statistics = None
    if run.options.measures_model_grid:
        statistics = measure_model_image(labels, model_image, image, task.classes, run.options)
    run.progress.stage("Restoring")
    restored = restore(labels, model_image, image, run.options, task.classes)
    run.losses.note(np.asanyarray(restored.dataobj), NOT_RESTORED)
    return Labelled(image=restored, statistics=statistics)


def segment_region(run: Run, image: ScannerImage, task: Task, crop: Crop) -> Labelled:
    """Label what lies around the structures that a rough task finds, and nothing else."""
    rough, box = find_region(run, image, crop)
    if box is None:
        logger.info("INFO: Crop is empty. Returning empty segmentation.")
        run.losses.note_all(NO_REGION)
        nothing = np.zeros(image.grid.shape, dtype=np.uint8, order="F")
        affine = image.grid.affine
        return Labelled(image=label_image(nothing, affine=affine, header=None, names=task.classes))
    region = image.cropped(box)
    run.plan_memory(region.grid, task).check(run.budget)
    if not run.keeps_scan:
        image.drop_voxels()
    labelled = segment_all(run, region, task)
    result = uncrop(labelled.image, image, box, task.classes)
    if crop.outside is not None:
        keep_near(result, box, rough, crop, image)
        run.losses.note(np.asanyarray(result.dataobj), OUTSIDE)
    return replace(labelled, image=result)


def find_region(run: Run, image: ScannerImage, crop: Crop) -> tuple[NDArray[np.uint8], Box | None]:
    """Run the rough task: its labels (z, y, x), RAS+ axes, and the box that they give."""
    logger.info(crop.announced)
    if crop.robust:
        logger.info("  (Using more robust (but slower) 3mm model for cropping.)")
    rough_run = run.rough()
    if crop.rough.crop is None:
        model_image = resample(image, crop.rough, rough_run.options)
        labels = label(rough_run, model_image, crop.rough)
    else:
        found = segment(rough_run, image, crop.rough).image
        labels = to_canonical(np.asanyarray(found.dataobj), image.grid).transpose(2, 1, 0)
    box = box_around(labels, crop.labels, scanner=image.grid, margin_mm=crop.margin_mm)
    if box is not None:
        shape = tuple(part.stop - part.start for part in box)
        logger.info("  cropping from %s to %s", image.grid.shape, shape)
    return labels, box


def refine(
    run: Run, result: nib.Nifti1Image, image: ScannerImage, task: Task, bodies: Task
) -> None:
    """Cut vertebrae, dilated, to the bodies that another task finds, in place."""
    logger.info("Generating vertebrae body mask for refinement...")
    found = segment(run.rough(), image, bodies).image
    voxels = np.asanyarray(result.dataobj)
    voxels[...] = refine_vertebrae(
        voxels,
        np.asanyarray(found.dataobj),
        task.classes,
        zooms_mm=image.header.get_zooms()[:3],
    )
    run.losses.note(voxels, REFINED)


def resample(image: ScannerImage, task: Task, options: Options) -> ModelImage:
    """Bring a scan to the spacing that a task's models expect, or only to RAS+ axes."""
    order, spacing_mm = options.resampling_order, task.spacing_mm
    with timed("Resampling..." if spacing_mm else None, "  Resampled in"):
        found = to_model_grid(image, spacing_mm=spacing_mm, order=order, threads=usable_cores())
    logger.debug("  from shape %s to shape %s", image.grid.shape, found.grid.shape)
    return found


def label(run: Run, model_image: ModelImage, task: Task) -> NDArray[np.uint8]:
    """Run a task's models and clean up: labels (z, y, x), RAS+ axes, of ``_label_grid``."""
    with timed(None if task.several_models else "Predicting...", "  Predicted in"):
        labels = predict(run, model_image, task)
    run.losses.note(labels, NOT_FOUND)
    grid = _label_grid(model_image, run.options).stored()
    voxel_mm3 = np.prod(grid.spacing_mm)
    labels = clean_labels(labels, task=task.name, classes=task.classes, voxel_mm3=voxel_mm3)
    if task.name in VERTEBRAE_TASKS:
        labels = separate_vertebrae(labels, task.classes, zooms_mm=grid.spacing_mm)
    run.losses.note(labels, CLEANED)
    # Upstream drops the other classes at the very end; no step between looks at more than one.
    if task.selected:
        labels = keep_labels(labels, task.classes)
    blob_mm3 = run.options.blob_mm3
    if blob_mm3 is not None:
        with timed("Removing small blobs...", "  Removed in"):
            labels = remove_small_blobs(
                labels, task.classes, up_to_mm3=blob_mm3, voxel_mm3=voxel_mm3
            )
        run.losses.note(labels, TOO_SMALL)
    return labels


def predict(run: Run, model_image: ModelImage, task: Task) -> NDArray[np.uint8]:
    """Run all of a task's models and join their labels: uint8, (z, y, x), RAS+ axes.

    On the model grid; with export "linear" on the scanner's.
    """
    options, progress = run.options, run.progress
    linear = options.export == "linear"
    shape_x, shape_y, shape_z = _label_grid(model_image, options).shape
    shape = (shape_z, shape_y, shape_x)
    slices = model_image.voxels.shape[0]
    pieces = whole(slices, labelled=shape[0])
    if not linear and (
        options.force_split
        or wants_split(model_image.grid.shape, several_models=task.several_models)
    ):
        logger.info("Splitting into subparts...")
        pieces = thirds(slices)
    spacing_zyx = [float(mm) for mm in model_image.grid.spacing_mm[::-1]]
    on_device = run.plan_memory(model_image.canonical, task).on_device
    tiling = Tiling(step=task.tile_step, on_device=on_device)
    labels = np.zeros(shape, dtype=np.uint8)
    for index, part in enumerate(task.parts):
        if task.several_models:
            logger.info("Predicting part %d of %d ...", index + 1, len(task.parts))
        progress.stage("Loading model")
        if not on_device:
            prepare_tiles(Network.of(task, part).patch)  # while it loads
        model = run.take(task, part)
        progress.stage(f"Predicting {index + 1}/{len(task.parts)}")
        tiles = [
            plan_tiles(model_image.voxels[piece.predicted].shape, model.patch_size, task.tile_step)
            for piece in pieces
        ]
        tile_share = 1.0 / sum(tile.count for tile in tiles)
        for piece in pieces:
            probabilities = None
            given: dict[str, Any] = {
                "voxels": model_image.voxels[piece.predicted],
                "spacing_mm": spacing_zyx,
                "model": model,
                "tiling": tiling,
                "on_tile": partial(progress.advance, run.work.part * tile_share),
            }
            with run.session.predicting:
                if options.save_probabilities is None:
                    found = predict_part(**given, linear_to=shape if linear else None)
                else:
                    found, probabilities = predict_probabilities(**given)
            # As upstream's, one file: the last model's, of the first piece.
            target = options.save_probabilities
            if target and probabilities and part is task.parts[-1] and piece is pieces[0]:
                progress.stage("Saving probabilities")
                save_probabilities(probabilities, target, model_image, model)
            if part.labels is None:
                labels[piece.kept] = found[piece.inside]
            else:
                merge_part(labels[piece.kept], found[piece.inside], part.labels)
        del model, given  # before another is loaded
    return labels


def _label_grid(model_image: ModelImage, options: Options) -> Grid:
    """The grid, RAS+, that ``predict`` returns labels on."""
    return model_image.canonical if options.export == "linear" else model_image.grid


def restore(
    labels: NDArray[np.uint8],
    model_image: ModelImage,
    image: ScannerImage,
    options: Options,
    names: Mapping[int, str],
) -> nib.Nifti1Image:
    """Bring labels (z, y, x) to the scanner grid, or only to the scan's axes with save_lowres."""
    if options.lowres:
        lowres = nib.Nifti1Image(labels.T, model_image.grid.stored().affine)
        lowres = lowres.as_reoriented(ornt_transform(axcodes2ornt("RAS"), image.grid.orientation))
        voxels = np.asfortranarray(lowres.dataobj)
        return label_image(voxels, affine=lowres.affine, header=lowres.header, names=names)
    with timed("Resampling...", "  Resampled in"):
        legacy = options.higher_order_resampling_LEGACY
        to_scanner_grid = smooth_to_scanner_grid if legacy else nearest_to_scanner_grid
        voxels = to_scanner_grid(labels, scanner=image.grid, threads=usable_cores())
    return label_image(voxels, affine=image.grid.affine, header=image.header, names=names)


def uncrop(
    result: nib.Nifti1Image, image: ScannerImage, box: Box, names: Mapping[int, str]
) -> nib.Nifti1Image:
    """Put the labels of a box back into the whole scan's grid."""
    voxels = np.zeros(image.grid.shape, dtype=np.uint8, order="F")
    voxels[box] = np.asanyarray(result.dataobj)
    return label_image(voxels, affine=image.grid.affine, header=image.header, names=names)


def keep_near(
    result: nib.Nifti1Image, box: Box, rough: NDArray[np.uint8], crop: Crop, image: ScannerImage
) -> None:
    """Remove what lies far from the rough structures, in place."""
    with timed("Applying postprocessing: remove outside of crop mask...", "  Applied in"):
        remove_outside(
            np.asanyarray(result.dataobj),
            box,
            rough,
            crop.outside or (),
            scanner=image.grid,
            zooms_mm=image.header.get_zooms()[:3],
            distance_mm=crop.outside_mm,
            threads=usable_cores(),
        )


def save_probabilities(
    probabilities: Probabilities, path: Path, model_image: ModelImage, model: Model
) -> None:
    """Write the probabilities of a model image, or of its first slices."""
    reader = model.plans.image_reader_writer_class()
    with PendingFiles() as files:
        write_probabilities(
            probabilities, path, affine=model_image.grid.affine, reader=reader, files=files
        )
