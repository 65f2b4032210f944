"""The folder for files that can be created again, and whether its content may be trusted.

Cached files decide what a program computes, and compiled functions are code. So a folder is used
only if nobody but this user (or root) can have written to it. The check needs POSIX's owners and
modes; on Windows the user's cache is private already.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import stat
from pathlib import Path

import platformdirs

logger = logging.getLogger(__name__)

FOLDER_VARIABLE = "TOTALFAST_CACHE_DIR"
"""Environment variable with a folder to use instead of the user's cache."""

PRIVATE = 0o700
"""Mode of new folders."""

WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def cache_folder() -> Path | None:
    """Return the path of the cache folder; it may not exist.

    None if the user has no home: ``HOME`` is unset and the system does not list the user.
    """
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder:
        return Path(folder).absolute()
    try:
        user_cache = platformdirs.user_cache_path("totalfast", appauthor=False)
    except (RuntimeError, KeyError):
        return None
    # Without a home "~" is not replaced, and the path would lie in the current folder.
    return user_cache if user_cache.is_absolute() else None


def distrust(folder: Path) -> str:
    """Why a folder's content can't be trusted; an empty text if it can.

    Raises
    ------
    OSError
        If the folder does not exist or can't be examined.
    """
    status = folder.lstat()
    if stat.S_ISLNK(status.st_mode):
        return "it is a symbolic link"
    if not stat.S_ISDIR(status.st_mode):
        return "it is not a folder"
    if hasattr(os, "geteuid"):
        if status.st_uid not in (os.geteuid(), 0):
            return f"it belongs to another user (id {status.st_uid}, yours is {os.geteuid()})"
        if status.st_mode & WRITABLE_BY_OTHERS:
            return f"other users can write to it (mode {stat.S_IMODE(status.st_mode):03o})"
    return ""


def usable_cache() -> Path | None:
    """Return the cache folder, created if it is missing; None if it can't be used.

    A folder that must not be trusted is named in a warning, once per process.
    """
    folder, reason = check_cache()
    if reason:
        _warn(f"{reason} Each run starts more slowly; {FOLDER_VARIABLE} sets another folder.")
        return None
    return folder


def check_cache() -> tuple[Path | None, str]:
    """Return the cache folder, created if it is missing, and why it is not used: a sentence."""
    folder = cache_folder()
    if folder is None:
        return None, "No cache folder is used: this user has no home folder."
    try:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=PRIVATE, parents=True)
        _close_to_group(folder)
        reason = distrust(folder)
    except OSError as error:
        reason = error.strerror or str(error)
    return folder, f"The cache folder {folder} is not used: {reason}." if reason else ""


def subfolder(name: str) -> Path | None:
    """Return a private folder in the cache, created if it is missing; None if it can't be used."""
    cache = usable_cache()
    if cache is None:
        return None
    folder = cache / name
    try:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=PRIVATE)
        _close_to_group(folder)
        reason = distrust(folder)
    except OSError as error:
        reason = error.strerror or str(error)
    if reason:
        _warn(f"The cache folder {folder} is not used: {reason}. Delete it.")
        return None
    return folder


def _close_to_group(folder: Path) -> None:
    """Take the group's right to write from a folder of this user, left by umask 002.

    Every entry's owner is checked too, so an entry that the group planted before is not used.
    """
    status = folder.lstat()
    own = hasattr(os, "geteuid") and status.st_uid == os.geteuid()
    only_group = status.st_mode & WRITABLE_BY_OTHERS == stat.S_IWGRP
    if own and stat.S_ISDIR(status.st_mode) and only_group:
        with contextlib.suppress(OSError):
            folder.chmod(stat.S_IMODE(status.st_mode) & ~stat.S_IWGRP)


@functools.cache
def _warn(message: str) -> None:
    """Log a warning, once per process."""
    logger.warning("%s", message)
