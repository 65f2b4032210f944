"""Read the header of one DICOM file, with bounded memory, and turn it into slices.

Knows one file at a time; which slices form a volume is decided in ``series``.
"""

from __future__ import annotations

import io
import math
import re
import struct
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from totalfast.files.dicom.find import BOMB_BYTES, BOMB_RATIO, values_unchecked

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import BinaryIO

    from pydicom import Dataset
    from pydicom.sequence import Sequence

    from totalfast.files.dicom.find import DicomFile

PREAMBLE_BYTES = 132
"""A DICOM file starts with 128 arbitrary bytes and the letters DICM."""

LONGEST_HEADER = 1 << 25
"""Bytes of a deflated header at most. Those of files with thousands of frames have some 10 MB."""

USUAL_HEADER = 1 << 16
"""Bytes of a file in a zip file that are read first, for its header."""

APPLE_DOUBLE = b"\x00\x05\x16\x07"
"""First bytes of the files ``._name`` that macOS adds on other file systems."""

NOT_SCANS = frozenset({"KO", "PR", "REG", "RTDOSE", "RTPLAN", "RTSTRUCT", "SEG", "SR"})
"""Modalities of files that are not scans, but are often in a scan's folder."""

META_BYTES = 4096
"""Bytes that hold a file's meta information."""

NOTHING_DEFLATED = b"\x03\x00"
"""Nothing, compressed by raw deflate."""

VALUES = (
    "SOPClassUID",
    "SeriesInstanceUID",
    "SeriesNumber",
    "SeriesDescription",
    "ImageType",
    "Modality",
    "InstanceNumber",
    "NumberOfFrames",
    "NumberOfSlices",
    "ImagesInAcquisition",
    "ImageComments",
    "Rows",
    "Columns",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "PixelSpacing",
    "ImageOrientationPatient",
    "ImagePositionPatient",
    "RescaleSlope",
    "RescaleIntercept",
    "EchoTime",
    "EchoNumbers",
    "InversionTime",
    "FlipAngle",
    "TriggerTime",
    "TemporalPositionIdentifier",
    "DiffusionBValue",
    "AcquisitionNumber",
    "KVP",
    "ConvolutionKernel",
)
SEQUENCES = (
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
    "ModalityLUTSequence",
)
"""Attributes that are read to find the slices."""

PHASES = (
    "TemporalPositionIdentifier",
    "TemporalPositionIndex",
    "EchoTime",
    "EffectiveEchoTime",
    "EchoNumbers",
    "TriggerTime",
    "NominalCardiacTriggerDelayTime",
    "InversionTime",
    "FlipAngle",
    "DiffusionBValue",
    "KVP",
    "ConvolutionKernel",
    "AcquisitionNumber",
    "ImageType",
    "FrameType",
)
"""Attributes in which several images of one slice can differ, the most telling first."""


class NotASlice(Exception):  # noqa: N818 - an answer, not an error
    """The file holds no slice of a volume; the message is the reason, without values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """One image plane: a file, or a frame of it.

    Parameters
    ----------
    position, orientation
        LPS, mm: the centre of the first voxel; direction cosines of a row and of a column.
    spacing_mm
        Distance between rows, and between columns.
    dtype
        Of the values before slope and intercept.
    in_table
        Whether the stored pixels are numbers of values in a table (ModalityLUTSequence).
    slope, intercept
        value = stored * slope + intercept.
    rescaled
        Whether the header has slope and intercept.
    phase
        Values of ``PHASES`` that the header has, as text.
    expected
        Number of slices that the header promises for the volume, and for the acquisition.
    counted
        The image's number and the number of all images, if ImageComments has them ("3 of 40").
    """

    file: DicomFile
    frame: int
    frames: int
    series: str
    number: str
    description: str
    modality: str
    kind: str
    derived: bool
    shape: tuple[int, int]
    dtype: np.dtype[Any]
    in_table: bool
    position: tuple[float, ...]
    orientation: tuple[float, ...]
    spacing_mm: tuple[float, ...]
    slope: float
    intercept: float
    rescaled: bool
    phase: dict[str, str]
    expected: tuple[int | None, int | None]
    counted: tuple[int, int] | None

    @property
    def distance(self) -> float:
        """Position along the normal of the slice, mm."""
        return float(np.dot(self.normal, self.position))

    @property
    def normal(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Unit vector, LPS."""
        return np.cross(self.orientation[:3], self.orientation[3:])


