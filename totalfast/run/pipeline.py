"""One run, from the scan to its results, top to bottom.

Each step is a function of another module; the order of the steps is here.
"""

from __future__ import annotations

import logging
import os
import time
from dataclasses import replace
from functools import partial
from threading import Thread
from typing import TYPE_CHECKING

import numpy as np

from totalfast.errors import InputError
from totalfast.export.cell_export import prepare as prepare_linear
from totalfast.files.read import open_scan, read_image
from totalfast.files.targets import derives_body_and_skin
from totalfast.geometry import Grid, to_canonical
from totalfast.models.weights import ensure_parts, parts_of
from totalfast.resampling.model_grid import to_model_grid
from totalfast.run.cleanup import clean, refine
from totalfast.run.context import RunContext
from totalfast.run.empty_classes import (
    NO_REGION,
    NOT_GUIDED_TO,
    NOT_RESTORED,
    OUTSIDE,
    EmptyClasses,
)
from totalfast.run.guide import boxes_of_models
from totalfast.run.input_warnings import warn_of_unusual
from totalfast.run.intensities import replace_non_finite
from totalfast.run.measure import measure_model_image
from totalfast.run.memory_plan import Budget, StoredScan
from totalfast.run.prediction import predict
from totalfast.run.region import empty_result, find_region, keep_near, uncrop
from totalfast.run.restoring import LabelMap, restore
from totalfast.run.results import (
    Failures,
    Results,
    add_results_to_nora,
    save_marker,
    save_report,
    write_results,
)
from totalfast.run.warm_up import warm_up
from totalfast.run.work import Work
from totalfast.system.cores import usable_cores
from totalfast.system.gpus import may_have_gpu
from totalfast.system.progress import Progress, timed
from totalfast.upstream import check_license, store_license, warn_of_untested_version

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import BinaryIO, TypeAlias

    import nibabel as nib
    from numpy.typing import NDArray

    from totalfast.files.dicom.read import Series
    from totalfast.files.targets import OutputPlan
    from totalfast.geometry import Box
    from totalfast.models.store import ModelStore
    from totalfast.options import Options
    from totalfast.run.memory_plan import MemoryPlan
    from totalfast.run.results import Segmentation
    from totalfast.run.shared_scan import SharedScan
    from totalfast.scan import ModelImage, ScannerImage
    from totalfast.system.pending_files import PendingFiles
    from totalfast.tasks import Crop, Task

    Source: TypeAlias = str | Path | nib.Nifti1Image | BinaryIO
    """Path of an image file, an image, or an open file."""

logger = logging.getLogger(__name__)


def run(
    source: Source,
    outputs: OutputPlan,
    *,
    options: Options,
    store: ModelStore,
    files: PendingFiles,
    series: Series | None = None,
    progress: Progress | None = None,
    shared: SharedScan | None = None,
) -> Segmentation:
    """Segment one scan and write what was asked for.

    Parameters
    ----------
    source
        Path of an image file, an image, or an open file.
    outputs
        The files to write.
    options
        What to do.
    store
        Where models are loaded.
    files
        Collects the files; they get their names at the end of the run.
    series
        The DICOM series that ``source`` was converted from, if it was.
    progress
        Where progress is shown; None shows a bar unless the options are quiet.
    shared
        What other tasks on the same scan have computed; None if this is the only one.

    Returns
    -------
        The label map is on the scanner grid (on the model grid with ``save_lowres``), with the
        scan's header and a table of the class names.
    """
    began = time.perf_counter()
    task = options.resolved_task()
    _check_license(task, options)
    warn_of_untested_version()
    scan = open_scan(source)  # before models are looked for, or even downloaded
    files.require_space(outputs.sizes(scan.shape[:3]))
    _log_task(task, options)
    # Before the memory plan, which reads the models' plans.
    ensure_parts(task, offline=options.offline, quiet=options.quiet)
    with progress or Progress(disable=options.quiet) as progress:
        context = _context(
            scan,
            task,
            options=options,
            store=store,
            progress=progress,
            files=files,
            shared=shared,
        )
        plan = _first_plan(context, Grid(shape=scan.shape[:3], affine=scan.affine), task)
        plan.refuse(context.budget)
        _prepare_models(context)
        progress.expect(context.work.total)
        wait = partial(progress.stage, "Waiting")  # which ends a run that was cancelled
        wait()
        free_now = context.budget.host - plan.shared
        with store.gate.passed(plan.own, free=free_now, on_wait=wait) as free:
            budget = replace(context.budget, host=free + plan.shared)
            results = _label(replace(context, budget=budget), scan, task, outputs, source, series)
            segmentation = write_results(results, progress)
            progress.advance(context.work.save)
    context.empty_classes.log()
    elapsed_s = time.perf_counter() - began
    if options.report is not None:
        with results.failures.kept("report"):
            save_report(results, context.empty_classes, device=context.device, elapsed_s=elapsed_s)
    save_marker(results)
    files.commit()
    results.failures.raise_first()
    add_results_to_nora(results)
    if options.report is not None:
        logger.info("Run report written to %s", options.report)
    logger.info(
        "Done in %.1f s: %s", elapsed_s, ", ".join(segmentation.saved) or "nothing was saved"
    )
    return segmentation


