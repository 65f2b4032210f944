"""Temporary folders of cases that are elsewhere; those of killed processes are removed."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from totalfast.system.disk import abandoned, lock_folder

if TYPE_CHECKING:
    from collections.abc import Iterator

PREFIX = "totalfast-case-"

CONTENT = "content"
"""Name of the part that the caller uses, beside the lock."""

ABANDONED_AFTER_S = 3600.0
"""Age of a folder without a lock that counts as left by a killed process."""


@contextlib.contextmanager
def work_folder() -> Iterator[Path]:
    """Create an empty folder that only this user can read, and remove it at the end.

    It lies in the system's folder for temporary files (``TMPDIR``). Folders of processes that were
    killed are removed first.
    """
    remove_abandoned()
    with tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True) as folder:
        lock = lock_folder(Path(folder))
        try:
            content = Path(folder, CONTENT)
            content.mkdir()
            yield content
        finally:
            lock.release(force=True)


def remove_abandoned() -> None:
    """Remove the folders of processes that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # of another user, or removed meanwhile
            with abandoned(folder, after_s=ABANDONED_AFTER_S) as is_abandoned:
                pass
            if is_abandoned:
                shutil.rmtree(folder, ignore_errors=True)
