"""Sort many DICOM files into series, with few attributes of each file.

Files of a series have headers that are almost equal. ``glance`` reads the attributes that decide
whether a file is a slice, without decoding them; ``Survey`` reads the whole header of the first
slice with the same attributes, and takes the others for slices of its series. Damage that shows in
other attributes is found when the series is read.
"""

from __future__ import annotations

import functools
import io
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from totalfast.files.dicom.find import errors_of_damage
from totalfast.files.dicom.header import (
    LONGEST_HEADER,
    META_BYTES,
    USUAL_HEADER,
    NotASlice,
    inflate,
    looks_like_dicom,
    read_slices,
)

if TYPE_CHECKING:
    from pydicom import Dataset
    from pydicom.tag import BaseTag

    from totalfast.files.dicom.find import DicomFile
    from totalfast.files.dicom.header import Slice

DECIDING = (
    "SOPClassUID",
    "SeriesInstanceUID",
    "SeriesNumber",
    "SeriesDescription",
    "StudyInstanceUID",
    "AccessionNumber",
    "SpecificCharacterSet",
    "ImageType",
    "Modality",
    "Rows",
    "Columns",
    "SamplesPerPixel",
    "BitsAllocated",
    "PixelRepresentation",
    "PixelSpacing",
    "ImageOrientationPatient",
)
"""Attributes that decide whether a file is a slice, and of which series."""

NO_PIXELS = 9
"""Bytes of compressed pixels at least; an element without a value has 8."""

PADDING = b" \0"
"""Bytes that make the length of a value even."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SeriesHeader:
    """What all slices of a series have in common.

    Parameters
    ----------
    uid, number, description, modality
        Of the series; empty if the header has none.
    study, accession
        StudyInstanceUID and AccessionNumber; empty if the header has none.
    is_original, is_reformatted
        Whether ImageType does not start with DERIVED; whether it is DERIVED and SECONDARY, as that
        of projections and reformatted series.
    """

    uid: str
    number: str
    description: str
    modality: str
    study: str
    accession: str
    is_original: bool
    is_reformatted: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What a file holds.

    Parameters
    ----------
    series
        None if the file is no slice.
    positions
        Of its slices, LPS, mm; one for each frame.
    reason
        Why the file is no slice; without values of the header.
    """

    series: SeriesHeader | None = None
    positions: tuple[tuple[float, ...], ...] = ()
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Glance:
    """Attributes of a file, not decoded.

    Parameters
    ----------
    is_dicom
        Whether it can be DICOM.
    key
        Values of ``DECIDING``; None if the file must be read as a whole.
    position
        ImagePositionPatient.
    pixel_bytes, is_compressed
        Bytes that follow the header, and whether they are compressed.
    """

    is_dicom: bool
    key: tuple[object, ...] | None = None
    position: tuple[float, ...] = ()
    pixel_bytes: int = 0
    is_compressed: bool = False


@functools.cache
def _tags() -> tuple[BaseTag, ...]:
    """Of ``DECIDING``, and of the attributes whose values differ from slice to slice."""
    from pydicom.tag import Tag

    return tuple(map(Tag, (*DECIDING, "ImagePositionPatient", "NumberOfFrames")))


def glance(file: DicomFile) -> Glance:
    """Read few attributes of a file; safe to call from several threads.

    The caller is within ``values_unchecked``, which is a setting of the whole process.
    """
    from pydicom import dcmread
    from pydicom.uid import DeflatedExplicitVRLittleEndian

    unusual = Glance(is_dicom=True)
    try:
        with file.open(USUAL_HEADER) as stream:
            if file.size == 0 or not looks_like_dicom(stream):
                return Glance(is_dicom=False)
            start = stream.read(META_BYTES)
            stream.seek(0)
            if DeflatedExplicitVRLittleEndian.encode() in start:
                return unusual  # pydicom would unpack the whole file
            header = dcmread(
                stream, stop_before_pixels=True, force=True, specific_tags=list(_tags())
            )
            end = stream.tell()
            if file.member is not None and end >= stream.seek(0, io.SEEK_END) < file.size:
                return unusual
            return _glance_of(header, file.size - end)
    except errors_of_damage():
        return unusual


