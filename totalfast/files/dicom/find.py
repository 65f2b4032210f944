"""Find the files of a DICOM source: a folder with its subfolders, a zip file, or a single file."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import threading
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from totalfast.errors import InputError, TotalfastError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import BinaryIO

BOMB_BYTES = 1 << 30
BOMB_RATIO = 200
"""A zip file or the pixels of a DICOM file are refused if their unpacked size and their compression
ratio are both above these limits. Slices have a much lower ratio; deflate can reach 1032."""

LARGEST_MEMBER = 1 << 32
"""Bytes of the largest file in a zip file that is read: the largest that DICOM's lengths allow."""

UNEXPECTED_CONTENT = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    NotImplementedError,
    OSError,
    RuntimeError,
    TypeError,
    UserWarning,
    ValueError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)
"""Errors that pydicom, its decoders and zipfile raise for unexpected headers, pixels and data;
warnings, where a program turns them into errors."""


_pydicom_settings = threading.RLock()


@dataclass(frozen=True, slots=True, kw_only=True)
class DicomFile:
    """A file that may be DICOM: on the disk, or a member of a zip file.

    Parameters
    ----------
    name
        Its name without folders.
    path
        Where it is, or the path of the zip file.
    size
        Bytes.
    archive, member
        The open zip file and the member; None for a file on the disk.
    """

    name: str
    path: Path
    size: int
    archive: zipfile.ZipFile | None = None
    member: zipfile.ZipInfo | None = None

    def open(self, limit: int | None = None) -> BinaryIO:
        """Open the file; of a member of a zip file only ``limit`` bytes can be read."""
        if self.archive is None or self.member is None:
            return self.path.open("rb")
        with self.archive.open(self.member) as stream:
            return io.BytesIO(stream.read(self.size if limit is None else limit))


@contextlib.contextmanager
def open_source(source: Path, *, only: Iterable[str] | None = None) -> Iterator[list[DicomFile]]:
    """List all files of a source, sorted by name; they can be read until the context ends.

    Parameters
    ----------
    source
        A folder, a zip file, or a file. Linked subfolders are searched, each folder once.
    only
        Paths of the folder's files that are listed, relative to it; the others are not looked at.

    Raises
    ------
    InputError
        If the source is missing, or a zip file that is damaged, encrypted, or a bomb.
    """
    if not source.exists():
        raise InputError(f"{source} does not exist.")
    if source.is_dir():
        paths = _walk(source) if only is None else (source / name for name in only)
        yield [_on_disk(path) for path in sorted(paths) if path.is_file()]
    elif zipfile.is_zipfile(source):
        with contextlib.ExitStack() as stack:
            try:
                archive = stack.enter_context(zipfile.ZipFile(source))
                files = _members(source, archive)
            except UNEXPECTED_CONTENT as error:
                raise InputError(f"{source} can't be unpacked: {error}") from error
            yield files
    else:
        yield [_on_disk(source)]


def _on_disk(path: Path) -> DicomFile:
    return DicomFile(name=path.name, path=path, size=path.stat().st_size)


def _walk(folder: Path) -> Iterator[Path]:
    """All files below a folder. A link to a folder that was already searched is not followed."""
    seen = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        yield from (Path(place) / name for name in names)


def _members(source: Path, archive: zipfile.ZipFile) -> list[DicomFile]:
    members = [member for member in archive.infolist() if not member.is_dir()]
    size = sum(member.file_size for member in members)
    packed = sum(member.compress_size for member in members)
    if size > BOMB_BYTES and size > BOMB_RATIO * packed:
        raise InputError(
            f"{source} would grow from {packed / 1e6:.1f} MB to {size / 1e6:.0f} MB, which is "
            "unusual for a DICOM series; unpack it yourself if you trust it."
        )
    if any(member.flag_bits & 1 for member in members):
        raise InputError(f"{source} can't be unpacked: it is encrypted; unpack it yourself.")
    return [
        DicomFile(
            name=member.filename.replace("\\", "/").rsplit("/", 1)[-1],
            path=source,
            size=min(member.file_size, LARGEST_MEMBER),
            archive=archive,
            member=member,
        )
        for member in sorted(members, key=lambda member: member.filename)
    ]


@contextlib.contextmanager
def damage_refused(source: Path) -> Iterator[None]:
    """Turn the errors that damaged files cause in the context into an InputError.

    Their messages may quote the header, which holds the patient's name; only the kind is told.
    """
    try:
        yield
    except TotalfastError:
        raise
    except errors_of_damage() as error:
        raise InputError(
            f"{source} can't be read: a DICOM file is damaged or holds unexpected values "
            f"({type(error).__name__})."
        ) from error


@contextlib.contextmanager
def values_unchecked() -> Iterator[None]:
    """Keep pydicom from checking values in the context; its warnings quote the header."""
    from pydicom.config import disable_value_validation

    with _pydicom_settings, disable_value_validation():
        yield


def errors_of_damage() -> tuple[type[Exception], ...]:
    """The errors that a damaged DICOM file can cause."""
    from pydicom.errors import BytesLengthException, InvalidDicomError

    return (InvalidDicomError, BytesLengthException, *UNEXPECTED_CONTENT)