def is_apple_double(file: DicomFile) -> bool:
    """Whether the file is one of those that macOS adds beside each file."""
    with file.open(4) as stream:
        return file.name.startswith("._") and stream.read(4) == APPLE_DOUBLE


def read_slices(file: DicomFile) -> list[Slice]:
    """Read all slices of a file: one, or one per frame.

    Raises
    ------
    NotASlice
        If it holds none; the message is the reason.
    Exception
        One of ``find.errors_of_damage``, if it is damaged.
    """
    if file.size == 0:
        raise NotASlice("empty (0 bytes)")
    if is_apple_double(file):
        raise NotASlice("attributes that macOS keeps (._)")
    with values_unchecked():
        header, pixel_bytes = read_header(file)
        if header is None:
            raise NotASlice("not DICOM")
        return list(_slices(file, header, pixel_bytes))


def read_header(file: DicomFile) -> tuple[Dataset | None, int | None]:
    """The attributes of ``VALUES`` and ``SEQUENCES``, and the number of bytes of the pixels.

    The header is None if the file is not DICOM. The number is None if it is not known, because the
    file is deflated.
    """
    from pydicom import dcmread

    tags = [*VALUES, *SEQUENCES]
    for limit in (USUAL_HEADER, file.size):
        with file.open(limit) as stream:
            if not looks_like_dicom(stream):
                return None, 0
            inflated, all_of_it = inflate(stream, LONGEST_HEADER)
            deflated = inflated is not stream
            try:
                header = dcmread(inflated, stop_before_pixels=True, force=True, specific_tags=tags)
            except EOFError:
                if limit < file.size:
                    continue
                raise
            start = inflated.tell()
            size = inflated.seek(0, io.SEEK_END) - start
        if deflated or size > 0 or limit >= file.size:
            break
    for keyword in VALUES:
        header.get(keyword)  # pydicom decodes values late; damage is found here
    if deflated:
        return header, size if all_of_it or size == 0 else None
    return header, file.size - start


def looks_like_dicom(stream: BinaryIO) -> bool:
    """Whether a file has DICOM's preamble, or starts with an element of its first groups."""
    start = stream.read(PREAMBLE_BYTES)
    stream.seek(0)
    if start.endswith(b"DICM"):
        return True
    if len(start) < PREAMBLE_BYTES:
        return False
    for order in "<>":
        group, element, length = struct.unpack(f"{order}HHI", start[:8])
        explicit = start[4:6].isalpha() and start[4:6].isupper()
        if group in (2, 8) and element < 0x100 and (explicit or length < 1 << 16):
            return True
    return False


def inflate(stream: BinaryIO, limit: int) -> tuple[BinaryIO, bool]:
    """Unpack a file of the deflated transfer syntax, up to a limit.

    pydicom unpacks the whole file, whatever its size.

    Returns
    -------
        The file as explicit little endian, and whether that is all of it. Other transfer syntaxes
        are returned as they are.
    """
    from pydicom.filebase import DicomBytesIO
    from pydicom.filereader import dcmread
    from pydicom.filewriter import write_file_meta_info
    from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian

    start = stream.read(META_BYTES)
    stream.seek(0)
    if DeflatedExplicitVRLittleEndian.encode() not in start:
        return stream, True
    # An empty deflate stream instead of the file's: pydicom reads the meta information only.
    begin = PREAMBLE_BYTES if start[:PREAMBLE_BYTES].endswith(b"DICM") else 0
    begin += 12 + struct.unpack("<I", start[begin + 8 : begin + 12])[0]
    meta = dcmread(io.BytesIO(start[:begin] + NOTHING_DEFLATED), force=True).file_meta
    if meta.get("TransferSyntaxUID") != DeflatedExplicitVRLittleEndian:
        return stream, True
    stream.seek(begin)
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
    content = unpacker.decompress(stream.read(), limit)
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    whole = DicomBytesIO()
    whole.write(bytes(PREAMBLE_BYTES - 4) + b"DICM")
    write_file_meta_info(whole, meta, enforce_standard=False)
    whole.write(content)
    return io.BytesIO(whole.getvalue()), unpacker.eof


