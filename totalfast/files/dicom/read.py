"""Read a DICOM series from a folder, zip file or multi-frame file, with upstream's converter."""

from __future__ import annotations

import logging
import tempfile
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import nibabel as nib

from totalfast import upstream
from totalfast.errors import InputError, OutputError
from totalfast.files.dicom.find import (
    NOT_SCANS,
    damage_refused,
    find_files,
    link,
    read_header,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from pydicom import Dataset

logger = logging.getLogger(__name__)

FEWEST_SLICES = 4
"""dicom2nifti does not convert series with fewer slices, because they are localizers."""

REASONS = {
    "NON_CUBICAL_IMAGE/GANTRY_TILT": "its slices are sheared, for example by a tilted gantry; "
    "resample it to a volume with right angles first",
    "SLICE_INCREMENT_INCONSISTENT": "its slices are not evenly spaced; some slices are missing, or "
    "it holds more than one scan",
    "IMAGE_ORIENTATION_INCONSISTENT": "its slices are not parallel",
    "TOO_FEW_SLICES/LOCALIZER": f"it has fewer than {FEWEST_SLICES} slices of a volume",
    "NON_IMAGING_DICOM_FILES": "its files hold no image slices",
    "NOT_A_VOLUME": "all its slices have the same position",
    "MISSING_DICOM_FILES": "its time points have different numbers of slices",
}
"""dicom2nifti's error codes and their meaning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """A DICOM series and its converted image.

    Parameters
    ----------
    source
        The user's path.
    folder
        A temporary folder with the series' files only.
    slices
        Number of its files.
    orientation
        Direction cosines of a row and of a column, LPS; None for a multi-frame file.
    image
        (x, y, z), or (x, y, z, t) with several time points; LAS axes.
    """

    source: Path
    folder: Path
    slices: int
    orientation: tuple[float, ...] | None
    image: nib.Nifti1Image


@contextmanager
def open_series(source: Path) -> Iterator[Series]:
    """Convert a DICOM series with upstream's converter; its files exist until the context ends.

    Parameters
    ----------
    source
        A folder (searched with all subfolders), a zip file of such a folder, or one multi-frame
        file.

    Raises
    ------
    InputError
        If the source is missing or damaged, holds no scan or several scans, or would be converted
        incorrectly.
    """
    if not source.exists():
        raise InputError(f"{source} does not exist.")
    logger.info("Converting dicom to nifti...")
    # Windows can't delete files that are still open; that must not be an error of the run.
    with tempfile.TemporaryDirectory(prefix="totalfast-", ignore_cleanup_errors=True) as private:
        unpacked, folder = Path(private) / "unpacked", Path(private) / "series"
        unpacked.mkdir()
        folder.mkdir()
        with damage_refused(source):
            files = _one_series(source, find_files(source, unpacked))
            header = next(iter(files.values()))
            cosines = header.get("ImageOrientationPatient")
            orientation = tuple(map(float, cosines)) if cosines else None
        for number, path in enumerate(files):
            link(path, folder / f"{number:06d}.dcm")
        series = Series(
            source=source,
            folder=folder,
            slices=len(files),
            orientation=orientation,
            image=_convert(source, folder, Path(private) / f"{source.resolve().name}.nii"),
        )
        logger.info("  found image with shape %s", series.image.shape)
        yield series


def refuse_slices(targets: Iterable[Path]) -> None:
    """Refuse to write over files that are slices of a scan.

    Raises
    ------
    OutputError
        If one of the files exists and is an image slice.
    """
    for target in targets:
        if target.is_file():
            header = read_header(target)
            if header is not None and _is_image(header):
                raise OutputError(f"{target} is a slice of a DICOM scan; give another name.")


def _one_series(source: Path, files: list[Path]) -> dict[Path, Dataset]:
    """Select the files of the only scan."""
    images: dict[str, dict[Path, Dataset]] = defaultdict(dict)
    others: set[str] = set()
    for path in files:
        header = read_header(path)
        if header is None:
            continue
        if _is_image(header):
            images[str(header.get("SeriesInstanceUID", ""))][path] = header
        else:
            others.add(str(header.get("Modality", "unknown")))
    if not images:
        seen = f"; its DICOM files have modality {', '.join(sorted(others))}" if others else ""
        raise InputError(
            f"{source} holds no DICOM image slices with a position, an orientation and a number "
            f"({len(files)} files checked{seen}). totalfast reads NIfTI, NRRD, MetaImage, and a "
            "folder or zip file with one DICOM series."
        )
    volumes = [series for series in images.values() if _is_volume(series)]
    if len(volumes) > 1:
        raise InputError(
            f"{source} holds {len(volumes)} DICOM series: {'; '.join(map(_describe, volumes))}. "
            "Give a folder with only one of them."
        )
    series = volumes[0] if volumes else max(images.values(), key=len)
    if len(series) == 1 and source.is_file() and not volumes:
        raise InputError(f"{source} is one DICOM slice; give the folder with its series.")
    _refuse_wrong_frames(source, series)
    return series


def _is_image(header: Dataset) -> bool:
    """Whether dicom2nifti accepts a file, and the file is neither a localizer nor a result."""
    from dicom2nifti.common import is_valid_imaging_dicom

    kinds = header.get("ImageType") or ()
    modality = header.get("Modality")
    localizer = "LOCALIZER" in kinds or (modality == "CT" and "PROJECTION IMAGE" in kinds)
    result = modality in NOT_SCANS
    return bool(is_valid_imaging_dicom(header)) and not localizer and not result


def _frames(header: Dataset) -> int:
    return int(header.get("NumberOfFrames") or 1)


def _is_volume(series: dict[Path, Dataset]) -> bool:
    return sum(map(_frames, series.values())) >= FEWEST_SLICES


def _describe(series: dict[Path, Dataset]) -> str:
    first = next(iter(series.values()))
    name = first.get("SeriesDescription") or first.get("SeriesInstanceUID")
    return f"'{name}' ({first.get('Modality')}, {sum(map(_frames, series.values()))} slices)"


def _refuse_wrong_frames(source: Path, series: dict[Path, Dataset]) -> None:
    """Refuse multi-frame files that dicom2nifti (2.6.2) would convert incorrectly without an error.

    It reads only the first multi-frame file, ignores a scaling that all frames share, and assumes
    that the first and last frame are the first and last slice.
    """
    from dicom2nifti.common import is_multiframe_dicom

    many = {path.name: header for path, header in series.items() if _frames(header) > 1}
    if not many:
        return
    name, header = next(iter(many.items()))
    if len(series) > 1:
        raise InputError(
            f"{source} holds {len(series)} files, of which {len(many)} have many frames (for "
            f"example {name}); give only one multi-frame file, or convert it with dcm2niix."
        )
    if not is_multiframe_dicom([header]):
        raise InputError(
            f"{source}: {name} has {_frames(header)} frames without a position per frame; of "
            "multi-frame files only enhanced CT and MR can be read."
        )
    frames = header.get("PerFrameFunctionalGroupsSequence") or ()
    shared = header.get("SharedFunctionalGroupsSequence") or ()
    scaling = [
        group.PixelValueTransformationSequence[0]
        for group in shared
        if "PixelValueTransformationSequence" in group
    ]
    if any(float(s.RescaleSlope) != 1 or float(s.RescaleIntercept) != 0 for s in scaling):
        raise InputError(
            f"{source}: the frames of {name} share one rescale slope and intercept, which the "
            "converter ignores; convert it with dcm2niix."
        )
    numbers = [
        int(frame.FrameContentSequence[0].get("InStackPositionNumber") or 0)
        for frame in frames
        if "FrameContentSequence" in frame
    ]
    if numbers and (numbers[0], numbers[-1]) != (1, max(numbers)):
        raise InputError(
            f"{source}: the frames of {name} are not stored in the order of their slices; convert "
            "it with dcm2niix."
        )


def _convert(source: Path, folder: Path, path: Path) -> nib.Nifti1Image:
    """Run upstream's converter; the image's voxels are read later."""
    from dicom2nifti.exceptions import ConversionError, ConversionValidationError

    try:
        # Not compressed, unlike upstream's, because it is written twice and read once.
        with damage_refused(source):
            upstream.dicom_to_nifti(folder, path)
    except (ConversionError, ConversionValidationError) as error:
        code = str(error)
        raise InputError(
            f"{source} can't be converted: {REASONS.get(code, code)} ({code})."
        ) from error
    return nib.load(path, mmap=False)
