"""What must reach the disk first, and folders that a killed process left."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from typing import TYPE_CHECKING

import filelock

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LOCK = "lock"
"""Name of the file that a process locks in its temporary folder."""


FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}
"""Errors of a disk or a quota without space."""


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or one that caused it, is that of a full disk."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        error = error.__cause__ or error.__context__
    return False


def sync_folder(folder: Path) -> None:
    """Write a folder's list of files to the disk; does nothing on Windows."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def kept_if_used(folder: Path) -> Iterator[None]:
    """Create a folder, if it is missing, and remove it at the end if it is empty."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()


def lock_folder(folder: Path) -> filelock.BaseFileLock:
    """Show that this process works in a folder, as far as the disk has locks."""
    lock = filelock.FileLock(folder / LOCK, thread_local=False)
    with contextlib.suppress(OSError, NotImplementedError):
        lock.acquire(timeout=0)
    return lock


@contextlib.contextmanager
def abandoned(folder: Path, *, after_s: float) -> Iterator[bool]:
    """Tell whether the process that worked in a folder has ended; nobody else gets the same answer.

    Parameters
    ----------
    folder
        The folder.
    after_s
        Age in seconds from which a folder without a lock counts as abandoned: its process was
        killed before it had the lock, or the disk has no locks.
    """
    lock = folder / LOCK
    if not lock.exists():
        yield time.time() - folder.lstat().st_mtime > after_s
        return
    own = filelock.FileLock(lock, timeout=0, thread_local=False)
    try:
        own.acquire()  # the system gives up the locks of a process that has ended
    except (filelock.Timeout, NotImplementedError):
        yield False
        return
    try:
        yield True
    finally:
        own.release()
