"""The manifest of a batch: what is done, and with which options, so that a batch can go on.

Each process appends to a file of its own, so that processes on several machines can share a folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import threading
import time
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import filelock

from totalfast.batch.results.entries import (
    DONE,
    FORMAT,
    Entry,
    manifest_files,
    note_last,
    read_content,
    read_entries,
)
from totalfast.errors import OptionError, OutputError
from totalfast.files.targets import FILE_MARKER_ENDING, FOLDER_MARKER
from totalfast.system.disk import sync_folder

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from types import TracebackType
    from typing import BinaryIO

    from totalfast.batch.finding.cases import Case

__all__ = ["Entry", "Manifest", "completed_files", "read_entries", "written_files"]

logger = logging.getLogger(__name__)

WAIT_S = 5.0
"""How long another process may hold a lock; others look at it for a moment when they start."""

SUMMARY = "summary"
"""Name of the lock of what is written from the entries of all parts."""

SUMMARY_S = 600.0
"""How long another part may take to write a table and a report."""

POLL_S = 0.1
"""Time between two looks at another process's file."""

FEW = 8
"""Up to this number of files of one folder are looked up one by one; then the folder is listed,
which is much faster on a network disk."""


class Manifest:
    """The manifest in a batch's folder, for one process; a context manager.

    Parameters
    ----------
    folder
        The batch's folder of results; created if it is missing.
    options
        The options that change results. Paths are taken as strings, their order does not matter.
    part
        Number of this process's part of the batch, from 0, and number of all parts.

    Raises
    ------
    OptionError
        If the part does not exist, or the folder has results of other options.
    OutputError
        If another process writes the same part, or the file can't be written.

    Notes
    -----
    ``add`` can be called from several threads. A file is locked as long as its process runs.
    The lock is flock's on Linux and macOS, so it also works between machines if the disk is NFS and
    locks are not switched off (mount options ``nolock``, ``local_lock``). Where the disk has no
    locks, a warning is given, and two processes of the same part are not noticed. Batches with
    different numbers of parts may run at once in one folder; they then do some cases twice.
    """

    def __init__(
        self, folder: Path, options: Mapping[str, object], *, part: tuple[int, int] = (0, 1)
    ) -> None:
        self.folder = folder
        self.part = part
        self.file = folder / _file_name(*part)
        self._options: dict[str, Any] = _plain(options)
        self._threads = threading.Lock()
        self._lock = _lock_of(self.file, timeout_s=WAIT_S)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _acquire(self._lock, self.file)
            self._open()
        except OSError as error:
            self.close()
            raise OutputError(f"can't write {self.file}: {error.strerror or error}.") from error
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Manifest:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._forget()
        self.close()

    def close(self) -> None:
        """Let another process write this part."""
        self._lock.release(force=True)

    def _forget(self) -> None:
        """Remove the file if it has no entries: the batch found no cases, for example."""
        with contextlib.suppress(OSError, OutputError):
            if not read_content(self.file).entries:
                self.file.unlink()
                self.close()
                Path(self._lock.lock_file).unlink()

    @contextlib.contextmanager
    def summing_up(self) -> Iterator[dict[str, Entry]]:
        """Give the last entry of each case, and keep other parts from this until the context ends.

        What is written from the entries in this context, such as a table, is not replaced by that
        of a part that read its entries earlier.
        """
        lock = _lock_of(self.folder / SUMMARY, timeout_s=SUMMARY_S)
        try:
            lock.acquire(poll_interval=POLL_S)
        except (filelock.Timeout, OSError, NotImplementedError) as error:
            logger.debug("%s can't be locked: %s", self.folder, error)
        try:
            yield self.entries()
        finally:
            lock.release(force=True)

    def _open(self) -> None:
        """Compare the options, write the header, and read what is done."""
        known = manifest_files(self.folder)
        for file in known:
            self._refuse_other_options(file)
        own = read_content(self.file)
        if not own.entries and self._options not in own.options:
            self.file.unlink(missing_ok=True)  # a batch that was ended before its first case
        if self._options not in own.options:
            self._append(
                {"manifest": FORMAT, "options": self._options, "hash": self.options_hash()}
            )
            with contextlib.suppress(OSError):  # not every network disk has this
                sync_folder(self.folder)
        try:
            for file in set(manifest_files(self.folder)) - set(known):
                self._refuse_other_options(file)
        except OptionError:  # two batches were started at the same time
            if not own.entries:
                self.file.unlink(missing_ok=True)
            raise
        self._entries = read_entries(self.folder)

    def _refuse_other_options(self, file: Path) -> None:
        """Refuse a file of other options, unless its batch was ended before its first case."""
        latest = time.monotonic() + WAIT_S
        while True:
            content = read_content(file)
            others = [options for options in content.options if options != self._options]
            if not others:
                return
            if not content.entries and (file == self.file or not _is_locked(file)):
                return
            if content.entries or time.monotonic() > latest:
                raise OptionError(self._difference(others[0]))
            time.sleep(POLL_S)  # its process may be about to replace an old header

    def _difference(self, old: dict[str, Any]) -> str:
        """Describe which options differ, with both values, and what to do."""
        names = sorted({*old, *self._options})
        changes = [
            f"{name} was {_shown(old, name)} and is now {_shown(self._options, name)}"
            for name in names
            if old.get(name) != self._options.get(name) or (name in old) != (name in self._options)
        ]
        return (
            f"{self.folder} has results of a batch with other options: {'; '.join(changes)}. Name "
            "another folder with -o, or give the same options as before."
        )

    def options_hash(self) -> str:
        """Hash of the options; the same on every machine and for every order of the options."""
        text = json.dumps(self._options, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def add(self, entry: Entry) -> None:
        """Add an entry; it is on the disk when this returns.

        Raises
        ------
        OutputError
            If it can't be written, for example because the disk is full.
        """
        self._append(entry.to_json())
        with self._threads:
            note_last(self._entries, entry)

    def _append(self, content: dict[str, Any]) -> None:
        """Write a line, on a line of its own also if the last one was cut off."""
        line = json.dumps(content, separators=(",", ":")).encode() + b"\n"
        try:
            with self._threads, self.file.open("a+b", buffering=0) as stream:
                _write_all(stream, line if _ends_with_newline(stream) else b"\n" + line)
                os.fsync(stream.fileno())
        except OSError as error:
            raise OutputError(
                f"can't write {self.file}: {error.strerror or error}. Results that are complete "
                "stay; once the file can be written, run the same command again to go on."
            ) from error

    def entries(self) -> dict[str, Entry]:
        """Read the last entry of each case from the disk, also those of other processes."""
        return read_entries(self.folder)

    def last_entry(self, name: str) -> Entry | None:
        """Return a case's last entry, of those that were there at the start or added here."""
        return self._entries.get(name)

    def waiting(self, cases: Iterable[Case]) -> list[Case]:
        """Return the cases that are not done, in their order."""
        return [case for case in cases if not self.is_done(case)]

    def bring(self, files: Iterable[Path]) -> None:
        """Make files of the batch's folder readable here, as far as they exist: they are."""

    def is_done(self, case: Case) -> bool:
        """Whether a case's results exist, whole, of these options and this input.

        Its last entry must be "done", with the same options and fingerprint. The completion markers
        among its files must be there, and all files that the markers and the entry list.
        """
        entry = self.last_entry(case.name)
        return (
            entry is not None
            and entry.state == DONE
            and entry.options == self.options_hash()
            and entry.fingerprint == case.fingerprint()
            and self._is_complete(entry)
        )

    def _is_complete(self, entry: Entry) -> bool:
        markers = [self.folder / file for file in entry.files if is_marker(file)]
        return (
            bool(markers)
            and all(completed_files(marker, self.folder) for marker in markers)
            and _all_exist(self.folder, written_files(entry, self.folder))
        )


def written_files(entry: Entry, folder: Path) -> set[str]:
    """Files of an entry, and those that the completion markers among them list.

    Parameters
    ----------
    entry
        Its files may be all, or the completion markers only.
    folder
        The batch's folder of results.

    Returns
    -------
        Paths relative to ``folder``, with "/" between the parts.
    """
    files = set(entry.files)
    for file in entry.files:
        if is_marker(file):
            files.update(completed_files(folder / file, folder))
    return files


def completed_files(marker: Path, folder: Path) -> tuple[str, ...]:
    """List the files that a completion marker names, and the marker; none if it is not whole.

    Parameters
    ----------
    marker
        The marker, as ``files.targets.marker_file`` names it.
    folder
        The batch's folder of results.

    Returns
    -------
        Paths relative to ``folder``, with "/" between the parts: the value of ``Entry.files``.
    """
    try:
        content = json.loads(marker.read_text(encoding="utf-8"))
        names = [str(name) for name in content["files"]]
    except (OSError, ValueError, LookupError, TypeError):
        return ()
    parent = os.path.relpath(marker.parent.resolve(), folder.resolve())
    paths = [os.path.normpath(f"{parent}/{name}") for name in (marker.name, *names)]
    return tuple(sorted(path.replace(os.sep, "/") for path in paths))


def is_marker(file: str) -> bool:
    """Whether a name is that of a completion marker."""
    return PurePosixPath(file).name == FOLDER_MARKER or file.endswith(FILE_MARKER_ENDING)


def _all_exist(folder: Path, names: Iterable[str]) -> bool:
    by_parent: dict[Path, set[str]] = {}
    for name in names:
        path = folder / name
        by_parent.setdefault(path.parent, set()).add(path.name)
    return all(_hold(parent, wanted) for parent, wanted in by_parent.items())


def _hold(folder: Path, names: set[str]) -> bool:
    if len(names) <= FEW:
        return all((folder / name).exists() for name in names)
    try:
        return names <= {path.name for path in folder.iterdir()}
    except OSError:
        return False


def _file_name(number: int, parts: int) -> str:
    if not 0 <= number < parts:
        raise OptionError(
            f"part {number} of {parts} does not exist; parts have the numbers 0 to {parts - 1}."
            if parts > 0
            else f"the number of parts must be 1 or more, not {parts}."
        )
    return "manifest.jsonl" if parts == 1 else f"manifest-{number}-of-{parts}.jsonl"


def _lock_of(file: Path, *, timeout_s: float) -> filelock.BaseFileLock:
    path = file.with_name(f".{file.name}.lock")
    return filelock.FileLock(path, timeout=timeout_s, thread_local=False)


def _acquire(lock: filelock.BaseFileLock, file: Path) -> None:
    """Lock a file for this process; the system gives up the lock of a process that has ended."""
    try:
        lock.acquire(poll_interval=POLL_S)
    except filelock.Timeout as error:
        raise OutputError(
            f"another process writes {file}. Wait until it ends, name another folder with -o, or "
            "give each process a --part-id of its own."
        ) from error
    except (OSError, NotImplementedError) as error:
        logger.warning(
            "WARNING: %s can't be locked (%s); start only one process for each part.", file, error
        )


def _is_locked(file: Path) -> bool:
    lock = _lock_of(file, timeout_s=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        return True
    except (OSError, NotImplementedError):
        return False
    lock.release()
    return False


def _ends_with_newline(stream: BinaryIO) -> bool:
    """Whether a file is empty or its last line is whole."""
    if not stream.seek(0, os.SEEK_END):
        return True
    stream.seek(-1, os.SEEK_END)
    return stream.read(1) == b"\n"


def _write_all(stream: BinaryIO, data: bytes) -> None:
    """Write with one call; the rest of a short write is tried again, which gives the error."""
    while data:
        data = data[stream.write(data) :]


def _plain(value: object) -> Any:  # noqa: ANN401 - a JSON value
    """Turn a value into what it is when it is read from JSON; paths become strings."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, set | frozenset):
        return sorted(map(_plain, value))
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "items"):
        return {str(name): _plain(item) for name, item in value.items()}
    return value


def _shown(options: dict[str, Any], name: str) -> str:
    return repr(options[name]) if name in options else "not given"
