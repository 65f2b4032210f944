"""Write labels as DICOM SEG and RT structure set, with upstream's own writers.

The writers place upright axial slices correctly. Other series are given to them as if they were
upright; then the true geometry is put into the result.
"""

from __future__ import annotations

import contextlib
import importlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform

from totalfast import upstream
from totalfast.errors import OptionError, OutputError
from totalfast.files.dicom.find import errors_of_damage, values_unchecked
from totalfast.files.dicom.frames import refer_to_frames
from totalfast.files.dicom.source_headers import (
    UPRIGHT,
    hide_texts,
    save_headers,
    source_headers,
)
from totalfast.files.dicom.voxels import AXES, native_affine

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray
    from pydicom import Dataset

    from totalfast.files.dicom.frames import FrameReference
    from totalfast.files.dicom.read import Series
    from totalfast.system.pending_files import PendingFiles

PACKAGES = {"dicom_rtstruct": "rt_utils", "dicom_seg": "highdicom"}
"""Output type to the package with which upstream writes it."""

REHEARSAL = (8, 8)
"""Rows and columns of the slices with which the writers are tried before the network runs."""

SAME_MM = 1e-3
"""Difference of positions that does not matter."""


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
    """Try the writers with the headers of a series, before any work is done.

    Raises
    ------
    OutputError
        If a writer fails for these headers.
    """
    if not types:
        return
    labels = np.zeros((*REHEARSAL, len(series.slices)), dtype=np.uint8)
    labels[2:5, 3:6, 1:3] = 1
    with tempfile.TemporaryDirectory(prefix="totalfast-", ignore_cleanup_errors=True) as folder:
        for kind in types:
            target = Path(folder) / f"{kind}.dcm"
            _write(kind, labels, {1: "liver"}, series=series, path=target, target=target)


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
    to_native = ornt_transform(axcodes2ornt(AXES), io_orientation(native_affine(series.slices)))
    native = apply_orientation(labels, to_native)
    files.write(
        target,
        lambda staged: _write(kind, native, present, series=series, path=staged, target=target),
        folder=kind == "dicom_seg" and target.is_dir(),
    )


def _write(
    kind: str,
    native: NDArray[np.uint8],
    names: Mapping[int, str],
    *,
    series: Series,
    path: Path,
    target: Path,
) -> None:
    """Write labels (column, row, slice) with upstream's writer, and correct the result."""
    source = source_headers(series)
    headers, frames = source.headers, source.frames
    texts = hide_texts(headers)
    turns = _needs_turn(series, kind)
    if turns:
        _make_upright(headers, series, kind)
    writer = upstream.write_rtstruct if kind == "dicom_rtstruct" else upstream.write_dicom_seg
    before = set(path.iterdir()) if path.is_dir() else set()
    columns, rows, _ = native.shape
    with _temporary_folder(target) as folder, _failures_explained(series, target):
        with values_unchecked():
            save_headers(headers, folder, (rows, columns))
        # The writers take labels of an image with LAS axes, whose rows are reversed.
        writer(np.ascontiguousarray(native[:, ::-1]), names, folder, path)
        if turns or texts or frames:
            (written,) = set(path.iterdir()) - before if path.is_dir() else {path}
            _correct(written, series, texts, frames, turns=turns)


def _needs_turn(series: Series, kind: str) -> bool:
    """Whether the writer would place the labels of this series elsewhere."""
    first, last = series.slices[0], series.slices[-1]
    if first.orientation != UPRIGHT:
        return True
    # rt_utils exchanges the distances of rows and columns, and ignores shear.
    sheared = not np.allclose(first.position[:2], last.position[:2], rtol=0, atol=SAME_MM)
    return kind == "dicom_rtstruct" and (sheared or len(set(first.spacing_mm)) > 1)


def _make_upright(headers: Sequence[Dataset], series: Series, kind: str) -> None:
    """Give the headers upright axial positions: the number of a slice, or its distance in mm."""
    step_mm = 1.0 if kind == "dicom_rtstruct" else _step_mm(series)
    for number, header in enumerate(headers):
        header.ImageOrientationPatient = list(UPRIGHT)
        header.ImagePositionPatient = [0, 0, f"{number * step_mm:.8g}"]
        if kind == "dicom_rtstruct":
            header.PixelSpacing = [1, 1]