def _glance_of(header: Dataset, pixel_bytes: int) -> Glance:
    stored = {tag: element.value for tag, element in header.items()}
    *deciding, position, frames = (_comparable(stored.get(tag)) for tag in _tags())
    many = frames is not None and frames.strip(PADDING) not in (b"", b"1")
    if many or (position is None and "Rows" in header):
        return Glance(is_dicom=True)  # positions are in functional groups, if there are any
    numbers = () if position is None else tuple(map(float, position.strip(PADDING).split(b"\\")))
    if not all(map(math.isfinite, numbers)):
        return Glance(is_dicom=True)
    meta = header.file_meta
    syntax = meta.get("TransferSyntaxUID")
    return Glance(
        is_dicom=True,
        key=(
            *deciding,
            str(meta.get("MediaStorageSOPClassUID")),
            str(syntax),
            len(numbers),
        ),
        position=numbers,
        pixel_bytes=pixel_bytes,
        is_compressed=syntax is not None and syntax.is_compressed,
    )


def _comparable(value: Any) -> Any:  # noqa: ANN401 - a header can hold anything
    """Bytes of a value, or the text of those that pydicom decodes at once."""
    return value if value is None or isinstance(value, bytes) else str(value)


class Survey:
    """Sorts files into series, and remembers the headers that it has read.

    Use it within ``values_unchecked``, in one thread.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], tuple[Contents, int]] = {}

    def sort(self, file: DicomFile, seen: Glance) -> Contents:
        """Return what a file holds, of which ``glance`` has read some attributes."""
        if not seen.is_dicom:
            return Contents(reason=_reason_of_other(file))
        if seen.key is None:
            return _read(file)[0]
        contents, pixel_bytes = self._known.get(seen.key, (None, 0))
        is_cut_off = seen.pixel_bytes < (NO_PIXELS if seen.is_compressed else pixel_bytes)
        if contents is not None and not is_cut_off:
            return replace(contents, positions=(seen.position,))
        contents, pixel_bytes = _read(file)
        if contents.series is not None:  # a refusal may be due to this file's other attributes
            self._known[seen.key] = contents, pixel_bytes
        return contents


def _reason_of_other(file: DicomFile) -> str:
    if file.size == 0:
        return "empty (0 bytes)"
    return "not DICOM"


def _read(file: DicomFile) -> tuple[Contents, int]:
    """Read the header of a file: what it holds, and the bytes of its first slice's pixels."""
    try:
        slices = read_slices(file)
        series = _series_header(file, slices[0])
    except NotASlice as reason:
        return Contents(reason=str(reason)), 0
    except PermissionError:
        return Contents(reason="not readable by this user"), 0
    except errors_of_damage():
        return Contents(reason="damaged, or cut off within the header"), 0
    (rows, columns), dtype = slices[0].shape, slices[0].dtype
    positions = tuple(each.position for each in slices)
    return Contents(series=series, positions=positions), rows * columns * dtype.itemsize


def _series_header(file: DicomFile, first: Slice) -> SeriesHeader:
    from pydicom import dcmread

    with file.open() as stream:
        header = dcmread(
            inflate(stream, LONGEST_HEADER)[0],
            stop_before_pixels=True,
            force=True,
            specific_tags=["ImageType", "StudyInstanceUID", "AccessionNumber"],
        )
    kinds = str(header.get("ImageType") or "").upper()
    return SeriesHeader(
        uid=first.series.strip(),
        number=first.number,
        description=first.description.strip(),
        modality=first.modality,
        study=str(header.get("StudyInstanceUID") or ""),
        accession=str(header.get("AccessionNumber") or "").strip(),
        is_original=not first.derived,
        is_reformatted=first.derived and "SECONDARY" in kinds,
    )
