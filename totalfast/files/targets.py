"""Names of a run's output files, checked before any work is done."""

from __future__ import annotations

from typing import TYPE_CHECKING

from totalfast.errors import OutputError

if TYPE_CHECKING:
    from pathlib import Path

    from totalfast.options import Options

ENDINGS = {"nifti": ".nii.gz", "dicom_rtstruct": "_rtstruct.dcm", "dicom_seg": "_seg.dcm"}
"""Output type to the ending that upstream uses if several types are written."""


def label_map_file(output: Path) -> Path:
    """Return the file of a label map.

    A name without an ending gets ``.nii``, even if a directory with that name exists. This is
    nibabel's rule for TotalSegmentator's files, and 3D Slicer's extension relies on it.
    """
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
    if output.is_dir():
        folder, base = output, f"{options.task}_segmentation"
    else:
        folder, base = output.parent, output.name.partition(".")[0]
    return {kind: folder / f"{base}{ENDINGS[kind]}" for kind in options.output_type}


def report_folder(output: Path, options: Options) -> Path:
    """Folder of files about a result, such as statistics: a file's folder, or the masks' folder."""
    return output.parent if options.multilabel else output


def describe(output: Path, options: Options, *, masks: int) -> str:
    """Describe in a few words which files were written, and where."""
    nifti = "label map" if options.multilabel else f"{masks} masks"
    names = {"nifti": nifti, "dicom_seg": "DICOM SEG", "dicom_rtstruct": "RT structure set"}
    if len(options.output_type) > 1:
        output = next(iter(output_files(output, options).values())).parent
    elif options.multilabel:
        (output,) = output_files(output, options).values()
    return f"{', '.join(names[kind] for kind in options.output_type)} in {output}"


def check_output(output: Path, options: Options) -> None:
    """Check that the output path can be written.

    Raises
    ------
    OutputError
        If a file's path is a directory or has a wrong ending, or a directory's path is a file.
    """
    if options.multilabel:
        for kind, path in output_files(output, options).items():
            _check_file(kind, path)
    elif output.exists() and not output.is_dir():
        raise OutputError(f"{output} is a file; without --ml the output must be a directory.")
    for parent in output.parents:
        if parent.exists():
            if not parent.is_dir():
                raise OutputError(f"{parent} is a file, so {output} can't be created in it.")
            break


def _check_file(kind: str, path: Path) -> None:
    if path.is_dir() and kind != "dicom_seg":
        raise OutputError(
            f"{path} is a directory; name a file, for example "
            f"{path / f'segmentation{ENDINGS[kind]}'}."
        )
    if kind == "nifti" and not path.name.endswith((".nii", ".nii.gz")):
        raise OutputError(f"{path} must end in .nii.gz or .nii with --ml.")