def _step_mm(series: Series) -> float:
    first, last = series.slices[0], series.slices[-1]
    return (last.distance - first.distance) / (len(series.slices) - 1)


def _correct(
    path: Path,
    series: Series,
    texts: Mapping[str, str],
    frames: Mapping[str, FrameReference],
    *,
    turns: bool,
) -> None:
    """Put the true geometry, the texts and the references to frames into a result."""
    from pydicom import dcmread

    result = dcmread(path)
    if turns and "ROIContourSequence" in result:
        _turn_contours(result, series)
    elif turns:
        _turn_frames(result, series)
    if texts:
        result.SpecificCharacterSet = "ISO_IR 192"
        for keyword, text in texts.items():
            if keyword in result:
                setattr(result, keyword, text)
    if frames:
        refer_to_frames(result, frames)
    result.save_as(path)


def _turn_contours(result: Dataset, series: Series) -> None:
    """Turn points (column, row, slice) into positions in the patient, LPS."""
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ native_affine(series.slices)
    for roi in result.ROIContourSequence:
        for contour in roi.get("ContourSequence") or ():
            points = np.reshape(np.asarray(contour.ContourData, dtype=np.float64), (-1, 3))
            points = points @ affine[:3, :3].T + affine[:3, 3]
            contour.ContourData = [f"{value:.6f}"[:16] for value in points.ravel()]


def _turn_frames(result: Dataset, series: Series) -> None:
    """Give each frame of a segmentation the position of its slice."""
    step_mm = _step_mm(series)
    shared = result.SharedFunctionalGroupsSequence[0]
    groups = [shared, *result.PerFrameFunctionalGroupsSequence]
    for group in groups:
        if "PlaneOrientationSequence" in group:
            plane = group.PlaneOrientationSequence[0]
            plane.ImageOrientationPatient = _numbers(series.slices[0].orientation)
        if "PlanePositionSequence" in group:
            place = group.PlanePositionSequence[0]
            number = round(float(place.ImagePositionPatient[2]) / step_mm)
            place.ImagePositionPatient = _numbers(series.slices[number].position)


def _numbers(values: Sequence[float]) -> list[str]:
    """Texts of at most 16 letters, DICOM's limit for decimal numbers."""
    from pydicom.valuerep import format_number_as_ds

    return [format_number_as_ds(float(value)) for value in values]


@contextlib.contextmanager
def _temporary_folder(target: Path) -> Iterator[Path]:
    try:
        # Windows can't delete files that are still open; that must not be an error of the run.
        with tempfile.TemporaryDirectory(prefix="totalfast-", ignore_cleanup_errors=True) as folder:
            yield Path(folder)
    except OSError as error:
        raise OutputError(
            f"{target} can't be written: {error.strerror or type(error).__name__}. The writer "
            f"needs a few MB in the folder for temporary files ({tempfile.gettempdir()}); TMPDIR "
            "sets another one."
        ) from error


@contextlib.contextmanager
def _failures_explained(series: Series, target: Path) -> Iterator[None]:
    """The writers raise these errors if an attribute of the series is missing or unexpected.

    The message may quote the header, which holds the patient's name.
    """
    try:
        yield
    except OSError:
        raise
    except errors_of_damage() as error:
        reason = f"an attribute has an invalid value ({type(error).__name__})"
        if isinstance(error, AttributeError):
            reason = str(error)
        raise OutputError(
            f"TotalSegmentator's writer can't write {target.name} for {series.source}: {reason}. "
            "Use output type 'nifti'."
        ) from error


def _present(labels: NDArray[np.uint8], names: Mapping[int, str]) -> dict[int, str]:
    """Keep the names of labels with voxels; the writers would search the whole image per name."""
    occurs = np.zeros(256, dtype=np.bool_)
    for plane in range(labels.shape[2]):
        occurs[np.unique(labels[:, :, plane])] = True
    return {label: name for label, name in names.items() if occurs[label]}
