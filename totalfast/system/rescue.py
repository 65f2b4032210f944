"""Where results go that can't be written to their own place, so that a run is never lost."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import platformdirs

if TYPE_CHECKING:
    from collections.abc import Iterator

FOLDER_VARIABLE = "TOTALFAST_RESCUE_DIR"
"""Environment variable with a folder to use before all others."""


def new_rescue_folder() -> Path:
    """Create a folder for the files of one run, which only this user can read.

    Returns
    -------
        A new folder in the first of these folders that can be written to: the environment
        variable's, the user's folder for application data, the folder for temporary files.

    Raises
    ------
    OSError
        If none of them can be written to.
    """
    prefix = f"{time.strftime('%Y%m%d-%H%M%S')}-"
    *parents, last = _parents()
    for parent in parents:
        with contextlib.suppress(OSError):
            parent.mkdir(parents=True, exist_ok=True)
            return Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    last.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=prefix, dir=last))


def _parents() -> Iterator[Path]:
    chosen = os.environ.get(FOLDER_VARIABLE)
    if chosen:
        yield Path(chosen).absolute()
    # Without a home folder: HOME is unset, and the system does not list this user.
    with contextlib.suppress(RuntimeError, KeyError):
        yield platformdirs.user_data_path("totalfast", appauthor=False) / "rescued"
    yield Path(tempfile.gettempdir())
