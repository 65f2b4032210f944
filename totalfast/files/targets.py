"""Names of a run's output files, checked before any work is done."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from totalfast.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from totalfast.options import Options
    from totalfast.tasks import Task

logger = logging.getLogger(__name__)

ENDINGS = {"nifti": ".nii.gz", "dicom_rtstruct": "_rtstruct.dcm", "dicom_seg": "_seg.dcm"}
"""Output type to the ending that upstream uses if several types are written."""

KNOWN_ENDINGS = (".nii.gz", ".nii", ".dcm")
"""Endings that are cut off a name before another one is added. Other dots belong to the name, for
example in a DICOM UID."""

DERIVED_MASKS = ("body", "skin")
"""Masks that upstream derives for task "body"."""

FOLDER_MARKER = "totalfast-complete.json"
"""Name of the completion marker in a folder of masks."""

FILE_MARKER_ENDING = ".complete.json"
"""Ending of the completion marker beside a label map."""

LABEL_MAP_RATIO, MASK_RATIO = 100, 1000
"""How many bytes of voxels become one byte of a gzipped file; real scans are near these values."""


def label_map_file(output: Path) -> Path:
    """Return the file of a label map.

    A name without an ending gets ``.nii``, even if a directory with that name exists. This is
    nibabel's rule for TotalSegmentator's files, and 3D Slicer's extension relies on it.
    """
    if not output.name:
        raise OutputError(
            f"{output} is a folder; name a file, for example {output / 'segmentation.nii.gz'}."
        )
    return output if output.suffix else output.with_name(f"{output.name}.nii")


def output_files(output: Path, options: Options) -> dict[str, Path]:
    """Name the file of each output type, as upstream does.

    Parameters
    ----------
    output
        The user's output path.
    options
        Options with ``multilabel``.

    Returns
    -------
        Output type to file; to a folder only if "dicom_seg" is the only type.
    """
    if len(options.output_type) == 1:
        kind = options.output_type[0]
        if kind == "nifti":
            return {kind: label_map_file(output)}
        if kind == "dicom_rtstruct" and output.suffix != ".dcm":
            output = output.with_name(f"{output.name}.dcm")
        return {kind: output}
    if _is_folder(output):
        folder, base = output, f"{options.task}_segmentation"
    else:
        folder, base = output.parent, _without_ending(output.name)
    return {kind: folder / f"{base}{ENDINGS[kind]}" for kind in options.output_type}


def _without_ending(name: str) -> str:
    for ending in KNOWN_ENDINGS:
        if name.lower().endswith(ending):
            return name[: -len(ending)]
    return name


def nifti_instead(path: Path) -> Path:
    """Return a free name beside a DICOM file, or in its folder, for the labels as NIfTI."""
    base = path / "segmentation" if path.is_dir() else path
    number = 0
    while True:
        ending = f"-{number}.nii.gz" if number else ".nii.gz"
        free = base.with_name(f"{base.name}{ending}")
        if not os.path.lexists(free):
            return free
        number += 1


def output_in(folder: Path, options: Options) -> Path:
    """Return the output of a run that has a folder of its own: the folder, or a file in it."""
    if not options.multilabel:
        return folder
    ending = ".nii.gz" if "nifti" in options.output_type else ".dcm"
    return folder / f"segmentation{ending}"


def report_folder(output: Path, options: Options) -> Path:
    """Folder of files about a result, such as statistics: a file's folder, or the masks' folder."""
    return output.parent if options.multilabel else output


def statistics_file(output: Path | None, options: Options) -> Path | None:
    """Return the file of the statistics; None if none is written."""
    if not isinstance(options.statistics, bool):
        return options.statistics
    if not options.statistics or output is None:
        return None
    return report_folder(output, options) / "statistics.json"


def preview_file(output: Path, task: Task, options: Options) -> Path:
    """Return the file of the preview."""
    return report_folder(output, options) / f"preview_{task.name}.png"


def radiomics_file(output: Path) -> Path:
    """Return the file of the radiomics features."""
    return output / "statistics_radiomics.json"


def marker_file(output: Path, options: Options) -> Path:
    """Return the file that appears after all others."""
    if not options.multilabel:
        return output / FOLDER_MARKER
    first = next(iter(output_files(output, options).values()))
    return first.with_name(f"{first.name}{FILE_MARKER_ENDING}")


def derives_body_and_skin(task: Task, options: Options) -> bool:
    """Whether masks of body and skin are derived, which needs the scan's voxels."""
    return task.name == "body" and not options.multilabel and not options.no_derived_masks


