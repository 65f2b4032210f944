"""A file that appears whole in place of an older one, also if several processes write it."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING

from totalfast.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Callable

ENDING = ".part"
"""Ending of an unfinished file; its name starts with a dot, so that lists of results skip it."""

ABANDONED_AFTER_S = 24 * 3600
"""Age from which an unfinished file counts as that of a killed process; writing takes minutes."""


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let a function write a hidden file beside the place, then rename it.

    Parameters
    ----------
    path
        Final path; a symbolic link is followed. Its folder is created.
    write
        Function of the path to write to.

    Raises
    ------
    OutputError
        If the system can't write the file; what was there before stays.

    Notes
    -----
    ``PendingFiles`` keeps many files together, and for this it moves old ones away first. Here one
    rename replaces the old file, so that readers always find one, and the last writer wins.
    """
    place = Path(os.path.realpath(path))
    unfinished = place.with_name(f".{place.name}-{secrets.token_hex(8)}{ENDING}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(place)
        write(unfinished)
        with unfinished.open("rb+") as stream:
            os.fsync(stream.fileno())
        unfinished.replace(place)
    except OSError as error:
        raise OutputError(f"can't write {path}: {error.strerror or error}.") from error
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()


def _remove_abandoned(place: Path) -> None:
    """Delete unfinished files that killed processes left long ago."""
    start = f".{place.name}-"
    for path in place.parent.iterdir():
        if path.name.startswith(start) and path.name.endswith(ENDING):
            with contextlib.suppress(OSError):
                if time.time() - path.lstat().st_mtime > ABANDONED_AFTER_S:
                    path.unlink()
