"""Write labels as DICOM SEG and RT structure set, with upstream's own writers.

Series that these writers can't handle correctly are refused before any work is done.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

import numpy as np

from totalfast import upstream
from totalfast.errors import OptionError, OutputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from totalfast.files.dicom.read import Series
    from totalfast.system.pending_files import PendingFiles

PACKAGES = {"dicom_rtstruct": "rt_utils", "dicom_seg": "highdicom"}
"""Output type to the package with which upstream writes it."""

DIRECTIONS = {
    "axial": ((0, 1), (1, 1)),
    "coronal": ((0, 1), (2, -1)),
    "sagittal": ((1, 1), (2, -1)),
}
"""Directions of rows and columns that upstream's writers (2.18.0) assume per plane: the axis of LPS
space and the sign."""


def check_packages(types: Sequence[str]) -> None:
    """Check that the packages of these output types can be imported.

    Raises
    ------
    OptionError
        If a package is not installed or can't be imported.
    """
    try:
        for kind in types:
            importlib.import_module(PACKAGES[kind])
    except ImportError as error:
        raise OptionError(
            f"output_type '{kind}' needs the package {PACKAGES[kind]} ({error}); install it with "
            "pip install 'totalfast[dicom]'."
        ) from error


def check_series(series: Series, types: Sequence[str]) -> None:
    """Refuse a series for which upstream's writers would fail or rotate the labels.

    Raises
    ------
    OptionError
        If the series is a multi-frame file or oblique, or its rows and columns are swapped. For
        "dicom_rtstruct" also if the number of files is not the number of slices. For "dicom_seg"
        also if the slices are sagittal and not square.
    """
    if not types:
        return
    source, shape = series.source, series.image.shape
    if series.orientation is None:
        raise OptionError(f"{types[0]} can't be written for multi-frame files, such as {source}.")
    plane = upstream.dicom_plane(series.orientation)
    along = tuple(int(np.argmax(np.abs(cosines))) for cosines in _row_and_column(series))
    if plane not in DIRECTIONS or along != tuple(axis for axis, _ in DIRECTIONS[plane]):
        cosines = ", ".join(f"{cosine:.3g}" for cosine in series.orientation)
        raise OptionError(
            f"{types[0]} can't be written for {source}: its slices are {plane} and have direction "
            f"cosines ({cosines}), which TotalSegmentator's writer would rotate. Use 'nifti'."
        )
    if "dicom_rtstruct" in types and series.slices not in shape[:3]:
        raise OptionError(
            f"dicom_rtstruct can't be written for {source}: its series has {series.slices} files, "
            f"but its image has shape {' x '.join(map(str, shape))}."
        )
    if "dicom_seg" in types and plane == "sagittal" and shape[1] != shape[2]:
        raise OptionError(
            f"dicom_seg can't be written for {source}: TotalSegmentator's writer needs square "
            f"sagittal slices, not {shape[2]} x {shape[1]}."
        )


def _row_and_column(series: Series) -> NDArray[np.float64]:
    return np.reshape(np.asarray(series.orientation, dtype=np.float64), (2, 3))


def _as_the_writer_expects(
    labels: NDArray[np.uint8], series: Series, kind: str
) -> NDArray[np.uint8]:
    """Mirror labels (x, y, z) along axes that the writer would mirror, e.g. for prone patients.

    The writers consider only the plane and the direction of an axial slice's columns. The writer of
    RT structure sets numbers the slices along the normal, in either direction.
    """
    directions = DIRECTIONS[upstream.dicom_plane(series.orientation or ())]
    is_reversed = [
        bool(cosines[axis] * direction < 0)
        for cosines, (axis, direction) in zip(_row_and_column(series), directions, strict=True)
    ]
    (row, _), (column, _) = directions
    axes: tuple[int, ...] = (row,) if is_reversed[0] else ()
    if is_reversed[1] and directions != DIRECTIONS["axial"]:
        axes += (column,)
    if kind == "dicom_rtstruct" and is_reversed[0] != is_reversed[1]:
        axes += (3 - row - column,)
    flipped: NDArray[np.uint8] = np.flip(labels, axes)
    return flipped


def write_dicom(
    kind: str,
    labels: NDArray[np.uint8],
    names: Mapping[int, str],
    *,
    series: Series,
    target: Path,
    files: PendingFiles,
) -> None:
    """Write labels as DICOM SEG or RT structure set.

    Parameters
    ----------
    kind
        "dicom_seg" or "dicom_rtstruct".
    labels
        uint8, (x, y, z), on the grid of the series' image.
    names
        Label to name; labels without voxels are not written.
    series
        The series of the scan.
    target
        File to write. For "dicom_seg" it may be a folder; then the file's name is its
        SeriesInstanceUID.
    files
        Registers the file.

    Raises
    ------
    OutputError
        If a DICOM SEG would have no label, or the writer fails for this series.
    """
    present = _present(labels, names)
    if kind == "dicom_seg" and not present:
        raise OutputError(f"no structure was found, but a DICOM SEG needs one: {target}.")
    labels = _as_the_writer_expects(labels, series, kind)
    try:
        writer = upstream.write_rtstruct if kind == "dicom_rtstruct" else upstream.write_dicom_seg
        files.write(
            target,
            lambda staged: writer(labels, present, series.folder, staged),
            folder=kind == "dicom_seg" and target.is_dir(),
        )
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        # The writers raise these errors if an attribute of the series is missing or unexpected. The
        # message of the latter may quote the header, which holds the patient's name.
        reason = f"an attribute has an invalid value ({type(error).__name__})"
        if isinstance(error, AttributeError | LookupError):
            reason = str(error)
        raise OutputError(
            f"TotalSegmentator's writer can't write {target} for {series.source}: {reason}."
        ) from error


def _present(labels: NDArray[np.uint8], names: Mapping[int, str]) -> dict[int, str]:
    """Keep the names of labels with voxels; the writers would search the whole image per name."""
    occurs = np.zeros(256, dtype=np.bool_)
    for plane in range(labels.shape[2]):
        occurs[np.unique(labels[:, :, plane])] = True
    return {label: name for label, name in names.items() if occurs[label]}
