"""The private folder of uploads; those of servers that were killed are removed by the next one."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

if TYPE_CHECKING:
    from collections.abc import Iterator

PREFIX = "totalfast-serve-"

LOCK = "server.lock"
"""Locked as long as the server lives."""


@contextlib.contextmanager
def upload_folder() -> Iterator[Path]:
    """Create a private folder for scans and results among the temporary files, and remove it.

    Scans of patients must not stay there: folders that killed servers of this user left are removed
    first.
    """
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        _remove_if_dead(folder)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    try:
        with FileLock(folder / LOCK):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_if_dead(folder: Path) -> None:
    with contextlib.suppress(OSError):
        if not _is_own(folder) or not (folder / LOCK).exists():
            return
        try:
            FileLock(folder / LOCK, timeout=0).acquire().lock.release()
        except Timeout:
            return  # its server is alive
        shutil.rmtree(folder)


def _is_own(folder: Path) -> bool:
    """Whether this is a folder of this user, not a link."""
    status = folder.lstat()
    own = not hasattr(os, "geteuid") or status.st_uid == os.geteuid()
    return own and stat.S_ISDIR(status.st_mode)