def _slices(file: DicomFile, header: Dataset, pixel_bytes: int | None) -> Iterator[Slice]:
    from pydicom.uid import MediaStorageDirectoryStorage

    if header.file_meta.get("MediaStorageSOPClassUID") == MediaStorageDirectoryStorage:
        raise NotASlice("index of a medium (DICOMDIR)")
    modality = str(header.get("Modality") or "").upper()
    if modality in NOT_SCANS:
        raise NotASlice(f"no scan, but {modality}")
    if "Rows" not in header or "Columns" not in header:
        raise NotASlice("no image, or cut off before it")
    kinds = [str(kind).upper() for kind in _items(header.get("ImageType"))]
    if "LOCALIZER" in kinds or (modality == "CT" and "PROJECTION IMAGE" in kinds):
        raise NotASlice("scout (localizer)")
    if int(header.get("SamplesPerPixel") or 1) != 1:
        raise NotASlice("colour image")
    rows, columns, frames = int(header.Rows), int(header.Columns), _frames(header)
    if rows <= 0 or columns <= 0:
        raise NotASlice("image of 0 pixels")
    dtype = pixel_dtype(header)
    _check_pixels(file, header, pixel_bytes, rows * columns * frames, dtype)
    groups = list(header.get("PerFrameFunctionalGroupsSequence") or ())
    if frames > 1 and len(groups) != frames:
        raise NotASlice("many frames without a position per frame")
    in_table = bool(header.get("ModalityLUTSequence"))
    shared = next(iter(header.get("SharedFunctionalGroupsSequence") or ()), None)
    for frame in range(frames):
        own = groups[frame] if frame < len(groups) else None
        places = [place for place in (own, shared) if place is not None]
        slope, intercept, rescaled = (1.0, 0.0, True) if in_table else _rescale(header, places)
        yield Slice(
            file=file,
            frame=frame,
            frames=frames,
            series=str(header.get("SeriesInstanceUID") or ""),
            number=str(_number(header.get("SeriesNumber")) or ""),
            description=str(header.get("SeriesDescription") or ""),
            modality=modality,
            kind=str(header.get("SOPClassUID") or ""),
            derived="DERIVED" in kinds[:1],
            shape=(rows, columns),
            dtype=np.dtype(np.uint16) if in_table else dtype,
            in_table=in_table,
            position=_geometry(header, places, "PlanePositionSequence", "ImagePositionPatient", 3),
            orientation=_cosines(header, places),
            spacing_mm=_spacing(header, places),
            slope=slope,
            intercept=intercept,
            rescaled=rescaled,
            phase=_phase(header, places),
            expected=(
                _number(header.get("NumberOfSlices")),
                _number(header.get("ImagesInAcquisition")),
            ),
            counted=_counted(header.get("ImageComments")) if frames == 1 else None,
        )


COUNT = re.compile(r"\D{0,64}(\d{1,6})\s{0,8}(?:/|of)\s{0,8}(\d{1,6})\D{0,64}", re.IGNORECASE)
"""A comment with exactly two numbers: which image of how many."""


def _counted(comment: object) -> tuple[int, int] | None:
    match = COUNT.fullmatch(comment) if isinstance(comment, str) else None
    return None if match is None else (int(match[1]), int(match[2]))