def _label(
    context: RunContext,
    scan: nib.Nifti1Image,
    task: Task,
    outputs: OutputPlan,
    source: Source,
    series: Series | None,
) -> Results:
    """Read a scan and label it; nothing is written yet."""
    progress = context.progress
    progress.stage("Reading")

    def read() -> ScannerImage:
        image = replace_non_finite(read_image(scan), modality=task.modality)
        warn_of_unusual(
            image,
            spacing_mm=task.spacing_mm,
            crops=task.crop is not None,
            modality=task.modality,
        )
        return image

    image = read() if context.shared is None else context.shared.scan(task.modality, read)
    progress.advance(context.work.read)
    label_map = label(context, image, task)
    if task.refined_by is not None:
        bodies = _vertebral_bodies(context, image, task.refined_by)
        refine(context, label_map, bodies, image, task)
    progress.advance(context.work.restore)
    return Results(
        label_map=label_map,
        image=image,
        source=_name_of(source, scan, series),
        series=series,
        output=outputs.output,
        task=task,
        options=context.options,
        files=context.files,
        failures=Failures(),
    )


def label(context: RunContext, image: ScannerImage, task: Task) -> LabelMap:
    """Label an image on its own grid: all of it, or the region that the task looks at."""
    if task.crop is None:
        return label_whole(context, image, task)
    return label_region(context, image, task, task.crop)


def label_whole(context: RunContext, image: ScannerImage, task: Task) -> LabelMap:
    """Label all of an image: to the model grid, predict, clean up, and back."""
    guide = None if task.guide is None else _guiding_labels(context, image, task.guide)
    model_image = resample(context, image, task)
    context.progress.advance(context.work.resample)
    if not context.keeps_scan:
        image.drop_voxels()
    boxes = None if guide is None else _boxes_of_models(context, guide, model_image, task)
    labels = predict(context, model_image, task, boxes=boxes)
    labels = clean(context, labels, model_image, task)
    statistics = None
    if context.options.measures_model_grid:
        statistics = measure_model_image(labels, model_image, image, task.classes, context.options)
    context.progress.stage("Restoring")
    restored = restore(labels, model_image, image, context.options, task.classes)
    context.empty_classes.note(np.asanyarray(restored.dataobj), NOT_RESTORED)
    return LabelMap(image=restored, statistics=statistics)


def label_region(context: RunContext, image: ScannerImage, task: Task, crop: Crop) -> LabelMap:
    """Find a region with a rough task, label it, and put its labels into the whole scan."""
    rough_labels = _rough_labels(context, image, crop)
    box = find_region(rough_labels, crop, image)
    if box is None:
        context.empty_classes.note_all(NO_REGION)
        return empty_result(image, task)
    region = image.cropped(box)
    if not context.keeps_scan:
        image.drop_voxels()
    label_map = label_whole(context, region, task)
    label_map = uncrop(label_map, image, box, task.classes)
    if crop.outside is not None:
        keep_near(label_map, box, rough_labels, crop, image)
        context.empty_classes.note(label_map.voxels, OUTSIDE)
    return label_map


def resample(context: RunContext, image: ScannerImage, task: Task) -> ModelImage:
    """Bring a scan to the spacing that a task's models expect, or only to RAS+ axes."""
    order, spacing_mm = context.options.resampling_order, task.spacing_mm

    def resampled() -> ModelImage:
        with timed("Resampling..." if spacing_mm else None, "  Resampled in"):
            return to_model_grid(image, spacing_mm=spacing_mm, order=order, threads=usable_cores())

    if context.shared is None:
        model_image = resampled()
    else:
        model_image = context.shared.model_image(image, (spacing_mm, order), resampled)
    logger.debug("  from shape %s to shape %s", image.grid.shape, model_image.grid.shape)
    return model_image


def _rough_labels(context: RunContext, image: ScannerImage, crop: Crop) -> NDArray[np.uint8]:
    """Run the rough task, unless another task has: labels (z, y, x), RAS+ axes."""

    def predict_roughly() -> NDArray[np.uint8]:
        logger.info(crop.announced)
        if crop.robust:
            logger.info("  (Using more robust (but slower) 3mm model for cropping.)")
        return _predict_roughly(context.rough(work=context.work.rough), image, crop.rough)

    return _shared(context, image, crop.rough, predict_roughly)


def _guiding_labels(
    context: RunContext, image: ScannerImage, guide: Task
) -> NDArray[np.uint8] | None:
    """Run the faster task that guides, unless another has: labels (z, y, x), RAS+ axes.

    None if the image is thinner than the task's voxels.
    """
    try:
        image.grid.canonical().resampled(guide.spacing_mm or ())
    except InputError as error:
        logger.info("Not guided: %s", error)
        context.progress.advance(context.work.guide)
        return None

    def predict_roughly() -> NDArray[np.uint8]:
        logger.info("Generating %dmm segmentation to guide the models...", guide.coarse_mm)
        return _predict_roughly(context.rough(work=context.work.guide), image, guide)

    return _shared(context, image, guide, predict_roughly)


