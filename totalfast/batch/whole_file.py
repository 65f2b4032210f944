"""A file that appears whole in place of an older one, also if several processes write it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from totalfast.errors import OutputError
from totalfast.system.staging import Staging, recover

if TYPE_CHECKING:
    from collections.abc import Callable


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let a function write a file in a hidden folder beside its place, then rename it.

    Parameters
    ----------
    path
        Final path; a symbolic link is followed. Its folder is created.
    write
        Function of the path to write to, which has the same name.

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
    staging = Staging(place.parent)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        recover(place.parent)
        staging.open()
        staged = staging.path(place)
        write(staged)
        with staged.open("rb+") as stream:
            os.fsync(stream.fileno())
        staged.replace(place)
    except OSError as error:
        raise OutputError(f"can't write {path}: {error.strerror or error}.") from error
    finally:
        staging.remove()
