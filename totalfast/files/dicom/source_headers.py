"""Headers of a series as upstream's writers of DICOM files need them: repaired copies.

The writers read a folder of slices. They understand upright axial slices with valid values only.
They get copies without pixels; the user's files are never changed.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from totalfast.errors import OutputError
from totalfast.files.dicom.find import errors_of_damage, values_unchecked
from totalfast.files.dicom.frames import has_frames, header_of_frame
from totalfast.files.dicom.header import LONGEST_HEADER, inflate

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from pydicom import DataElement, Dataset

    from totalfast.files.dicom.frames import FrameReference
    from totalfast.files.dicom.header import Slice
    from totalfast.files.dicom.read import Series

logger = logging.getLogger(__name__)

UPRIGHT = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
"""Direction cosines of axial slices of a patient who lies on the back, head first."""

MAY_BE_EMPTY = (
    "StudyDate",
    "StudyTime",
    "AccessionNumber",
    "ReferringPhysicianName",
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "PatientSex",
    "StudyID",
)
"""Attributes of type 2: they must be present, and an empty value means unknown."""

ONE_PER_SERIES = ("SeriesInstanceUID", "StudyInstanceUID", "PatientID", "FrameOfReferenceUID")
"""Attributes that all slices share; a result belongs to one series, study and patient."""

CHECKED = frozenset({"AS", "CS", "DA", "DT", "TM", "UI"})
"""Kinds of values whose form is checked, because the writers refuse invalid ones."""

TEXTS = frozenset({"LO", "LT", "PN", "SH", "ST", "UC", "UT"})
"""Kinds of values whose letters are encoded by SpecificCharacterSet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceHeaders:
    """Repaired headers, one per slice of a series.

    Parameters
    ----------
    headers
        In the order of the slices.
    frames
        Instance UID of a header to the frame of the multi-frame file that it was made of.
    """

    headers: list[Dataset]
    frames: Mapping[str, FrameReference]


def source_headers(series: Series) -> SourceHeaders:
    """Read all headers of a series and repair them.

    Raises
    ------
    OutputError
        If a header can't be read, or slices belong to different studies or patients.
    """
    headers, repaired, frames = [], set(), {}
    opened: tuple[object, Dataset | None] = (None, None)
    for each in series.slices:
        try:
            with values_unchecked():
                if opened[0] is not each.file or opened[1] is None:
                    opened = (each.file, _read(each))
                header: Dataset = opened[1]  # type: ignore[assignment]
                if has_frames(header):
                    header, frame = header_of_frame(header, each)
                    frames[str(header.SOPInstanceUID)] = frame
                repaired |= _repair(header)
        except errors_of_damage() as error:
            raise OutputError(
                f"the header of {each.file.name} in {series.source} can't be copied into a DICOM "
                f"result ({type(error).__name__}). Use output type 'nifti'."
            ) from error
        headers.append(header)
    for keyword in ONE_PER_SERIES:
        if len({str(header.get(keyword)) for header in headers}) > 1:
            raise OutputError(
                f"a DICOM result can't be written for {series.source}: its slices have different "
                f"values of {keyword}. Use output type 'nifti'."
            )
    _fill(series, headers, repaired)
    if repaired:
        logger.warning(
            "WARNING: Attributes of %s that are missing or not valid were completed or left empty "
            "in the DICOM result: %s.",
            series.source,
            ", ".join(sorted(repaired)),
        )
    return SourceHeaders(headers=headers, frames=frames)


def _read(each: Slice) -> Dataset:
    from pydicom import dcmread
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import UID, ExplicitVRLittleEndian

    with each.file.open() as stream:
        inflated, _ = inflate(stream, LONGEST_HEADER)
        header = dcmread(inflated, stop_before_pixels=True, force=True)
    header.remove_private_tags()
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header.file_meta.MediaStorageSOPClassUID = UID(each.kind or "1.2")
    instance = UID(str(header.get("SOPInstanceUID") or "1.2"))
    header.file_meta.MediaStorageSOPInstanceUID = instance
    return header


