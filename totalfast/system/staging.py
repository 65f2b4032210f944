"""A hidden folder beside the results, where files wait until all of them are complete.

A staging folder lies in an existing folder, on the same disk as the results, so that files get to
their places by renaming. What the results replace waits there too, until all results are in place.
A journal of the renames makes it possible to undo them after the process was killed.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
import stat
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from totalfast.system.disk import LOCK, abandoned, lock_folder

if TYPE_CHECKING:
    from collections.abc import Iterator

    import filelock

PREFIX = ".totalfast-"
"""Start of the folder's name; programs that list results skip hidden files."""

NEW, OLD, JOURNAL = "new", "old", "journal.json"
"""Names in a staging folder, beside its lock."""

ABANDONED_AFTER_S = 24 * 3600
"""Age from which a staging folder with files but without a lock counts as abandoned: on a disk
without locks, nothing shows whether its process still runs."""

ATTEMPTS = 10
"""How often a folder is created anew if another process removes it before it is locked."""


_one_at_a_time = threading.RLock()
"""Held while a thread creates a folder, or looks whether one is abandoned: a folder is not locked
yet when it appears."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """One result on the way to its place.

    Parameters
    ----------
    name
        Path relative to the staging folder's parent.
    replaces
        Whether a file with this name was there before.
    """

    name: str
    replaces: bool


class Staging:
    """A staging folder in ``parent``, which must exist; created by ``open``."""

    def __init__(self, parent: Path) -> None:
        self.parent = parent
        self.folder = _new_name(parent)
        self._lock: filelock.BaseFileLock | None = None

    def open(self) -> None:
        """Create the folder, for this user only, and lock it.

        Raises
        ------
        OSError
            If the folder can't be created.
        """
        for _ in range(ATTEMPTS):
            with contextlib.suppress(FileNotFoundError):
                return self._create()
            if not self.parent.exists():
                break
            self.release()  # another process removed the folder before it was locked
            self.folder = _new_name(self.parent)
        return self._create()

    def _create(self) -> None:
        with _one_at_a_time:
            self.folder.mkdir(mode=0o700)  # fails if the name exists, also as a symbolic link
            self._lock = lock_folder(self.folder)
            (self.folder / NEW).mkdir()
            (self.folder / OLD).mkdir()
            self.folder.chmod(0o700)  # filelock creates a missing folder with another mode

    def path(self, target: Path) -> Path:
        """Path at which a target below ``parent`` waits; its folder is created."""
        staged = self.folder / NEW / target.relative_to(self.parent)
        staged.parent.mkdir(parents=True, exist_ok=True)
        return staged

    def clear(self) -> None:
        """Delete all waiting files."""
        shutil.rmtree(self.folder / NEW)
        (self.folder / NEW).mkdir()

    def moves(self) -> list[Move]:
        """List the renames that put all files into place.

        A folder that does not exist yet is one rename, so that it appears with all its files.
        """
        return list(self._moves(self.folder / NEW, self.parent))

    def _moves(self, staged: Path, place: Path) -> Iterator[Move]:
        for path in sorted(staged.iterdir()):
            target = place / path.name
            if path.is_dir() and target.is_dir():
                yield from self._moves(path, target)
                continue
            replaces = os.path.lexists(target)
            if replaces and (path.is_dir() or target.is_dir()):
                wrong = errno.ENOTDIR if path.is_dir() else errno.EISDIR
                raise OSError(wrong, os.strerror(wrong), str(target))
            yield Move(name=target.relative_to(self.parent).as_posix(), replaces=replaces)

    def write_journal(self, moves: list[Move]) -> None:
        """Write down the renames that follow."""
        draft = self.folder / f"{JOURNAL}.draft"
        content = {"moves": [{"name": move.name, "replaces": move.replaces} for move in moves]}
        with draft.open("w", encoding="utf-8") as stream:
            json.dump(content, stream)
            stream.flush()
            os.fsync(stream.fileno())
        draft.rename(self.folder / JOURNAL)

    def set_aside(self, move: Move) -> None:
        """Move the file that a result replaces into the staging folder."""
        if move.replaces:
            old = self.folder / OLD / move.name
            old.parent.mkdir(parents=True, exist_ok=True)
            (self.parent / move.name).rename(old)

    def place(self, move: Move) -> None:
        """Move a result to its place, which is free."""
        (self.folder / NEW / move.name).rename(self.parent / move.name)

    def undo(self, moves: list[Move]) -> None:
        """Move results back and restore what they replaced, however far the renames got."""
        for move in reversed(moves):
            new, target = self.folder / NEW / move.name, self.parent / move.name
            if not os.path.lexists(new) and os.path.lexists(target):
                target.rename(new)
        for move in moves:
            old = self.folder / OLD / move.name
            if move.replaces and os.path.lexists(old):
                old.rename(self.parent / move.name)

    def remove_journal(self) -> None:
        """Make the renames final."""
        (self.folder / JOURNAL).unlink()

    def remove(self) -> bool:
        """Delete the folder; return whether it is gone. Does nothing if it was never created."""
        _delete_content(self.folder)
        self.release()
        return _delete_folder(self.folder)

    def release(self) -> None:
        """Give up the lock."""
        if self._lock is not None:
            self._lock.release(force=True)


def _delete_content(folder: Path) -> None:
    """Delete all but the lock, without which the folder would not be known as abandoned."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != LOCK:
                path.unlink()


def _delete_folder(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        if all(path.name == LOCK for path in folder.iterdir()):
            shutil.rmtree(folder)
    return not os.path.lexists(folder)


def _new_name(parent: Path) -> Path:
    return parent / f"{PREFIX}{secrets.token_hex(8)}"


def recover(parent: Path) -> None:
    """Undo and delete what killed processes of this user left in a folder.

    Folders of running processes, of other users, and symbolic links are left alone.
    """
    try:
        names = [entry.name for entry in os.scandir(parent) if entry.name.startswith(PREFIX)]
    except OSError:
        return
    for name in names:
        folder = parent / name
        with contextlib.suppress(OSError, ValueError, TypeError, LookupError):
            if _is_ours(folder.lstat()):
                _recover(parent, folder)


def _is_ours(status: os.stat_result) -> bool:
    owned = not hasattr(os, "geteuid") or status.st_uid == os.geteuid()
    return stat.S_ISDIR(status.st_mode) and owned


def _recover(parent: Path, folder: Path) -> None:
    with _one_at_a_time:
        with abandoned(folder, after_s=ABANDONED_AFTER_S) as is_abandoned:
            if is_abandoned:
                _undo(parent, folder)
        if is_abandoned:
            _delete_folder(folder)  # only now, because Windows does not delete open files
        else:
            folder.rmdir()  # only if it is empty: its process was killed before it had a lock


def _undo(parent: Path, folder: Path) -> None:
    """Undo the renames of an abandoned folder, and delete all but its lock."""
    journal = folder / JOURNAL
    if journal.exists():
        content = json.loads(journal.read_text(encoding="utf-8"))
        moves = [Move(name=str(m["name"]), replaces=bool(m["replaces"])) for m in content["moves"]]
        if not all(_is_inside(move.name) for move in moves):
            return
        staging = Staging(parent)
        staging.folder = folder
        staging.undo(moves)
        staging.remove_journal()  # before the files that it would need are deleted
    _delete_content(folder)


def _is_inside(name: str) -> bool:
    path = Path(name)
    return not path.is_absolute() and ".." not in path.parts and bool(path.parts)
