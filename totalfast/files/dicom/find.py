"""Find DICOM files: in a folder or a zip file, which is unpacked safely.

Knows files and the headers in them; knows nothing of what makes a series.
"""

from __future__ import annotations

import shutil
import zipfile
import zlib
from typing import TYPE_CHECKING

from totalfast.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

    from pydicom import Dataset

PREAMBLE_BYTES = 132
"""A DICOM file begins with 128 bytes of anything and the letters DICM."""

BOMB_BYTES = 1 << 30
BOMB_RATIO = 200
"""A zip file that grows to more than both is refused: DICOM slices shrink by far less, and deflate
can reach 1032."""

HEADER = (
    "SOPClassUID",
    "SeriesInstanceUID",
    "SeriesDescription",
    "ImageType",
    "Modality",
    "InstanceNumber",
    "NumberOfFrames",
    "ImageOrientationPatient",
    "ImagePositionPatient",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
)
"""All that is read before the conversion."""


def find_files(source: Path, unpacked: Path) -> list[Path]:
    """List all files that may be DICOM, in the order of their names.

    Parameters
    ----------
    source
        A folder, a zip file, or a file.
    unpacked
        Empty folder for what is in a zip file.

    Raises
    ------
    InputError
        If the zip file is damaged, encrypted, or too large.
    """
    if source.is_dir():
        return sorted(path for path in source.rglob("*") if path.is_file())
    if zipfile.is_zipfile(source):
        return _unpack(source, unpacked)
    return [source]


def _unpack(archive: Path, folder: Path) -> list[Path]:
    """Extract the DICOM files of a zip file, under names of our own."""
    try:
        with zipfile.ZipFile(archive) as opened:
            members = [member for member in opened.infolist() if not member.is_dir()]
            _refuse_bombs(archive, members, folder)
            files = []
            for number, member in enumerate(sorted(members, key=lambda member: member.filename)):
                with opened.open(member) as stream:
                    start = stream.read(PREAMBLE_BYTES)
                    if start.endswith(b"DICM"):
                        files.append(folder / f"{number:06d}.dcm")
                        with files[-1].open("wb") as target:
                            target.write(start)
                            shutil.copyfileobj(stream, target)
    except (zipfile.BadZipFile, EOFError, OSError, RuntimeError, zlib.error) as error:
        raise InputError(f"{archive} can't be unpacked: {error}") from error
    return files


def _refuse_bombs(archive: Path, members: list[zipfile.ZipInfo], folder: Path) -> None:
    size = sum(member.file_size for member in members)
    packed = sum(member.compress_size for member in members)
    if size > BOMB_BYTES and size > BOMB_RATIO * packed:
        raise InputError(
            f"{archive} would grow from {packed / 1e6:.1f} MB to {size / 1e6:.0f} MB, which no "
            "DICOM series does; unpack it yourself if you trust it."
        )
    free = shutil.disk_usage(folder).free
    if size > free:
        raise InputError(
            f"{archive} needs {size / 1e6:.0f} MB of temporary space when it is unpacked; "
            f"{folder} has {free / 1e6:.0f} MB. Set TMPDIR to a larger disk."
        )


def read_header(path: Path) -> Dataset | None:
    """Read a file's header; None if it is no DICOM file."""
    import pydicom
    from pydicom.errors import InvalidDicomError

    try:
        with path.open("rb") as stream:
            if not stream.read(PREAMBLE_BYTES).endswith(b"DICM"):
                return None
        return pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(HEADER))
    except (InvalidDicomError, EOFError, OSError, ValueError) as error:
        raise InputError(f"{path} can't be read: {error}") from error


def link(path: Path, target: Path) -> None:
    """Make a file appear under another name, without a copy where the system can."""
    try:
        target.symlink_to(path.resolve())
    except OSError:  # a file system, or a user of Windows, that can't
        shutil.copyfile(path, target)