def describe(output: Path, options: Options, *, masks: int) -> str:
    """Describe in a few words which files were written, and where."""
    nifti = "label map" if options.multilabel else f"{masks} masks"
    names = {"nifti": nifti, "dicom_seg": "DICOM SEG", "dicom_rtstruct": "RT structure set"}
    if len(options.output_type) > 1:
        output = next(iter(output_files(output, options).values())).parent
    elif options.multilabel:
        (output,) = output_files(output, options).values()
    return f"{', '.join(names[kind] for kind in options.output_type)} in {output}"


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputPlan:
    """All files that a run will write.

    Parameters
    ----------
    files
        Pairs of what it is, for messages, and its path.
    output
        The user's output path; None writes only files that have a path of their own.
    """

    files: tuple[tuple[str, Path], ...]
    output: Path | None

    @classmethod
    def of(cls, output: Path | None, task: Task, options: Options) -> OutputPlan:
        """List the files of a run.

        Raises
        ------
        OutputError
            If the output's ending does not fit its type.
        """
        saved = None if options.skip_saving else output
        files = [] if saved is None else list(_results(saved, task, options))
        statistics = statistics_file(output, options)
        if statistics is not None:
            files.append(("statistics", statistics))
        if output is not None and options.preview:
            files.append(("preview", preview_file(output, task, options)))
        if output is not None and options.radiomics:
            files.append(("radiomics", radiomics_file(output)))
        if options.report is not None:
            files.append(("report", options.report))
        if options.save_probabilities is not None:
            files.append(("probabilities", options.save_probabilities))
            files.append(("probabilities", options.save_probabilities.with_suffix(".pkl")))
        if saved is not None and options.completion_marker:
            files.append(("completion marker", marker_file(saved, options)))
        return cls(files=tuple(files), output=output)

    @property
    def paths(self) -> tuple[Path, ...]:
        """Paths of all files."""
        return tuple(path for _, path in self.files)

    @property
    def folder(self) -> Path | None:
        """Folder above the results; None if nothing is written."""
        if self.output is not None:
            return self.output.parent
        return self.files[0][1].parent if self.files else None

    def check(self, scan: object) -> None:
        """Refuse files that would replace the scan or each other.

        Parameters
        ----------
        scan
            The scan's path, or another source.

        Raises
        ------
        OutputError
            If two of these names are the same file, also by links.
        """
        places: dict[str, str] = {}
        for what, path in self.files:
            if isinstance(scan, str | os.PathLike) and _is_same_file(path, Path(scan)):
                raise OutputError(f"the {what} {path} would replace the scan; give another name.")
            place = os.path.realpath(path)
            if sys.platform in ("darwin", "win32"):  # names there differ by more than case
                place = place.casefold()
            if place in places:
                raise OutputError(
                    f"the {what} and the {places[place]} have the same name, {path}; give another "
                    "name to one of them."
                )
            places[place] = what
        for place, what in places.items():
            for folder in Path(place).parents:
                if str(folder) in places:
                    raise OutputError(
                        f"the {places[str(folder)]} {folder} can't be a file, because the {what} "
                        "is written into a folder of that name."
                    )

    def sizes(self, shape: tuple[int, ...]) -> dict[Path, int]:
        """Estimate the size of each large file in bytes, from the scan's shape."""
        voxels = math.prod(shape)
        sizes = {}
        for what, path in self.files:
            if what == "mask":
                sizes[path] = voxels // MASK_RATIO
            elif what == "label map":
                sizes[path] = voxels if path.suffix == ".nii" else voxels // LABEL_MAP_RATIO
        return sizes


def _results(output: Path, task: Task, options: Options) -> Iterator[tuple[str, Path]]:
    """List the label maps or masks."""
    if options.multilabel:
        for kind, path in output_files(output, options).items():
            if _is_folder(path) and kind != "dicom_seg":
                raise OutputError(
                    f"{path} is a directory; name a file, for example "
                    f"{path / f'segmentation{ENDINGS[kind]}'}."
                )
            if kind == "nifti":
                if not path.name.endswith((".nii", ".nii.gz")):
                    raise OutputError(f"{path} must end in .nii.gz or .nii with --ml.")
                yield "label map", path
            elif kind == "dicom_seg" and _is_folder(path):
                yield "DICOM SEG", path / "segmentation.dcm"  # named after its UID later
            else:
                yield "DICOM file", path
        return
    if os.path.lexists(output) and not _is_folder(output):
        raise OutputError(f"{output} is a file; without --ml the output must be a directory.")
    if output.name.endswith(KNOWN_ENDINGS):
        logger.warning(
            "WARNING: without --ml, %s becomes a folder with one mask per class.", output.name
        )
    derived = DERIVED_MASKS if derives_body_and_skin(task, options) else ()
    for name in (*task.classes.values(), *derived):
        yield "mask", output / f"{name}.nii.gz"


def _is_folder(path: Path) -> bool:
    """Whether a path is a folder; False for names that the system refuses, such as long ones."""
    with contextlib.suppress(OSError):
        return path.is_dir()
    return False


def _is_same_file(path: Path, scan: Path) -> bool:
    try:
        return path.samefile(scan)
    except OSError:
        return False
