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

    from totalfast.stages.dicom import Series
    from totalfast.stages.write import PendingFiles

PACKAGES = {"dicom_rtstruct": "rt_utils", "dicom_seg": "highdicom"}
"""Output type to the package that upstream writes it with."""

DIRECTIONS = {
    "axial": ((0, 1.0), (1, None)),
    "coronal": ((0, 1.0), (2, -1.0)),
    "sagittal": ((1, 1.0), (2, -1.0)),
}
"""Plane to what upstream's writers take for granted of a row and of a column: the axis of LPS space
that it runs along, and in which direction (None: both are right)."""


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
    """Refuse a series whose labels upstream's writers would turn, mirror or fail on.

    Raises
    ------
    OptionError
        If it is a multi-frame file, oblique or mirrored, or (for "dicom_rtstruct") has files that
        are no slices of the image.
    """
    if not types:
        return
    asked = " and ".join(types)
    if series.orientation is None:
        raise OptionError(f"{asked} can't be written for multi-frame files as in {series.source}.")
    plane = upstream.dicom_plane(series.orientation)
    if not _runs_as_expected(series.orientation, plane):
        cosines = ", ".join(f"{cosine:.3g}" for cosine in series.orientation)
        raise OptionError(
            f"{asked} can't be written for {series.source}: its slices are {plane} and run along "
            f"({cosines}), which TotalSegmentator's writer would mirror or turn. Take 'nifti'."
        )
    found = sorted(series.image.shape[:3])
    if "dicom_rtstruct" in types and series.slices not in found:
        raise OptionError(
            f"dicom_rtstruct can't be written for {series.source}: its series has {series.slices} "
            f"files, but the image made of them is {' x '.join(map(str, series.image.shape))}."
        )


def _runs_as_expected(orientation: tuple[float, ...], plane: str) -> bool:
    if plane not in DIRECTIONS:
        return False
    for cosines, (axis, direction) in zip(
        (orientation[:3], orientation[3:]), DIRECTIONS[plane], strict=True
    ):
        if int(np.argmax(np.abs(cosines))) != axis:
            return False
        if direction is not None and cosines[axis] * direction < 0:
            return False
    return True


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
