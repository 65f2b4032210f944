"""The folders of submitted runs: how much of the disk they take, and may take.

All methods are for the event loop's thread.
"""

from __future__ import annotations

import secrets
import shutil
from typing import TYPE_CHECKING

from totalfast.errors import TotalfastError

if TYPE_CHECKING:
    from pathlib import Path


class FullError(TotalfastError):
    """There is no room for more files."""


class Storage:
    """Folders of runs, and the bytes in them.

    Parameters
    ----------
    folder
        Private folder; its owner removes it.
    limit_bytes
        Maximum size of all files together.
    free_bytes
        Bytes of the disk that stay free.
    """

    def __init__(self, folder: Path, *, limit_bytes: int, free_bytes: int) -> None:
        self._folder = folder
        self._limit_bytes, self._free_bytes = limit_bytes, free_bytes
        self._claimed: dict[Path, int] = {}

    @property
    def used_bytes(self) -> int:
        """Size of all files."""
        return sum(self._claimed.values())

    def new_folder(self) -> Path:
        """Return a new folder."""
        folder = self._folder / secrets.token_hex(16)
        folder.mkdir(mode=0o700)
        self._claimed[folder] = 0
        return folder

    def check(self, expected_bytes: int) -> None:
        """Check that there is room.

        Raises
        ------
        FullError
            If there is not.
        """
        if self.used_bytes + expected_bytes > self._limit_bytes:
            raise FullError(
                f"files of runs take {self.used_bytes / 1e6:.0f} MB of the "
                f"{self._limit_bytes / 1e6:.0f} MB that they may take (--max-storage); try again "
                "when older runs were removed."
            )
        free_bytes = shutil.disk_usage(self._folder).free
        if free_bytes - expected_bytes < self._free_bytes:
            raise FullError(
                f"the server's disk for temporary files has {free_bytes / 1e6:.0f} MB left."
            )

    def claim(self, folder: Path, count: int) -> None:
        """Note that files in a folder grow by a number of bytes, or shrink if it is negative.

        Raises
        ------
        FullError
            If there is no room for them.
        """
        if count > 0:
            self.check(count)
        self._claimed[folder] += count

    def measure(self, folder: Path) -> None:
        """Note the size of the files that are in a folder now."""
        if folder in self._claimed:
            files = [path for path in folder.rglob("*") if path.is_file()]
            self._claimed[folder] = sum(path.stat().st_size for path in files)

    def remove(self, folder: Path) -> None:
        """Remove a folder."""
        self._claimed.pop(folder, None)
        shutil.rmtree(folder, ignore_errors=True)
