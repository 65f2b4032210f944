"""Write the results of a run: masks or label map, statistics, preview, radiomics, report."""

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
    from totalfast.run.empty_classes import EmptyClasses
    from totalfast.run.restoring import LabelMap
    from totalfast.scan import ScannerImage
    from totalfast.system.progress import Progress
    from totalfast.tasks import Task

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """The label map of a scan, and all that is needed to write results of it."""

    label_map: LabelMap
    """In the task's own numbering."""
    image: ScannerImage
    """The scan; its voxels may have been dropped."""
    source: str | Path | nib.Nifti1Image
    """The user's path, or the image."""
    series: Series | None
    """The DICOM series that the scan was converted from, if it was."""
    output: Path | None
    task: Task
    options: Options

    @property
    def folder(self) -> Path | None:
        """Folder of the files beside the label map, or among the masks."""
        return None if self.output is None else report_folder(self.output, self.options)


@dataclass(frozen=True, slots=True, kw_only=True)
class Segmentation:
    """The label map and statistics that a run returns."""

    image: nib.Nifti1Image
    """uint8 label map, in the numbering of the options."""
    statistics: Statistics | None
    """Statistics of the classes, if they were asked for."""
    saved: tuple[str, ...]
    """What was written and where, for the last line of a run."""


def write_results(results: Results, progress: Progress) -> Segmentation:
    """Write all results except the report of the run."""
    options, output = results.options, results.output
    renumbered_map = in_wanted_order(results)
    saved = []
    if output is not None and not options.skip_saving:
        progress.stage("Saving")
        save(results, renumbered_map, output)
        saved.append(describe(output, options, masks=len(results.task.classes)))
    if options.preview:
        progress.stage("Drawing")
        save_preview(results)
    statistics = None
    if options.statistics:
        progress.stage("Measuring")
        statistics = measure_classes(results)
        path = save_statistics(results, statistics)
        saved += [] if path is None else [f"statistics in {path}"]
    if options.radiomics and output is not None:
        progress.stage("Radiomics")
        save_radiomics(results, output)
    return Segmentation(image=renumbered_map, statistics=statistics, saved=tuple(saved))


def in_wanted_order(results: Results) -> nib.Nifti1Image:
    """Return the label map, with ``v1_order`` in the numbering of version 1.

    Classes of version 2 only are then lost, and classes of version 1 only are empty.
    """
    labels, task = results.label_map.image, results.task
    if not results.options.v1_order or task.name != "total":
        return labels
    names = CLASS_MAPS["total_v1"]
    if task.selected:
        names = {label: name for label, name in names.items() if name in task.classes.values()}
    voxels = renumbered(np.asanyarray(labels.dataobj), task.classes, names)
    header = labels.header.copy()
    header.extensions.pop()  # the table of names
    return label_image(voxels, affine=labels.affine, header=header, names=names)


def save(results: Results, result: nib.Nifti1Image, output: Path) -> None:
    """Write the label map, or one mask per class and the derived masks.

    Masks come from labels in the task's own numbering, so that no class is lost to renumbering.
    """
    options, task = results.options, results.task
    threads = min(usable_cores(), options.nr_thr_saving)
    names_each = not task.name.startswith("total")
    with PendingFiles() as files:
        with timed("Saving segmentations...", "  Saved in"):
            if options.multilabel:
                _write_label_maps(results, result, output, files=files, threads=threads)
            else:
                for name in task.classes.values() if names_each else ():
                    logger.info("Creating %s.nii.gz", name)
                write_masks(
                    results.label_map.image,
                    task.classes,
                    folder=output,
                    files=files,
                    threads=threads,
                )
        if writes_skin(task, options):
            _write_body_and_skin(results, output, files=files, threads=threads)
    # Like upstream: Nora gets NIfTI files, and none if DICOM is written.
    if options.nora_tag is not None and not options.dicom_types:
        if options.ml:
            add_to_nora(
                list(output_files(output, options).values()), tag=options.nora_tag, kind=ATLAS
            )
        else:
            masks = [output / f"{name}.nii.gz" for name in task.classes.values()]
            add_to_nora(masks, tag=options.nora_tag, kind=MASK)


