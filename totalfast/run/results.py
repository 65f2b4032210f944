"""What a run leaves behind: masks, figures, a picture, a report, each in its place.

Knows what was found and where results go; knows nothing of how they were found.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nibabel as nib
import numpy as np

from totalfast.files.dicom.write import write_dicom
from totalfast.files.nora import ATLAS, MASK, add_to_nora
from totalfast.files.targets import describe, output_files, report_folder
from totalfast.files.write import label_image, write_labels, write_masks
from totalfast.geometry import Grid
from totalfast.labels.clean import skin_mask
from totalfast.labels.merge import renumbered
from totalfast.run.measure import measure_scan
from totalfast.system.cores import usable_cores
from totalfast.system.pending_files import PendingFiles
from totalfast.system.progress import timed
from totalfast.upstream import CLASS_MAPS, python_api, write_radiomics

if TYPE_CHECKING:
    import torch

    from totalfast.files.dicom.read import Series
    from totalfast.labels.statistics import Statistics
    from totalfast.options import Options
    from totalfast.run.empty_classes import Losses
    from totalfast.scan import ScannerImage
    from totalfast.system.progress import Progress
    from totalfast.tasks import Task

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What was found in a scan, and what is to be done with it."""

    labels: nib.Nifti1Image
    """In the task's own numbering."""
    statistics: Statistics | None
    """Figures that were taken on the model's grid."""
    image: ScannerImage
    """The scan; its voxels may have been dropped."""
    source: str | Path | nib.Nifti1Image
    """What the user named, or the image that was given."""
    series: Series | None
    """The DICOM series that the scan was converted from, if it was."""
    output: Path | None
    task: Task
    options: Options

    @property
    def folder(self) -> Path | None:
        """Where files are that lie beside the label map, or among the masks."""
        return None if self.output is None else report_folder(self.output, self.options)


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivered:
    """What the caller gets."""

    image: nib.Nifti1Image
    """uint8 label map, in the numbering that was asked for."""
    statistics: Statistics | None
    """Figures of the classes, if they were asked for."""
    saved: tuple[str, ...]
    """What was written where, in words."""


def deliver(found: Found, progress: Progress) -> Delivered:
    """Write all that was asked for, but the report of the run."""
    options, output = found.options, found.output
    result = in_wanted_order(found)
    saved = []
    if output is not None and not options.skip_saving:
        progress.stage("Saving")
        save(found, result, output)
        saved.append(describe(output, options, masks=len(found.task.classes)))
    if options.preview:
        progress.stage("Drawing")
        save_preview(found)
    statistics = None
    if options.statistics:
        progress.stage("Measuring")
        statistics = measure_found(found)
        path = save_statistics(found, statistics)
        saved += [] if path is None else [f"statistics in {path}"]
    if options.radiomics and output is not None:
        progress.stage("Radiomics")
        save_radiomics(found, output)
    return Delivered(image=result, statistics=statistics, saved=tuple(saved))


def in_wanted_order(found: Found) -> nib.Nifti1Image:
    """Return the label map as it is, or with ``v1_order`` in the numbering of version 1.

    Classes that only version 2 has are lost then, and those that only version 1 had stay empty.
    """
    labels, task = found.labels, found.task
    if not found.options.v1_order or task.name != "total":
        return labels
    names = CLASS_MAPS["total_v1"]
    if task.selected:
        names = {label: name for label, name in names.items() if name in task.classes.values()}
    voxels = renumbered(np.asanyarray(labels.dataobj), task.classes, names)
    header = labels.header.copy()
    header.extensions.pop()  # the table of names
    return label_image(voxels, affine=labels.affine, header=header, names=names)


def save(found: Found, result: nib.Nifti1Image, output: Path) -> None:
    """Write the label map, or one mask a class and those derived from them.

    Masks are made from labels in the task's own numbering, so that none is lost to another one.
    """
    options, task = found.options, found.task
    threads = min(usable_cores(), options.nr_thr_saving)
    says_each = not task.name.startswith("total")
    with PendingFiles() as files:
        with timed("Saving segmentations...", "  Saved in"):
            if options.multilabel:
                _write_label_maps(found, result, output, files=files, threads=threads)
            else:
                for name in task.classes.values() if says_each else ():
                    logger.info("Creating %s.nii.gz", name)
                write_masks(found.labels, task.classes, folder=output, files=files, threads=threads)
        if writes_skin(task, options):
            _write_body_and_skin(found, output, files=files, threads=threads)
    # As upstream: Nora gets NIfTI files, and none where DICOM is written.
    if options.nora_tag is not None and not options.dicom_types:
        if options.ml:
            add_to_nora(
                list(output_files(output, options).values()), tag=options.nora_tag, kind=ATLAS
            )
        else:
            masks = [output / f"{name}.nii.gz" for name in task.classes.values()]
            add_to_nora(masks, tag=options.nora_tag, kind=MASK)