def _repair(header: Dataset) -> set[str]:
    """Remove or empty values that are not valid; return their keywords."""
    repaired = set()
    for tag in list(header.keys()):
        keyword = ""
        try:
            element = header[tag]
            keyword = element.keyword
            valid = element.VR not in CHECKED or _is_valid(element)
        except (ArithmeticError, LookupError, NotImplementedError, TypeError, ValueError):
            valid = False
        if not valid:
            del header[tag]
            repaired |= {keyword} - {""}
    sex = str(header.get("PatientSex") or "")
    if sex not in ("", "F", "M", "O"):
        header.PatientSex = sex.upper() if sex.upper() in ("F", "M", "O") else ""
        repaired.add("PatientSex")
    for keyword in MAY_BE_EMPTY:
        if header.get(keyword) is None:
            setattr(header, keyword, "")
    header.decode()
    characters = header.get("SpecificCharacterSet")
    if characters is not None and not _is_known(characters):
        header.SpecificCharacterSet = "ISO_IR 192"
    return repaired


def _is_known(characters: object) -> bool:
    """Whether it names one character set; the writers fail for several, or an empty first one."""
    from pydicom.charset import python_encoding

    return isinstance(characters, str) and bool(characters) and characters in python_encoding


def _is_valid(element: DataElement) -> bool:
    from pydicom.config import RAISE
    from pydicom.valuerep import validate_value

    for value in element.value if element.VM > 1 else [element.value]:
        if value not in (None, ""):
            validate_value(element.VR, str(value), RAISE)
            if element.VR == "DA":
                _check_date(str(value))
    return True


def _check_date(value: str) -> None:
    import datetime

    datetime.date(int(value[:4]), int(value[4:6]), int(value[6:8]))


def _fill(series: Series, headers: Sequence[Dataset], repaired: set[str]) -> None:
    """Add what the standard or the writers need: the same value to all slices."""
    from pydicom.uid import generate_uid

    thickness_mm = abs(series.slices[1].distance - series.slices[0].distance)
    first = headers[0]
    for keyword in ("FrameOfReferenceUID", "SeriesInstanceUID", "StudyInstanceUID"):
        if keyword not in first or (keyword == "FrameOfReferenceUID" and not first.get(keyword)):
            entropy = [keyword, *(str(header.get("SOPInstanceUID")) for header in headers)]
            uid = generate_uid(entropy_srcs=entropy)
            for header in headers:
                setattr(header, keyword, uid)
            repaired.add(keyword)
    for header, each in zip(headers, series.slices, strict=True):
        if header.get("SliceThickness") is None:
            header.SliceThickness = f"{thickness_mm:.8g}"
            repaired.add("SliceThickness")
        if "SOPInstanceUID" not in header:
            header.SOPInstanceUID = generate_uid()
            repaired.add("SOPInstanceUID")
        if "SOPClassUID" not in header:
            header.SOPClassUID = ""  # upstream's writer chooses one by the modality
        header.Modality = each.modality or header.get("Modality", "")


def hide_texts(headers: Sequence[Dataset]) -> dict[str, str]:
    """Empty texts with letters other than ASCII, which the writers can't encode.

    Returns
    -------
        Keyword to text, of the first header; for the result.
    """
    hidden = {}
    for header in headers:
        for element in list(header.iterall()):
            text = str(element.value) if element.VR in TEXTS else ""
            if not text.isascii():
                if header is headers[0] and header.get(element.keyword) == element.value:
                    hidden[element.keyword] = text
                element.value = ""
    return hidden


def save_headers(headers: Sequence[Dataset], folder: Path, shape: tuple[int, int]) -> None:
    """Write headers as files of slices with blank pixels of one bit, of a shape (rows, columns)."""
    rows, columns = shape
    blank = bytes(-(-rows * columns // 8) + 1 & ~1)
    for number, header in enumerate(headers):
        header.Rows, header.Columns, header.NumberOfFrames = rows, columns, 1
        header.BitsAllocated = header.BitsStored = 1
        header.HighBit = header.PixelRepresentation = 0
        header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
        header.PixelData = blank
        header["PixelData"].VR = "OB"
        del header.NumberOfFrames
        header.save_as(folder / f"{number:06d}.dcm", enforce_file_format=True)