def _write_label_maps(
    results: Results, result: nib.Nifti1Image, output: Path, *, files: PendingFiles, threads: int
) -> None:
    """Write one file per output type, each with all classes."""
    labels = results.label_map.voxels
    for kind, path in output_files(output, results.options).items():
        if kind == "nifti":
            write_labels(result, path, files=files, threads=threads)
        elif results.series is not None:
            write_dicom(
                kind, labels, results.task.classes, series=results.series, target=path, files=files
            )


def writes_skin(task: Task, options: Options) -> bool:
    """Whether masks of body and skin are derived, which needs the scan's voxels."""
    return task.name == "body" and not options.multilabel and not options.no_derived_masks


def _write_body_and_skin(
    results: Results, output: Path, *, files: PendingFiles, threads: int
) -> None:
    """Write the masks that upstream derives for the task body, with fresh headers."""
    body = np.asfortranarray(results.label_map.image.dataobj) > 0
    logger.info("Creating body.nii.gz")
    logger.info("Creating skin.nii.gz")
    for name, voxels in (("body", body.view(np.uint8)), ("skin", skin_mask(results.image, body))):
        mask = label_image(voxels, affine=results.label_map.image.affine, header=None, names=None)
        write_labels(mask, output / f"{name}.nii.gz", files=files, threads=threads)


def save_preview(results: Results) -> None:
    """Draw the result into the folder of the masks, or beside the label map."""
    if results.folder is None:
        logger.warning("WARNING: No output directory specified. Skipping preview generation.")
        return
    from totalfast.preview.page import draw_preview, save_picture

    task = results.task
    with timed("Generating preview...", "  Drawn in"):
        labels = results.label_map.voxels
        affine = np.asarray(results.label_map.image.affine, dtype=np.float64)
        grid = Grid(shape=labels.shape, affine=affine)
        picture = draw_preview(results.image, labels, grid, task.classes, title=f"task {task.name}")
        save_picture(picture, results.folder / f"preview_{task.name}.png")


def measure_classes(results: Results) -> Statistics:
    """Return the statistics of the model grid, or measure on the scanner grid."""
    if results.label_map.statistics is not None:
        return results.label_map.statistics
    return measure_scan(
        results.label_map.image, results.image, results.task.classes, results.options
    )


def save_statistics(results: Results, statistics: Statistics) -> Path | None:
    """Write the statistics to the user's file, or into the folder of the results."""
    path = results.options.statistics
    if isinstance(path, bool):
        if results.folder is None:
            return None
        path = results.folder / "statistics.json"
    _write_json(statistics, path, indent=4)
    return path


def save_radiomics(results: Results, folder: Path) -> None:
    """Let upstream compute radiomics features of all masks in a folder into one file."""
    with timed("Calculating radiomics...", "  calculated in"), PendingFiles() as files:
        source = (
            results.source if isinstance(results.source, nib.Nifti1Image) else Path(results.source)
        )
        write_radiomics(source, folder, files.path(folder / "statistics_radiomics.json"))


def save_report(
    results: Results, empty_classes: EmptyClasses, *, device: torch.device, elapsed_s: float
) -> None:
    """Write upstream's report of a run, and why classes are empty."""
    path = results.options.report
    if path is None:
        return
    from totalfast.about import version

    options, types = results.options, results.options.output_type
    facts = python_api().build_run_report(
        input=results.source,
        output=results.output,
        task=results.task.name,
        device=device,
        fast=options.fast,
        fastest=options.fastest,
        ml=options.ml,
        output_type=types[0] if len(types) == 1 else list(types),
        roi_subset=None if options.selected is None else list(options.selected),
        runtime_seconds=elapsed_s,
        save_lowres=options.lowres,
    )
    facts["totalfast"] = {"version": version(), "empty_classes": empty_classes.reasons}
    _write_json(facts, path, indent=2)
    logger.info("Run report written to %s", path)


def _write_json(content: dict[str, Any], path: Path, *, indent: int) -> None:
    with PendingFiles() as files:
        files.path(path).write_text(json.dumps(content, indent=indent))
