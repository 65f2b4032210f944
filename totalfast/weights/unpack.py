"""Unpack a model's zip file: only ordinary files, only inside the target, of a bounded size."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import zipfile
import zlib
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING

from totalfast.errors import WeightsError
from totalfast.weights.manifest import CHUNK, MANIFEST_NAME, FileRecord

if TYPE_CHECKING:
    from collections.abc import Sequence

MOST_FILES = 10_000
ALWAYS_ALLOWED = 1 << 31
"""Unpacked bytes that are allowed for a zip file of any size."""

MOST_COMPRESSION = 300
"""Most unpacked bytes for each byte of a larger zip file. Weights have a ratio of 1.1 or so, and
zeros up to 1030: a bomb of 10 MB unpacks to 10 GB."""

METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
"""Methods of compression that are accepted; others compress zeros without a useful bound."""

ENCRYPTED = 0x1
"""Bit of a zip entry's flags."""


class DamagedZipError(WeightsError):
    """A zip file is cut off, or its content does not have its checksum."""


def top_folders(archive: Path) -> list[str]:
    """Names of the folders, and files, at the top of a zip file.

    Raises
    ------
    WeightsError
        If it is no zip file, or is damaged.
    """
    with _open(archive, f"the zip file {archive}") as zip_file:
        return _tops(zip_file)


def _tops(zip_file: zipfile.ZipFile) -> list[str]:
    names = (PurePosixPath(name).parts[:1] for name in zip_file.namelist())
    return sorted({part for parts in names for part in parts})


def unpack(archive: Path, name: str, target: Path, *, label: str) -> dict[str, FileRecord]:
    """Unpack one folder of a zip file into a folder, and hash its files on the way.

    Parameters
    ----------
    archive
        The zip file.
    name
        The folder at its top that is unpacked. Other entries are left out.
    target
        An empty folder; ``target/name`` is created.
    label
        What the zip file is, for messages, such as "the zip file of model 297".

    Returns
    -------
        Path below ``target/name``, with "/", to size, time and hash.

    Raises
    ------
    DamagedZipError
        If the zip file is cut off or damaged.
    WeightsError
        If it lacks the folder, is larger than allowed, or has an entry that is no ordinary file
        below its top.
    OSError
        If a file can't be written.
    """
    with _open(archive, label) as zip_file:
        entries = zip_file.infolist()
        _check_entries(entries, label)
        files = [entry for entry in entries if _is_wanted(entry, name)]
        if not files:
            raise WeightsError(f"{label} holds {', '.join(_tops(zip_file)[:5])}, not {name}.")
        _check_size(files, archive, target, label)
        return {
            PurePosixPath(entry.filename).relative_to(name).as_posix(): _extract(
                zip_file, entry, target, label
            )
            for entry in files
        }


def _open(archive: Path, label: str) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(archive)
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise DamagedZipError(f"{label} is no zip file, or is damaged: {error}.") from error


def _is_wanted(entry: zipfile.ZipInfo, name: str) -> bool:
    parts = PurePosixPath(entry.filename).parts
    return not entry.is_dir() and parts[:1] == (name,) and parts[1:] != (MANIFEST_NAME,)


def _check_entries(entries: Sequence[zipfile.ZipInfo], label: str) -> None:
    if len(entries) > MOST_FILES:
        raise WeightsError(f"{label} has {len(entries)} files; more than {MOST_FILES} are refused.")
    seen = set()
    for entry in entries:
        reason = _reason_to_refuse(entry)
        if entry.filename in seen:
            reason = "it is there twice"
        if reason is not None:
            name = repr(entry.filename[:100])
            raise WeightsError(f"{label} was not unpacked, because of its entry {name}: {reason}.")
        seen.add(entry.filename)


def _reason_to_refuse(entry: zipfile.ZipInfo) -> str | None:
    path = PurePosixPath(entry.filename)
    if path.is_absolute() or PureWindowsPath(entry.filename).anchor:
        return "the name is absolute"
    if ".." in path.parts or "\\" in entry.filename:
        return "the name leads out of the folder"
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "it is a link or a device, not a file"
    if entry.flag_bits & ENCRYPTED:
        return "it is encrypted"
    if entry.compress_type not in METHODS:
        return "its kind of compression is not used for models"
    return None


def _check_size(files: Sequence[zipfile.ZipInfo], archive: Path, target: Path, label: str) -> None:
    packed = archive.stat().st_size
    total = sum(entry.file_size for entry in files)
    if total > max(ALWAYS_ALLOWED, MOST_COMPRESSION * packed):
        raise WeightsError(
            f"{label} was not unpacked: its {packed / 1e6:.0f} MB would become "
            f"{total / 1e6:.0f} MB, which no model does (a zip bomb)."
        )
    if sum(entry.compress_size for entry in files) > packed:
        raise WeightsError(f"{label} was not unpacked: its entries overlap (a zip bomb).")
    free = shutil.disk_usage(target).free
    if total > free:
        raise WeightsError(
            f"{label} needs {total / 1e6:.0f} MB, but {target.parent} has {free / 1e6:.0f} MB free."
        )


def _extract(
    zip_file: zipfile.ZipFile, entry: zipfile.ZipInfo, target: Path, label: str
) -> FileRecord:
    """Write one file, which must not exist; zipfile compares its checksum at its end."""
    path = target.joinpath(*PurePosixPath(entry.filename).parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with path.open("xb") as stream:
        try:
            with zip_file.open(entry) as packed:
                while chunk := packed.read(CHUNK):
                    digest.update(chunk)
                    stream.write(chunk)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
            raise DamagedZipError(f"{label} is damaged: {entry.filename}: {error}.") from error
        stream.flush()
        os.fsync(stream.fileno())
        status = os.fstat(stream.fileno())
    if status.st_size != entry.file_size:
        raise DamagedZipError(f"{label} is damaged: {entry.filename} is cut off.")
    return FileRecord(
        size=status.st_size, modified_ns=status.st_mtime_ns, sha256=digest.hexdigest()
    )
