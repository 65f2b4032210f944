"""The line that a scan runs along, from file to masks.

Knows in which order things happen, and nothing of how they are done.
"""

from __future__ import annotations

import logging
import os
import time
from threading import Thread
from typing import TYPE_CHECKING

from totalfast.engine.models import find_part
from totalfast.export.linear import prepare as prepare_linear
from totalfast.files.read import open_scan, read_image
from totalfast.geometry import Grid
from totalfast.run.budget import Budget
from totalfast.run.empty_classes import Losses
from totalfast.run.input_warnings import warn_of_unusual
from totalfast.run.labelling import Run, refine, segment
from totalfast.run.memory_plan import StoredScan
from totalfast.run.results import Found, deliver, save_report, writes_skin
from totalfast.run.work import Work
from totalfast.system.progress import Progress
from totalfast.upstream import check_license, store_license

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import BinaryIO

    import nibabel as nib

    from totalfast.files.dicom.read import Series
    from totalfast.options import Options
    from totalfast.run.results import Delivered
    from totalfast.session import Session
    from totalfast.tasks import Part, Task

logger = logging.getLogger(__name__)


def run(
    source: str | Path | nib.Nifti1Image | BinaryIO,
    output: Path | None,
    *,
    options: Options,
    session: Session,
    series: Series | None = None,
) -> Delivered:
    """Segment one scan.

    Parameters
    ----------
    source
        Path of an image file, an image, or an open file.
    output
        Directory of the masks, or file of the label map; None writes nothing.
    options
        What to do.
    session
        Where models are kept.
    series
        The DICOM series that ``source`` is the image of, if it is one's.

    Returns
    -------
        The label map is on the scanner grid (on the model grid with ``save_lowres``), with the
        scan's header and a table of the class names.
    """
    began = time.perf_counter()
    task = options.resolved_task()
    if options.license_number is not None:
        store_license(options.license_number)
    if task.licensed:
        check_license(task.name)
    scan = open_scan(source)  # before models are looked for, or even downloaded
    _say_what_is_done(task, options)
    with Progress(disable=options.quiet) as progress:
        this = Run(
            options=options,
            session=session,
            progress=progress,
            work=Work.of(scan, task, device=options.device),
            scan=StoredScan(
                shape=scan.shape[:3],
                itemsize=scan.get_data_dtype().itemsize,
                kept=_keeps_scan(task, options),
            ),
            budget=Budget.of(options),
            losses=Losses(task.classes, wanted=options.verbose or options.report is not None),
            models=tuple(_models_of(task)),
        )
        _check_memory(this, Grid(shape=scan.shape[:3], affine=scan.affine), task)
        for owner, part in this.models:
            find_part(owner, part)  # what is missing is downloaded before anything is read
        this.begin_loading(0)
        if options.export == "linear":
            Thread(target=prepare_linear, name="totalfast-compile", daemon=True).start()
        progress.expect(this.work.total)
        progress.stage("Reading")
        image = read_image(scan)
        warn_of_unusual(image, spacing_mm=task.spacing_mm, crops=task.crop is not None)
        progress.advance(this.work.read)

        labelled = segment(this, image, task)
        if task.refined_by is not None:
            refine(this, labelled.image, image, task, task.refined_by)
        progress.advance(this.work.restore)

        found = Found(
            labels=labelled.image,
            statistics=labelled.statistics,
            image=image,
            source=_named(source, scan, series),
            series=series,
            output=output,
            task=task,
            options=options,
        )
        delivered = deliver(found, progress)
        progress.advance(this.work.save)
    this.losses.tell()
    seconds = time.perf_counter() - began
    if options.report is not None:
        device, _ = session.place(options.device, options.backend)
        save_report(found, this.losses, device=device, seconds=seconds)
    logger.info("Done in %.1f s: %s", seconds, ", ".join(delivered.saved) or "nothing was saved")
    return delivered


def _named(
    source: str | Path | nib.Nifti1Image | BinaryIO, scan: nib.Nifti1Image, series: Series | None
) -> str | Path | nib.Nifti1Image:
    """What the user named, or the image, where no path was given."""
    if series is not None:
        return series.source
    return source if isinstance(source, str | os.PathLike) else scan


def _models_of(task: Task) -> Iterator[tuple[Task, Part]]:
    """All models that a task needs, in the order in which it does."""
    if task.crop is not None:
        yield from _models_of(task.crop.rough)
    for part in task.parts:
        yield task, part
    if task.refined_by is not None:
        yield from _models_of(task.refined_by)


def _keeps_scan(task: Task, options: Options) -> bool:
    return (
        writes_skin(task, options)
        or options.preview
        or bool(options.statistics)
        or task.refined_by is not None
    )


def _check_memory(run: Run, whole: Grid, task: Task) -> None:
    """Say what memory the first pass over the whole scan takes, or that it is too much."""
    first = run
    while task.crop is not None:
        first, task = first.rough(), task.crop.rough
    first.plan_memory(whole, task).check(run.budget)


def _say_what_is_done(task: Task, options: Options) -> None:
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
