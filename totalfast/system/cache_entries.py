"""Entries of the cache folder: their sizes, which were used last, and how they are removed.

An entry is a folder. Processes share the cache without waiting for each other: an entry appears by
a rename and goes by a rename, and on POSIX a process that has mapped its files keeps them.
"""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from totalfast.errors import OptionError
from totalfast.system.disk import abandoned, lock_folder

if TYPE_CHECKING:
    from collections.abc import Iterator

LIMIT_VARIABLE = "TOTALFAST_CACHE_MAX_GB"
"""Environment variable with the size to which entries are pruned, in GB."""

LIMIT_GB = 10.0
"""Default of that size. All of TotalSegmentator's models fit: a converted network takes 0.12 GB."""

NEW, OLD = ".new-", ".old-"
"""Start of the names of unfinished and of removed entries."""

ABANDONED_AFTER_S = 3600
"""Age from which an unfinished entry without a lock counts as abandoned. Its process was killed
before it had the lock, or the disk has no locks; writing an entry takes at most minutes."""


class Entry(NamedTuple):
    """One entry."""

    folder: Path
    size: int
    """Bytes of its files."""
    used: float
    """Time of the last use, in seconds since the epoch."""


def limit_bytes() -> float:
    """Size to which entries are pruned.

    Raises
    ------
    OptionError
        If the environment variable holds no number, or a negative one.
    """
    text = os.environ.get(LIMIT_VARIABLE) or str(LIMIT_GB)
    try:
        limit = float(text)
    except ValueError:
        limit = math.nan
    if not 0 <= limit < math.inf:
        raise OptionError(f"{LIMIT_VARIABLE} must be a number of GB, 0 or more, not '{text}'.")
    return 1e9 * limit


def list_entries(cache: Path, prefix: str) -> list[Entry]:
    """List the entries whose names start with a prefix, least recently used first."""
    entries = []
    for folder in _children(cache, prefix):
        with contextlib.suppress(OSError):
            entries.append(Entry(folder, folder_size(folder), folder.lstat().st_mtime))
    return sorted(entries, key=lambda entry: entry.used)


def folder_size(folder: Path) -> int:
    """Bytes of all files below a folder; links are not followed."""
    size = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                size += os.lstat(os.path.join(parent, name)).st_size  # noqa: PTH118 - many files
    return size


def mark_used(entry: Path) -> None:
    """Set the time of an entry's last use to now, if this user may."""
    with contextlib.suppress(OSError, NotImplementedError):
        os.utime(entry, follow_symlinks=False)


def prune(cache: Path, prefix: str, *, keep: Path) -> None:
    """Remove the least recently used entries until the rest is at most ``limit_bytes()`` large.

    The entry ``keep`` stays, whatever its size.
    """
    entries, limit = list_entries(cache, prefix), limit_bytes()
    size = sum(entry.size for entry in entries)
    for entry in entries:
        if size <= limit:
            break
        if entry.folder != keep and remove(entry.folder):
            size -= entry.size


def remove(entry: Path) -> bool:
    """Remove an entry, or a link with its name; return whether the name is free.

    Windows does not remove files that a process has mapped: such an entry stays.
    """
    try:
        if entry.is_symlink() or entry.is_file():
            entry.unlink()
        elif entry.exists():
            # The rename is one step, so that no process finds half of the entry.
            aside = entry.with_name(f"{OLD}{secrets.token_hex(8)}")
            entry.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def unfinished_entry(cache: Path) -> Iterator[Path]:
    """Create an empty folder to write an entry into; removed on exit, unless it was renamed."""
    with tempfile.TemporaryDirectory(
        dir=cache, prefix=NEW, ignore_cleanup_errors=True
    ) as temporary:
        lock = lock_folder(Path(temporary))
        try:
            entry = Path(temporary) / "entry"
            entry.mkdir(mode=0o700)
            yield entry
        finally:
            lock.release(force=True)


def remove_leftovers(cache: Path) -> None:
    """Remove what killed processes left: unfinished entries, and entries removed in part."""
    for folder in _children(cache, OLD):
        shutil.rmtree(folder, ignore_errors=True)
    for folder in _children(cache, NEW):
        with contextlib.suppress(OSError):
            with abandoned(folder, after_s=ABANDONED_AFTER_S) as is_abandoned:
                pass
            if is_abandoned:
                shutil.rmtree(folder, ignore_errors=True)


def _children(cache: Path, prefix: str) -> list[Path]:
    """Folders in the cache, no links, whose names start with a prefix."""
    try:
        with os.scandir(cache) as found:
            return [
                Path(entry.path)
                for entry in found
                if entry.name.startswith(prefix) and entry.is_dir(follow_symlinks=False)
            ]
    except OSError:
        return []
