"""Files that appear together: all that a run writes, or none of them.

Each file is written into a staging folder on the disk of its target. ``commit`` renames all of
them. Old files are moved away before the first new one gets its name, so that they never mix.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import threading
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from totalfast.errors import InterruptedAfterSaving, OutputError
from totalfast.system.disk import sync_folder
from totalfast.system.rescue import new_rescue_folder
from totalfast.system.signals import signals_held
from totalfast.system.staging import Move, Staging, recover

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from types import TracebackType

logger = logging.getLogger(__name__)


class PendingFiles:
    """Files that get their names together, by ``commit``.

    A context manager: files that were not committed are deleted at its end. ``write`` can be called
    from several threads.

    Parameters
    ----------
    rescue_from
        A folder above the targets. If a file can't be written to its place, all files go to a
        rescue folder, by their names relative to this one, and ``commit`` raises an error that
        names it. None: the first error ends the writing, and nothing is kept.
    """

    def __init__(self, *, rescue_from: Path | None = None) -> None:
        self._base = None if rescue_from is None else _resolved(rescue_from)
        self._stagings: dict[Path, Staging] = {}
        self._staged: dict[Path, Path] = {}
        self._last: Path | None = None
        self._failure: OSError | None = None
        self._rescue: Path | None = None
        self._recovered: set[Path] = set()
        self._lock = threading.Lock()

    def __enter__(self) -> PendingFiles:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with signals_held():
            self._discard()

    @property
    def targets(self) -> tuple[Path, ...]:
        """Final paths of the files that were written; symbolic links are resolved."""
        return tuple(self._staged)

    def prepare(self, targets: Iterable[Path]) -> None:
        """Check that files can be written, by writing a byte for each.

        Raises
        ------
        OutputError
            If a file can't be written, or its name is a folder's or a device's.
        """
        for target in targets:
            place = _resolved(target)
            _refuse_taken(target, place)
            try:
                self._stage(place).write_bytes(b"\0")
            except OSError as error:
                raise OutputError(f"can't write {target}: {_reason(error)}.") from error
        for staging in self._stagings.values():
            staging.clear()

    def require_space(self, sizes: Mapping[Path, int]) -> None:
        """Compare expected sizes with the free space of their disks.

        Parameters
        ----------
        sizes
            Target to its expected size in bytes.

        Raises
        ------
        OutputError
            If a disk has too little space.
        """
        needed: dict[Path, int] = defaultdict(int)
        for target, size in sizes.items():
            needed[_existing_folder(_resolved(target))] += size
        for folder, size in needed.items():
            free = shutil.disk_usage(folder).free
            if size > free:
                raise OutputError(
                    f"{folder} has {free / 1e6:.0f} MB of free space, but the results need about "
                    f"{size / 1e6:.0f} MB."
                )

    def write(
        self,
        target: Path,
        write: Callable[[Path], Any],
        *,
        folder: bool = False,
        last: bool = False,
        names_its_files: bool = False,
    ) -> None:
        """Let a function write one file, at a path with the target's own name.

        Parameters
        ----------
        target
            Final path; a symbolic link is followed. Its folder is created.
        write
            Function of the path to write to. If the disk refuses the first path, it is called a
            second time, with a path in the rescue folder.
        folder
            ``target`` is a folder, and ``write`` writes any files into it.
        last
            This file gets its name after all others.
        names_its_files
            ``write`` returns the paths of the files that it has written. They lie beside the given
            path and may have other names.

        Raises
        ------
        OutputError
            If the system can't write the file, and it can't be rescued.
        """
        place = _resolved(target)
        if last:
            self._last = place
        if self._failure is None:
            try:
                self._write_to(self._stage(place), place, write, folder, names_its_files)
            except OSError as error:
                self._fail(error, target)
            else:
                return
        try:
            self._write_to(self._rescue_path(place), place, write, folder, names_its_files)
        except OSError as error:
            raise self._lost(error) from error

    def staged(self, target: Path) -> Path:
        """Folder in which the written files of the folder ``target`` wait for ``commit``."""
        place = _resolved(target)
        if self._failure is not None:
            self._collect()
            return self._rescue_path(place)
        return self._stage(place)

    def commit(self) -> None:
        """Give all files their names; if that fails for one of them, no name changes.

        Raises
        ------
        OutputError
            If a file could not be written or renamed; it names the rescue folder with all files.
        InterruptedAfterSaving
            If a signal arrived meanwhile; all files have their names then.
        """
        try:
            with signals_held():
                self._commit()
        except KeyboardInterrupt as interruption:
            raise InterruptedAfterSaving from interruption

    def _commit(self) -> None:
        if self._failure is None:
            try:
                self._rename_all()
            except OSError as error:
                self._fail(error, next(iter(self._staged)))
        if self._failure is None:
            self._discard()
            return
        try:
            self._collect()
        except OSError as error:
            raise self._lost(error) from error
        folder, self._rescue = self._rescue, None  # it stays
        raise OutputError(
            f"can't write the results to their place: {_reason(self._failure)}. They are complete "
            f"in {folder}; move them from there."
        ) from self._failure

    def _rename_all(self) -> None:
        """Move old files away, then new files into place; undo everything after an error."""
        plans = {staging: staging.moves() for staging in self._stagings.values()}
        moves = [(staging, move) for staging, plan in plans.items() for move in plan]
        moves.sort(key=lambda item: self._comes_last(*item))
        try:
            for staging, plan in plans.items():
                staging.write_journal(plan)
            for staging, move in reversed(moves):
                staging.set_aside(move)
            for staging, move in moves:
                staging.place(move)
            for staging in plans:
                sync_folder(staging.parent)
            for staging in plans:
                staging.remove_journal()
        except BaseException:
            for staging, plan in plans.items():
                self._undo(staging, plan)
            raise

    def _undo(self, staging: Staging, moves: list[Move]) -> None:
        """Undo renames; what can't be undone now is left to the next run in this folder."""
        try:
            staging.undo(moves)
        except OSError as error:
            del self._stagings[staging.parent]
            staging.release()
            logger.warning(
                "WARNING: files in %s can't be restored: %s. They are kept in %s; the next run "
                "that writes to this folder tries again.",
                staging.parent,
                _reason(error),
                staging.folder,
            )

    def _comes_last(self, staging: Staging, move: Move) -> bool:
        return self._last is not None and staging.parent / move.name == self._last

    def _write_to(
        self,
        staged: Path,
        place: Path,
        write: Callable[[Path], Any],
        folder: bool,  # noqa: FBT001 - as in write()
        names_its_files: bool,  # noqa: FBT001
    ) -> None:
        if folder:
            staged.mkdir(exist_ok=True)
        written = write(staged)
        if folder:
            written = list(staged.iterdir())
        elif not names_its_files:
            written = [staged]
        for path in written:
            _sync(path)
            with self._lock:
                self._staged[place.parent / path.relative_to(staged.parent)] = path

    def _stage(self, place: Path) -> Path:
        """Path in the staging folder of the deepest existing folder above ``place``."""
        with self._lock:
            self._recover_above(place)
            parent = _existing_folder(place)
            staging = self._stagings.get(parent)
            if staging is None:
                # Registered before it exists, so that it is always removed.
                staging = self._stagings[parent] = Staging(parent)
                staging.open()
            return staging.path(place)

    def _recover_above(self, place: Path) -> None:
        """Undo what killed runs left, from the outermost folder inwards.

        A killed run may have created any of the folders; undoing it removes them.
        """
        for folder in reversed(place.parents):
            if folder not in self._recovered:
                self._recovered.add(folder)
                recover(folder)

    def _fail(self, error: OSError, target: Path) -> None:
        """Note an error, or raise it if nothing is to be rescued."""
        if self._base is None:
            raise OutputError(f"can't write {target}: {_reason(error)}.") from error
        self._failure = self._failure or error

    def _rescue_path(self, place: Path) -> Path:
        with self._lock:
            if self._rescue is None:
                self._rescue = new_rescue_folder()
        name = Path(place.name)
        if self._base is not None and place.is_relative_to(self._base):
            name = place.relative_to(self._base)
        path = self._rescue / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _collect(self) -> None:
        """Copy all files that wait in staging folders to the rescue folder."""
        for place, staged in self._staged.items():
            rescued = self._rescue_path(place)
            if staged != rescued:
                shutil.copyfile(staged, rescued)
                _sync(rescued)
                self._staged[place] = rescued

    def _lost(self, error: OSError) -> OutputError:
        first = _reason(self._failure or error)
        return OutputError(
            f"can't write the results: {first}. They can't be kept elsewhere either: "
            f"{_reason(error)}. Free some space and run the command again."
        )

    def _discard(self) -> None:
        """Delete the staging folders, and a rescue folder that was not handed over."""
        for staging in self._stagings.values():
            if not staging.remove():
                logger.warning("WARNING: can't delete the temporary folder %s.", staging.folder)
        self._stagings.clear()
        if self._rescue is not None:
            shutil.rmtree(self._rescue, ignore_errors=True)
            self._rescue = None


def _resolved(path: Path) -> Path:
    """Absolute path of what is written: where symbolic links lead to, also if nothing is there."""
    return Path(os.path.realpath(path))


def _existing_folder(place: Path) -> Path:
    """The deepest folder above a path that exists."""
    for folder in place.parents:
        if folder.is_dir():
            return folder
        if os.path.lexists(folder):
            raise NotADirectoryError(errno.ENOTDIR, f"{folder} is no folder")
    raise FileNotFoundError(errno.ENOENT, f"no folder above {place} exists")


def _refuse_taken(target: Path, place: Path) -> None:
    if not os.path.lexists(place):
        return
    if not place.is_file():
        what = "a folder" if place.is_dir() else "no ordinary file"
        raise OutputError(f"{target} is {what}, so no file can be written there.")
    if not os.access(place, os.W_OK):
        raise OutputError(f"{target} is write-protected.")


def _sync(path: Path) -> None:
    """Write a file's content to the disk."""
    with contextlib.suppress(FileNotFoundError), path.open("rb+") as stream:
        os.fsync(stream.fileno())


def _reason(error: OSError) -> str:
    """The system's message, without the name of a temporary file."""
    return error.strerror or str(error)
