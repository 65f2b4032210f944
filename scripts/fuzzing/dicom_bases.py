"""Undamaged DICOM series in several transfer syntaxes, and a multi-frame file."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any

import imagecodecs
import numpy as np
from pydicom import Dataset, dcmread
from pydicom.encaps import encapsulate
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from fuzzing.case import PATIENT
from tests.dicom_series import in_syntax, write_multi_frame, write_series

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from fuzzing.scans import Scan

IDENTIFYING = {
    "PatientName": "^".join(PATIENT),
    "PatientID": PATIENT[0],
    "PatientBirthDate": "19000101",
    "PatientComments": " ".join(PATIENT),
    "StudyDescription": PATIENT[1],
    "ReferringPhysicianName": "^".join(PATIENT),
    "AccessionNumber": PATIENT[1],
    "DeviceSerialNumber": PATIENT[1],
}
"""Attributes that neither voxels nor their places depend on."""

VOXELS = np.random.default_rng(0).integers(-1000, 1000, (6, 9, 8))
"""(slice, row, column), HU."""

PLAIN = {
    "explicit": ExplicitVRLittleEndian,
    "implicit": ImplicitVRLittleEndian,
    "big endian": ExplicitVRBigEndian,
    "deflated": DeflatedExplicitVRLittleEndian,
}
COMPRESSED: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "JPEG-LS": (JPEGLSLossless, imagecodecs.jpegls_encode),
    "JPEG lossless": (
        JPEGLosslessSV1,
        lambda plane: imagecodecs.jpeg8_encode(plane, lossless=True, predictor=1, bitspersample=16),
    ),
    "JPEG, 12 bits": (
        JPEGExtended12Bit,
        lambda plane: imagecodecs.jpeg8_encode(plane % 4096, level=95, bitspersample=12),
    ),
    "JPEG 2000": (
        JPEG2000Lossless,
        lambda plane: imagecodecs.jpeg2k_encode(plane, level=0, reversible=True, codecformat="j2k"),
    ),
    "JPEG": (
        JPEGBaseline8Bit,
        lambda plane: imagecodecs.jpeg8_encode((plane // 10).astype(np.uint8)),
    ),
}
"""Name of a base to its transfer syntax, and to an encoder of planes (row, column), uint16."""


@dataclass(frozen=True, kw_only=True)
class Base:
    """Undamaged files of a series, and what must be read from them.

    Parameters
    ----------
    files
        Name to content.
    splits
        Whether the files are explicit little endian, so that their elements can be told apart.
    """

    name: str
    files: Mapping[str, bytes]
    splits: bool
    scan: Scan | None = None


def undamaged_series(folder: Path) -> list[Base]:
    """Write series and a multi-frame file; return their bytes."""
    written = write_series(folder / "written", VOXELS, **IDENTIFYING)
    paths = sorted(written.iterdir())
    bases = [
        Base(
            name=name,
            files={path.name: _converted(path, name) for path in paths},
            splits=name not in PLAIN or name == "explicit",
        )
        for name in (*PLAIN, *COMPRESSED, "RLE")
    ]
    shutil.rmtree(written)
    path = write_multi_frame(folder / "frames.dcm", VOXELS, **IDENTIFYING)
    bases.append(Base(name="multi-frame", files={path.name: path.read_bytes()}, splits=True))
    path.unlink()
    return bases


def _converted(path: Path, name: str) -> bytes:
    """The bytes of a file in another transfer syntax."""
    header = dcmread(path)
    if name == "RLE":
        header.compress(RLELossless, generate_instance_uid=False)
    elif name in PLAIN:
        header = in_syntax(header, PLAIN[name])
    else:
        _compress(header, *COMPRESSED[name])
    buffer = BytesIO()
    header.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def _compress(header: Dataset, syntax: str, encode: Callable[[Any], Any]) -> None:
    plane = np.frombuffer(header.PixelData, "<u2").reshape(header.Rows, header.Columns)
    header.PixelRepresentation = 0
    if syntax == JPEGBaseline8Bit:
        header.BitsAllocated = header.BitsStored = 8
        header.HighBit = 7
    if syntax == JPEGExtended12Bit:
        header.BitsStored, header.HighBit = 12, 11
    header.PixelData = encapsulate([bytes(encode(plane))])
    header["PixelData"].VR = "OB"
    header.file_meta.TransferSyntaxUID = syntax
