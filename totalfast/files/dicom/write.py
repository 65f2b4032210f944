"""Write labels as DICOM SEG and RT structure set, with upstream's own writers.

Knows what those writers can do right and refuses the rest before any work is done; knows nothing
of how labels were found.
"""

from __future__ import annotations

import importlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from totalfast import upstream
from totalfast.errors import OptionError, OutputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from totalfast.files.dicom.read import Series
    from totalfast.system.pending_files import PendingFiles

PACKAGES = {"dicom_rtstruct": "rt_utils", "dicom_seg": "highdicom"}
"""Output type to the package that upstream writes it with."""

DIRECTIONS = {
    "axial": ((0, 1), (1, 1)),
    "coronal": ((0, 1), (2, -1)),
    "sagittal": ((1, 1), (2, -1)),
}
"""What upstream's writers (2.18.0) take for granted of the rows and the columns of each plane: the
axis of LPS space that they run along, and in which direction."""


def check_packages(types: Sequence[str]) -> None:
    """Import what the writers of these output types need.

    Raises
    ------
    OptionError
        If it is not installed, or can't be imported.
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
    """Refuse a series whose labels upstream's writers would turn or fail on.

    Raises
    ------
    OptionError
        If it is a multi-frame file, oblique, or has rows where columns are usual; for
        "dicom_rtstruct" if it has files that are no slices of the image; for "dicom_seg" if it is
        sagittal and not square.
    """
    if not types:
        return
    source, shape = series.source, series.image.shape
    if series.orientation is None:
        raise OptionError(f"{types[0]} can't be written for multi-frame files as in {source}.")
    plane = upstream.dicom_plane(series.orientation)
    along = tuple(int(np.argmax(np.abs(cosines))) for cosines in _row_and_column(series))
    if plane not in DIRECTIONS or along != tuple(axis for axis, _ in DIRECTIONS[plane]):
        cosines = ", ".join(f"{cosine:.3g}" for cosine in series.orientation)
        raise OptionError(
            f"{types[0]} can't be written for {source}: its slices are {plane} and run along "
            f"({cosines}), which TotalSegmentator's writer would turn. Take 'nifti'."
        )
    if "dicom_rtstruct" in types and series.slices not in shape[:3]:
        raise OptionError(
            f"dicom_rtstruct can't be written for {source}: its series has {series.slices} files, "
            f"but the image made of them is {' x '.join(map(str, shape))}."
        )
    if "dicom_seg" in types and plane == "sagittal" and shape[1] != shape[2]:
        raise OptionError(
            f"dicom_seg can't be written for {source}: TotalSegmentator's writer takes sagittal "
            f"slices only if they are square, not {shape[2]} x {shape[1]}."
        )


def _row_and_column(series: Series) -> NDArray[np.float64]:
    return np.reshape(np.asarray(series.orientation, dtype=np.float64), (2, 3))


def _as_the_writer_expects(
    labels: NDArray[np.uint8], series: Series, kind: str
) -> NDArray[np.uint8]:
    """Mirror labels (x, y, z) where the writer would mirror them, as of patients lying prone.

    It goes by the plane alone, but for the direction of an axial slice's columns, and the RT
    structure set's slices are numbered along the normal, whichever way that points.
    """
    directions = DIRECTIONS[upstream.dicom_plane(series.orientation or ())]
    against = [
        bool(cosines[axis] * direction < 0)
        for cosines, (axis, direction) in zip(_row_and_column(series), directions, strict=True)
    ]
    (row, _), (column, _) = directions
    mirrored: tuple[int, ...] = (row,) if against[0] else ()
    if against[1] and directions != DIRECTIONS["axial"]:
        mirrored += (column,)
    if kind == "dicom_rtstruct" and against[0] != against[1]:
        mirrored += (3 - row - column,)
    flipped: NDArray[np.uint8] = np.flip(labels, mirrored)
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
    """Write labels as one of the DICOM types.

    Parameters
    ----------
    kind
        "dicom_seg" or "dicom_rtstruct".
    labels
        uint8, (x, y, z), on the grid of the series' image.
    names
        Label to name; absent ones are left out.
    series
        The series that the labels are of.
    target
        File to write; a folder gets a file named after its SeriesInstanceUID ("dicom_seg").
    files
        Where the file is registered.

    Raises
    ------
    OutputError
        If no label is present and the type can't say so.
    """
    present = _present(labels, names)
    if kind == "dicom_seg" and not present:
        raise OutputError(f"no structure was found, and a DICOM SEG needs one: {target}.")
    labels = _as_the_writer_expects(labels, series, kind)
    try:
        if kind == "dicom_rtstruct":
            part = files.path(target, ending=".dcm")
            upstream.write_rtstruct(labels, present, series.folder, part)
        elif target.is_dir():
            with tempfile.TemporaryDirectory(prefix=".totalfast-", dir=target) as folder:
                upstream.write_dicom_seg(labels, present, series.folder, Path(folder))
                for written in Path(folder).iterdir():
                    written.replace(files.path(target / written.name))
        else:
            upstream.write_dicom_seg(labels, present, series.folder, files.path(target))
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        # What the writers raise where a series lacks an attribute, or has one they do not expect.
        raise OutputError(
            f"TotalSegmentator's writer can't make {target} of {series.source}: {error}"
        ) from error


def _present(labels: NDArray[np.uint8], names: Mapping[int, str]) -> dict[int, str]:
    """Keep the names whose label occurs; the writers would look at the whole image for each."""
    occurs = np.zeros(256, dtype=np.bool_)
    for plane in range(labels.shape[2]):
        occurs[np.unique(labels[:, :, plane])] = True
    return {label: name for label, name in names.items() if occurs[label]}
