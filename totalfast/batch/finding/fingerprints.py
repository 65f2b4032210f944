"""Fingerprints of inputs, from names, sizes and times of files; their content is not read."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from totalfast.batch.finding.images import files_of, is_image
from totalfast.batch.finding.left_out import Counted
from totalfast.batch.finding.search import files_below
from totalfast.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

MODULUS = 1 << 256


def mark_of(name: str, size: int, version: int | str) -> int:
    """A number for one file; the sum of several ones is the same in any order of the files.

    Parameters
    ----------
    name
        The file's name without folders.
    size
        In bytes.
    version
        Changes with its content: the time of the last change as in ``os.stat_result.st_mtime_ns``,
        or what a server tells, such as a checksum.
    """
    text = f"{name}\0{size}\0{version}".encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.sha256(text).digest(), "big")


def fingerprint_of(marks: Iterable[int], series: str | None) -> str:
    """Fingerprint of a set of files, of which one series is read."""
    text = f"{sum(marks) % MODULUS:x}\0{series}"
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def fingerprint_now(source: Path, series: str | None) -> str:
    """Return the fingerprint of a source as it is now. A missing source has one, too.

    Parameters
    ----------
    source
        An image file with the files that belong to it, or a folder, zip file or file of DICOM.
    series
        The series of the source that is read; None for the only one.
    """
    try:
        return fingerprint_of([_mark_now(file) for file in _files(source)], series)
    except InputError:  # a folder that can't be searched
        return fingerprint_of([_mark_now(source)], series)


def _files(source: Path) -> Iterable[Path]:
    if source.is_dir():
        return files_below(source, Counted())
    return files_of(source) if is_image(source) else (source,)


def _mark_now(path: Path) -> int:
    try:
        state = path.stat()
    except OSError:
        return mark_of(path.name, -1, 0)
    return mark_of(path.name, state.st_size, state.st_mtime_ns)