def _write_label_maps(
    found: Found, result: nib.Nifti1Image, output: Path, *, files: PendingFiles, threads: int
) -> None:
    """Write one file of all classes for each output type; DICOM has names instead of numbers."""
    labels = np.asanyarray(found.labels.dataobj)
    for kind, path in output_files(output, found.options).items():
        if kind == "nifti":
            write_labels(result, path, files=files, threads=threads)
        elif found.series is not None:
            write_dicom(
                kind, labels, found.task.classes, series=found.series, target=path, files=files
            )


def writes_skin(task: Task, options: Options) -> bool:
    """Whether masks of body and skin are derived, for which the scan itself is needed."""
    return task.name == "body" and not options.multilabel and not options.no_derived_masks


def _write_body_and_skin(found: Found, output: Path, *, files: PendingFiles, threads: int) -> None:
    """Write the masks that upstream derives from those of the task body, with fresh headers."""
    body = np.asfortranarray(found.labels.dataobj) > 0
    logger.info("Creating body.nii.gz")
    logger.info("Creating skin.nii.gz")
    for name, voxels in (("body", body.view(np.uint8)), ("skin", skin_mask(found.image, body))):
        mask = label_image(voxels, affine=found.labels.affine, header=None, names=None)
        write_labels(mask, output / f"{name}.nii.gz", files=files, threads=threads)


def save_preview(found: Found) -> None:
    """Draw the result into the folder of the masks, or beside the label map."""
    if found.folder is None:
        logger.warning("WARNING: No output directory specified. Skipping preview generation.")
        return
    from totalfast.preview.page import draw_preview, save_picture

    task = found.task
    with timed("Generating preview...", "  Drawn in"):
        labels = np.asanyarray(found.labels.dataobj)
        affine = np.asarray(found.labels.affine, dtype=np.float64)
        grid = Grid(shape=labels.shape, affine=affine)
        picture = draw_preview(found.image, labels, grid, task.classes, title=f"task {task.name}")
        save_picture(picture, found.folder / f"preview_{task.name}.png")


def measure_found(found: Found) -> Statistics:
    """Return the figures that there are, or measure on the scan's own grid."""
    if found.statistics is not None:
        return found.statistics
    return measure_scan(found.labels, found.image, found.task.classes, found.options)


def save_statistics(found: Found, statistics: Statistics) -> Path | None:
    """Write the figures to the file that was named, or into the folder of the results."""
    path = found.options.statistics
    if isinstance(path, bool):
        if found.folder is None:
            return None
        path = found.folder / "statistics.json"
    _write_json(statistics, path, indent=4)
    return path


def save_radiomics(found: Found, folder: Path) -> None:
    """Let upstream compute radiomics features of all masks in a folder, one file for all."""
    with timed("Calculating radiomics...", "  calculated in"), PendingFiles() as files:
        source = found.source if isinstance(found.source, nib.Nifti1Image) else Path(found.source)
        write_radiomics(source, folder, files.path(folder / "statistics_radiomics.json"))


def save_report(found: Found, losses: Losses, *, device: torch.device, seconds: float) -> None:
    """Write upstream's report of a run, and why classes are empty."""
    path = found.options.report
    if path is None:
        return
    from totalfast import __version__

    options, types = found.options, found.options.output_type
    facts = python_api().build_run_report(
        input=found.source,
        output=found.output,
        task=found.task.name,
        device=device,
        fast=options.fast,
        fastest=options.fastest,
        ml=options.ml,
        output_type=types[0] if len(types) == 1 else list(types),
        roi_subset=None if options.selected is None else list(options.selected),
        runtime_seconds=seconds,
        save_lowres=options.lowres,
    )
    facts["totalfast"] = {"version": __version__, "empty_classes": losses.reasons}
    _write_json(facts, path, indent=2)
    logger.info("Run report written to %s", path)


def _write_json(content: dict[str, Any], path: Path, *, indent: int) -> None:
    with PendingFiles() as files:
        files.path(path).write_text(json.dumps(content, indent=indent))
