"""Find DICOM files in a folder or a zip file, which is unpacked safely, and read their headers."""

from __future__ import annotations

import contextlib
import io
import shutil
import zipfile
import zlib
from typing import TYPE_CHECKING

from totalfast.errors import InputError, TotalfastError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import BinaryIO

    from pydicom import Dataset

PREAMBLE_BYTES = 132
"""A DICOM file starts with 128 arbitrary bytes and the letters DICM."""

BOMB_BYTES = 1 << 30
BOMB_RATIO = 200
"""A zip file is refused if its unpacked size and its compression ratio are both above these limits.
DICOM slices have a much lower ratio; deflate can reach 1032."""

LONGEST_HEADER = 1 << 20
"""Bytes of a file in a zip file that are read for its header."""

NOT_SCANS = frozenset({"KO", "PR", "REG", "RTDOSE", "RTPLAN", "RTSTRUCT", "SEG", "SR"})
"""Modalities of files that are not scans, but are often in a scan's folder."""

UNEXPECTED_CONTENT = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""Errors that pydicom and dicom2nifti raise for unexpected headers and pixels."""

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
"""Attributes that are read before the conversion."""


def find_files(source: Path, unpacked: Path) -> list[Path]:
    """List all files that may be DICOM, sorted by name.

    Parameters
    ----------
    source
        A folder, a zip file, or a file.
    unpacked
        Empty folder for the files of a zip file.

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
    """Extract the DICOM files of a zip file under new names, because its names may be unsafe."""
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
            f"{archive} would grow from {packed / 1e6:.1f} MB to {size / 1e6:.0f} MB, which is "
            "unusual for a DICOM series; unpack it yourself if you trust it."
        )
    free = shutil.disk_usage(folder).free
    if size > free:
        raise InputError(
            f"{archive} needs {size / 1e6:.0f} MB of temporary space when it is unpacked; "
            f"{folder} has {free / 1e6:.0f} MB. Set TMPDIR to a larger disk."
        )


def read_header(path: Path) -> Dataset | None:
    """Read a file's header; None if it is not a DICOM file."""
    with damage_refused(path), path.open("rb") as stream:
        return _header_of(stream)


@contextlib.contextmanager
def damage_refused(path: Path) -> Iterator[None]:
    """Turn the errors that damaged headers cause in the context into an InputError.

    Their messages may quote the header, which holds the patient's name; only the kind is told.
    """
    try:
        yield
    except TotalfastError:
        raise
    except _errors_of_damage() as error:
        raise InputError(
            f"{path} can't be read: a DICOM header is damaged or holds unexpected values "
            f"({type(error).__name__})."
        ) from error


def _errors_of_damage() -> tuple[type[Exception], ...]:
    from pydicom.errors import BytesLengthException, InvalidDicomError

    return (InvalidDicomError, BytesLengthException, *UNEXPECTED_CONTENT)


def _header_of(stream: BinaryIO) -> Dataset | None:
    import pydicom

    if not stream.read(PREAMBLE_BYTES).endswith(b"DICM"):
        return None
    stream.seek(0)
    header = pydicom.dcmread(stream, stop_before_pixels=True, specific_tags=list(HEADER))
    for keyword in HEADER:
        header.get(keyword)  # pydicom decodes values late; damage is found here
    return header


def find_modality(source: Path) -> str | None:
    """Modality of the first image in a folder, with its subfolders, in a zip file, or of a file.

    Files of results, such as structure sets, are passed over.

    Returns
    -------
        For example "CT"; None if there is no readable image.
    """
    with contextlib.suppress(*_errors_of_damage()):
        for header in _headers(source):
            modality = header.get("Modality")
            if modality and str(modality).upper() not in NOT_SCANS:
                return str(modality).upper()
    return None


def _headers(source: Path) -> Iterator[Dataset]:
    """Headers of all DICOM files of a source, without unpacking a zip file."""
    if not source.is_dir() and zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as archive:
            for name in sorted(archive.namelist()):
                with archive.open(name) as member:
                    # A header is at the start; the rest may be large.
                    header = _readable(io.BytesIO(member.read(LONGEST_HEADER)))
                if header is not None:
                    yield header
        return
    for path in find_files(source, source):
        with path.open("rb") as stream:
            header = _readable(stream)
        if header is not None:
            yield header


def _readable(stream: BinaryIO) -> Dataset | None:
    """The header, or None if it is damaged."""
    with contextlib.suppress(*_errors_of_damage()):
        return _header_of(stream)
    return None


def link(path: Path, target: Path) -> None:
    """Link ``target`` to a file; copy the file if the system can't create links."""
    try:
        target.symlink_to(path.resolve())
    except OSError:  # some file systems, and Windows without the right to create links
        shutil.copyfile(path, target)
