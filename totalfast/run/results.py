"""Write the results of a run: masks or label map, statistics, preview, radiomics, report.

All files are written to a ``PendingFiles``; they get their names when the run commits it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nibabel as nib
import numpy as np

from totalfast.files.dicom.write import write_dicom
from totalfast.files.nora import ATLAS, MASK, add_to_nora
from totalfast.files.targets import (
    derives_body_and_skin,
    describe,
    marker_file,
    nifti_instead,
    output_files,
    preview_file,
    radiomics_file,
    statistics_file,
)
from totalfast.files.write import label_image, write_labels, write_masks
from totalfast.geometry import Grid
from totalfast.labels.clean import skin_mask
from totalfast.labels.merge import renumbered
from totalfast.run.measure import measure_scan
from totalfast.system.cores import usable_cores
from totalfast.system.progress import timed
from totalfast.upstream import CLASS_MAPS, python_api, write_radiomics

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from totalfast.files.dicom.read import Series
    from totalfast.labels.statistics import Statistics
    from totalfast.options import Options
    from totalfast.run.empty_classes import EmptyClasses
    from totalfast.run.restoring import LabelMap
    from totalfast.scan import ScannerImage
    from totalfast.system.pending_files import PendingFiles
    from totalfast.system.progress import Progress
    from totalfast.tasks import Task

logger = logging.getLogger(__name__)


class Failures:
    """Outputs that could not be written, while the others are: a long run is never lost."""

    def __init__(self) -> None:
        self._errors: list[Exception] = []

    def __bool__(self) -> bool:
        return bool(self._errors)

    @contextlib.contextmanager
    def kept(self, what: str) -> Iterator[None]:
        """Keep an error of the context for later; ``what`` is the output, for the message."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - raised by raise_first
            logger.warning("WARNING: the %s could not be written; other results follow.", what)
            self._errors.append(error)

    def raise_first(self) -> None:
        """Raise the first error, if there is one."""
        if self._errors:
            raise self._errors[0]


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
    files: PendingFiles
    """Collects all files of the run."""
    failures: Failures
    """Outputs that could not be written."""

    @property
    def saved_to(self) -> Path | None:
        """The output path, if label maps or masks are written."""
        return None if self.options.skip_saving else self.output


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
    """Write all results except the report and the completion marker."""
    options, output = results.options, results.output
    renumbered_map = in_wanted_order(results)
    saved = []
    if results.saved_to is not None:
        progress.stage("Saving")
        save(results, renumbered_map, results.saved_to)
        saved.append(describe(results.saved_to, options, masks=len(results.task.classes)))
    if options.preview:
        progress.stage("Drawing")
        with results.failures.kept("preview"):
            save_preview(results)
    statistics = None
    if options.statistics:
        progress.stage("Measuring")
        with results.failures.kept("file of statistics"):
            statistics = measure_classes(results)
            path = save_statistics(results, statistics)
            saved += [] if path is None else [f"statistics in {path}"]
    if options.radiomics and output is not None:
        progress.stage("Radiomics")
        with results.failures.kept("file of radiomics"):
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
    with timed("Saving segmentations...", "  Saved in"):
        if options.multilabel:
            _write_label_maps(results, result, output, threads=threads)
        else:
            for name in task.classes.values() if names_each else ():
                logger.info("Creating %s.nii.gz", name)
            write_masks(
                results.label_map.image,
                task.classes,
                folder=output,
                files=results.files,
                threads=threads,
            )
    if derives_body_and_skin(task, options):
        _write_body_and_skin(results, output, threads=threads)


def add_results_to_nora(results: Results) -> None:
    """Add the written files to Nora; like upstream, only NIfTI files, and none beside DICOM."""
    options, output = results.options, results.saved_to
    if output is None or options.nora_tag is None or options.dicom_types:
        return
    if options.ml:
        add_to_nora(list(output_files(output, options).values()), tag=options.nora_tag, kind=ATLAS)
    else:
        masks = [output / f"{name}.nii.gz" for name in results.task.classes.values()]
        add_to_nora(masks, tag=options.nora_tag, kind=MASK)


