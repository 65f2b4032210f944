"""The manifest in a model's folder: what was unpacked, so that changed files are found."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

MANIFEST_NAME = ".totalfast-manifest.json"
VERSION = 1

TIME_TOLERANCE_NS = 2_000_000_000
"""Times that differ by less are equal: container images keep seconds, FAT keeps two of them."""

CHUNK = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """Size, time and hash of a file when it was unpacked."""

    size: int
    modified_ns: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The content of a manifest.

    Parameters
    ----------
    source
        URL or name of the zip file.
    date
        When it was unpacked: ISO 8601, UTC.
    folds
        Model folder to the names of its folds, such as "fold_0".
    files
        Path relative to the dataset's folder, with "/", to its record.
    """

    source: str
    date: str
    folds: Mapping[str, list[str]]
    files: Mapping[str, FileRecord]


class DamagedManifestError(ValueError):
    """A manifest can't be read."""


def read_manifest(dataset: Path) -> Manifest | None:
    """Read the manifest of a dataset's folder; None if it has none.

    Raises
    ------
    DamagedManifestError
        If it is not the JSON that ``write_manifest`` writes, or of another version.
    """
    try:
        return _parse((dataset / MANIFEST_NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise DamagedManifestError("it is not the JSON that totalfast writes") from error


def _parse(text: str) -> Manifest:
    content = json.loads(text)
    if content["version"] != VERSION:
        raise ValueError(content["version"])
    files = {
        str(name): FileRecord(
            size=int(record["size"]),
            modified_ns=int(record["modified_ns"]),
            sha256=str(record["sha256"]),
        )
        for name, record in content["files"].items()
    }
    folds = {str(name): [str(fold) for fold in of] for name, of in content["folds"].items()}
    return Manifest(
        source=str(content["source"]), date=str(content["date"]), folds=folds, files=files
    )


def write_manifest(dataset: Path, manifest: Manifest) -> None:
    """Write a manifest; a present one is replaced by renaming."""
    content = json.dumps({"version": VERSION, **asdict(manifest)}, indent=1)
    draft = dataset / f"{MANIFEST_NAME}.{secrets.token_hex(4)}"
    try:
        with draft.open("x", encoding="utf-8") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        draft.replace(dataset / MANIFEST_NAME)
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


_HASHED: dict[tuple[Path, int, int], str] = {}
"""(file, size, time) to SHA-256, of files whose time is not the manifest's."""


def find_change(dataset: Path, manifest: Manifest, names: Iterable[str]) -> str | None:
    """Compare sizes and times of files with the manifest's; describe the first that differs.

    A file of the same size with another time is hashed. If the hash is the same too, the manifest
    gets the new time where the folder can be written.
    """
    newer = {}
    for name in names:
        record, path = manifest.files[name], dataset / name
        fault = _size_fault(name, path, record)
        if fault is not None:
            return fault
        status = path.stat()
        if abs(status.st_mtime_ns - record.modified_ns) < TIME_TOLERANCE_NS:
            continue
        key = (path, status.st_size, status.st_mtime_ns)
        if key not in _HASHED:
            _HASHED[key] = sha256_of(path)
        if _HASHED[key] != record.sha256:
            return f"{name} has other bytes"
        newer[name] = replace(record, modified_ns=status.st_mtime_ns)
    if newer:
        with contextlib.suppress(OSError):  # a read-only folder
            write_manifest(dataset, replace(manifest, files={**manifest.files, **newer}))
    return None


def find_damage(dataset: Path, manifest: Manifest) -> list[str]:
    """Hash all files of a manifest; describe those that are missing or differ."""
    faults = []
    for name, record in manifest.files.items():
        path = dataset / name
        fault = _size_fault(name, path, record)
        if fault is None and sha256_of(path) != record.sha256:
            fault = f"{name} has other bytes"
        if fault is not None:
            faults.append(fault)
    return faults


def _size_fault(name: str, path: Path, record: FileRecord) -> str | None:
    """Compare a file's size with the manifest's, without reading it."""
    if not path.is_file():
        return f"{name} is missing"
    size = path.stat().st_size
    return None if size == record.size else f"{name} has {size} bytes instead of {record.size}"