def _frames(header: Dataset) -> int:
    return max(int(header.get("NumberOfFrames") or 1), 1)


def _items(value: object) -> list[Any]:
    if value is None or value == "":
        return []
    return [value] if isinstance(value, str | int | float) else list(value)  # type: ignore[call-overload]


def _number(value: object) -> int | None:
    items = _items(value)
    return int(items[0]) if len(items) == 1 else None


def pixel_dtype(header: Dataset) -> np.dtype[Any]:
    """The kind of the stored pixels."""
    bits = int(header.get("BitsAllocated") or 0)
    if bits not in (8, 16, 32):
        raise NotASlice("pixels that do not have 8, 16 or 32 bits")
    signed = int(header.get("PixelRepresentation") or 0)
    return np.dtype(f"{'i' if signed else 'u'}{bits // 8}")


def _check_pixels(
    file: DicomFile, header: Dataset, size: int | None, voxels: int, dtype: np.dtype[Any]
) -> None:
    """Compare the bytes that follow the header with what the header promises."""
    promised = voxels * dtype.itemsize
    if promised > BOMB_BYTES and promised > BOMB_RATIO * file.size:
        raise NotASlice("pixels that would unpack to an unusual size")
    if size is None:
        return
    if size <= 8:
        raise NotASlice("no pixels, or cut off before them")
    syntax = header.file_meta.get("TransferSyntaxUID")
    if size < promised and not (syntax is not None and syntax.is_compressed):
        raise NotASlice("cut off within the pixels")


def _geometry(
    header: Dataset, places: list[Dataset], sequence: str, keyword: str, count: int
) -> tuple[float, ...]:
    """Finite numbers of a functional group, or of the header."""
    for place in [*_parts(places, sequence), header]:
        values = [float(value) for value in _items(place.get(keyword))]
        if len(values) == count:
            if not np.isfinite(values).all():
                raise NotASlice(f"{keyword} that is no number")
            return tuple(values)
    raise NotASlice(f"no {keyword}")


def _parts(places: list[Dataset], sequence: str) -> Iterator[Dataset]:
    for place in places:
        items: Sequence | None = place.get(sequence)
        yield from list(items or ())[:1]


def _cosines(header: Dataset, places: list[Dataset]) -> tuple[float, ...]:
    """Direction cosines, of length 1 and at right angles within the tolerance of DICOM PS3.3."""
    values = _geometry(header, places, "PlaneOrientationSequence", "ImageOrientationPatient", 6)
    row, column = np.reshape(values, (2, 3))
    lengths = (math.hypot(*row), math.hypot(*column))
    if not np.allclose(lengths, 1, atol=0.01) or abs(float(row @ column)) > 0.01:
        raise NotASlice("ImageOrientationPatient that is no pair of directions")
    return values


def _spacing(header: Dataset, places: list[Dataset]) -> tuple[float, ...]:
    spacing = _geometry(header, places, "PixelMeasuresSequence", "PixelSpacing", 2)
    if min(spacing) <= 0:
        raise NotASlice("PixelSpacing that is not positive")
    return spacing


def _rescale(header: Dataset, places: list[Dataset]) -> tuple[float, float, bool]:
    for place in [*_parts(places, "PixelValueTransformationSequence"), header]:
        slope, intercept = place.get("RescaleSlope"), place.get("RescaleIntercept")
        if slope is not None and intercept is not None:
            values = (float(slope), float(intercept))
            if not np.isfinite(values).all() or values[0] == 0:
                raise NotASlice("RescaleSlope that is 0 or no number")
            return (*values, True)
    return 1.0, 0.0, False


def _phase(header: Dataset, places: list[Dataset]) -> dict[str, str]:
    """What tells apart several images of one slice."""
    found: dict[str, str] = {}
    parts = [item for place in places for part in place if part.VR == "SQ" for item in part.value]
    for keyword in PHASES:
        for place in [*parts, header]:
            value = place.get(keyword)
            if value is not None and keyword not in found:
                found[keyword] = str(value)
    return found