def _write_label_maps(
    results: Results, result: nib.Nifti1Image, output: Path, *, threads: int
) -> None:
    """Write one file per output type, each with all classes.

    If a DICOM file can't be written and no NIfTI file is wanted, one is written all the same.
    """
    labels = results.label_map.voxels
    paths = output_files(output, results.options)
    for kind, path in paths.items():
        if kind == "nifti":
            write_labels(result, path, files=results.files, threads=threads)
        elif results.series is not None:
            with results.failures.kept("DICOM file"):
                write_dicom(
                    kind,
                    labels,
                    results.task.classes,
                    series=results.series,
                    target=path,
                    files=results.files,
                )
    if results.failures and "nifti" not in paths:
        path = nifti_instead(next(iter(paths.values())))
        write_labels(result, path, files=results.files, threads=threads)
        logger.warning("WARNING: the labels are written to %s instead.", path)


def _write_body_and_skin(results: Results, output: Path, *, threads: int) -> None:
    """Write the masks that upstream derives for the task body, with fresh headers."""
    body = np.asfortranarray(results.label_map.image.dataobj) > 0
    logger.info("Creating body.nii.gz")
    logger.info("Creating skin.nii.gz")
    for name, voxels in (("body", body.view(np.uint8)), ("skin", skin_mask(results.image, body))):
        mask = label_image(voxels, affine=results.label_map.image.affine, header=None, names=None)
        write_labels(mask, output / f"{name}.nii.gz", files=results.files, threads=threads)


def save_preview(results: Results) -> None:
    """Draw the result into the folder of the masks, or beside the label map."""
    if results.output is None:
        logger.warning("WARNING: No output directory specified. Skipping preview generation.")
        return
    from totalfast.preview.page import draw_preview, save_picture

    task = results.task
    with timed("Generating preview...", "  Drawn in"):
        labels = results.label_map.voxels
        affine = np.asarray(results.label_map.image.affine, dtype=np.float64)
        grid = Grid(shape=labels.shape, affine=affine)
        picture = draw_preview(results.image, labels, grid, task.classes, title=f"task {task.name}")
        path = preview_file(results.output, task, results.options)
        save_picture(picture, path, files=results.files)


def measure_classes(results: Results) -> Statistics:
    """Return the statistics of the model grid, or measure on the scanner grid."""
    if results.label_map.statistics is not None:
        return results.label_map.statistics
    return measure_scan(
        results.label_map.image, results.image, results.task.classes, results.options
    )


def save_statistics(results: Results, statistics: Statistics) -> Path | None:
    """Write the statistics to the user's file, or into the folder of the results."""
    path = statistics_file(results.output, results.options)
    if path is not None:
        _write_json(statistics, path, files=results.files, indent=4)
    return path


def save_radiomics(results: Results, folder: Path) -> None:
    """Let upstream compute radiomics features of all masks in a folder into one file."""
    source = results.source
    with timed("Calculating radiomics...", "  calculated in"):
        scan = source if isinstance(source, nib.Nifti1Image) else Path(source)
        masks = results.files.staged(folder)
        results.files.write(
            radiomics_file(folder), lambda staged: write_radiomics(scan, masks, staged)
        )


def save_report(
    results: Results, empty_classes: EmptyClasses, *, device: torch.device, elapsed_s: float
) -> None:
    """Write upstream's report of a run, and why classes are empty.

    Upstream lists the masks in the output folder; here some have no name there yet.
    """
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
    facts["totalfast"] = {
        "version": version(),
        "guided": options.guided,
        "empty_classes": empty_classes.reasons,
    }
    if results.output is not None and not options.multilabel:
        folder = results.output.resolve()
        written = {file.name for file in results.files.targets if file.parent == folder}
        written |= set(facts["output_files"])
        facts["output_files"] = sorted(name for name in written if name.endswith(".nii.gz"))
    _write_json(facts, path, files=results.files, indent=2)


def save_marker(results: Results) -> None:
    """Write the completion marker, which gets its name after all other files."""
    if results.saved_to is None or not results.options.completion_marker or results.failures:
        return
    from totalfast.about import version

    path = marker_file(results.saved_to, results.options)
    folder = path.parent.resolve()
    files = [os.path.relpath(file, folder) for file in results.files.targets]
    content = {
        "totalfast": version(),
        "task": results.task.name,
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "files": sorted(files),
    }
    _write_json(content, path, files=results.files, indent=2, last=True)


def _write_json(
    content: dict[str, Any], path: Path, *, files: PendingFiles, indent: int, last: bool = False
) -> None:
    text = json.dumps(content, indent=indent)
    files.write(path, lambda staged: staged.write_text(text), last=last)