def _boxes_of_models(
    context: RunContext, guide: NDArray[np.uint8], model_image: ModelImage, task: Task
) -> tuple[Box | None, ...]:
    """Where each model runs; classes of a model that runs nowhere are noted as empty."""
    boxes = boxes_of_models(guide, task, model_image.grid)
    for part, box in zip(task.parts, boxes, strict=True):
        if box is None:
            context.empty_classes.note_some(task.labels_of(part), NOT_GUIDED_TO)
    return boxes


def _shared(
    context: RunContext, image: ScannerImage, rough: Task, predict: Callable[[], NDArray[np.uint8]]
) -> NDArray[np.uint8]:
    """Return the rough labels of an image, which several tasks on one scan compute once."""
    if context.shared is None:
        return predict()
    models = tuple((task.name, task.resolution, part.model_id) for task, part in parts_of(rough))
    key = (models, tuple(rough.classes), rough.tile_step, context.options.resampling_order)
    return context.shared.rough_labels(image, key, predict)


def _predict_roughly(rough: RunContext, image: ScannerImage, task: Task) -> NDArray[np.uint8]:
    if task.crop is not None:
        label_map = label(rough, image, task)
        canonical = to_canonical(label_map.voxels, image.grid)
        return np.asarray(canonical.transpose(2, 1, 0), dtype=np.uint8)
    model_image = resample(rough, image, task)
    labels = predict(rough, model_image, task)
    return clean(rough, labels, model_image, task)


def _vertebral_bodies(context: RunContext, image: ScannerImage, task: Task) -> LabelMap:
    """Run the task whose first class the vertebrae are cut to."""
    logger.info("Generating vertebrae body mask for refinement...")
    return label(context.rough(work=context.work.part), image, task)


def _context(
    scan: nib.Nifti1Image,
    task: Task,
    *,
    options: Options,
    store: ModelStore,
    progress: Progress,
    files: PendingFiles,
    shared: SharedScan | None,
) -> RunContext:
    return RunContext(
        options=options,
        store=store,
        progress=progress,
        work=Work.of(scan, task, on_gpu=may_have_gpu(options.device)),
        scan=StoredScan(
            shape=scan.shape[:3],
            itemsize=scan.get_data_dtype().itemsize,
            kept=_keeps_scan(task, options),
        ),
        budget=Budget.of(options),
        files=files,
        empty_classes=EmptyClasses(
            task.classes, enabled=options.verbose or options.report is not None
        ),
        models=tuple(parts_of(task)),
        shared=shared,
    )


def _check_license(task: Task, options: Options) -> None:
    if options.license_number is not None:
        store_license(options.license_number)
    if task.licensed:
        check_license(task.name)


def _prepare_models(context: RunContext) -> None:
    """Start loading the first model, and let a GPU compute a first tile while the scan is read."""
    loading = context.start_loading(0)
    if may_have_gpu(context.options.device):
        arguments = (context, loading)
        Thread(target=warm_up, args=arguments, name="totalfast-warm-up", daemon=True).start()
    if context.options.export == "linear":
        Thread(target=prepare_linear, name="totalfast-compile", daemon=True).start()


def _name_of(
    source: Source, scan: nib.Nifti1Image, series: Series | None
) -> str | Path | nib.Nifti1Image:
    """The path that the user gave, or the image, where no path was given."""
    if series is not None:
        return series.source
    return source if isinstance(source, str | os.PathLike) else scan


def _keeps_scan(task: Task, options: Options) -> bool:
    return (
        derives_body_and_skin(task, options)
        or options.preview
        or bool(options.statistics)
        or task.refined_by is not None
    )


def _first_plan(context: RunContext, whole: Grid, task: Task) -> MemoryPlan:
    """Plan the memory of the first pass over a scan, before it is read."""
    while task.crop is not None:
        context, task = context.rough(work=context.work.rough), task.crop.rough
    # Torch, which knows, is imported while the scan is read.
    return context.plan_memory(whole, task, on_gpu=may_have_gpu(context.options.device))


def _log_task(task: Task, options: Options) -> None:
    if task.coarse_mm is not None:
        logger.info(
            "Using '%s' option: resampling to lower resolution (%dmm)",
            task.resolution,
            task.coarse_mm,
        )
    if task.hint:
        logger.info(task.hint)
    if options.export == "linear":
        logger.info("Export 'linear': logits interpolated on the scan's grid, for smooth masks")
    elif task.spacing_mm is not None:
        logger.info("Export 'nearest': labels resampled to the scan's grid, as upstream does")
    else:
        logger.info("Export 'plans': logits resampled to the scan's grid, as upstream does")
