"""Runs that were submitted by HTTP: which ones there are, their files, how long they are kept.

Knows nothing of HTTP itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from totalfast.errors import OptionError, TotalfastError
from totalfast.serve.http_steps import Steps
from totalfast.serve.runs import Run
from totalfast.serve.submitted import Submitted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from totalfast.serve.frames import Frame
    from totalfast.serve.http_limits import HttpLimits
    from totalfast.serve.run_queue import RunQueue
    from totalfast.serve.storage import Storage
    from totalfast.serve.studies import Studies, StudyOrder

OWN = ("input", "output")
"""Arguments with paths in the private folder of a run that has one."""

CLOSING_S = 5.0
"""Seconds within which cancelled transfers end."""


class BusyError(TotalfastError):
    """No run is accepted now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """What a command line means.

    Parameters
    ----------
    paths
        Argument to absolute path.
    output_name
        Name of its output in a folder.
    output_types
        Those that its flags name; none for the default.
    """

    paths: Mapping[str, str]
    output_name: str
    output_types: tuple[str, ...] = ()


class HttpRuns:
    """All submitted runs. The methods are for the event loop's thread.

    Parameters
    ----------
    queue
        Does the runs.
    limits
        What clients may do.
    read_command
        Parses a command line. It raises ``OptionError`` for one that is not valid or not allowed.
    storage
        Folders for uploads and results.
    studies
        Fetches and stores studies; None if there are no DICOMweb servers.
    """

    def __init__(
        self,
        queue: RunQueue,
        *,
        limits: HttpLimits,
        read_command: Callable[[Sequence[str]], Command],
        storage: Storage,
        studies: Studies | None = None,
    ) -> None:
        self.limits, self.storage, self.studies = limits, storage, studies
        self.ended: dict[str, int] = {"done": 0, "failed": 0, "cancelled": 0}
        """How many runs have ended, by state."""
        self._queue, self._read_command = queue, read_command
        self._submitted: dict[str, Submitted] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._steps = Steps(queue, studies)

    def __len__(self) -> int:
        return len(self._queue)

    def get(self, name: str) -> Submitted | None:
        """Return a run by its id."""
        return self._submitted.get(name)

    def check_open(self) -> None:
        """Check that runs are accepted now.

        Raises
        ------
        BusyError
            If they are not.
        """
        reason = self._queue.why_closed()
        if reason:
            raise BusyError(f"{reason}.")

    def submit_paths(self, source: Path, output: Path, flags: Sequence[str]) -> Submitted:
        """Submit a run of a scan on this machine.

        Raises
        ------
        BusyError, OptionError, OutsideError
            If no run is accepted, the flags are not valid, or a path is outside of the roots.
        """
        return self._submit(source, output, flags)

    def submit_upload(self, scan: Path, flags: Sequence[str], folder: Path) -> Submitted:
        """Submit a run of a scan in a folder of the storage; errors as ``submit_paths``."""
        command = self._read_command([*flags, "-i", str(scan), "-o", str(folder)])
        return self._submit(scan, _output_in(folder, command), flags, folder=folder)

    def submit_order(self, order: StudyOrder, flags: Sequence[str]) -> Submitted:
        """Submit a run of a series that is fetched first; errors as ``submit_paths``."""
        folder = self.storage.new_folder()
        with self.removed_on_error(folder):
            scan = folder / "scan"
            command = self._read_command([*flags, "-i", str(scan), "-o", str(folder)])
            if order.push is not None and not command.output_types:
                flags = [*flags, "-ot", "dicom_seg"]
                command = self._read_command([*flags, "-i", str(scan), "-o", str(folder)])
            if order.push is not None and {*command.output_types} == {"nifti"}:
                raise OptionError("only DICOM results can be pushed: dicom_seg, dicom_rtstruct.")
            output = _output_in(folder, command)
            return self._submit(scan, output, flags, folder=folder, order=order)

    def cancel(self, submitted: Submitted) -> None:
        """End a run, or forget it and remove its uploaded and written files if it has ended."""
        if submitted.ended is not None:
            self._forget(submitted)
            return
        self._steps.cancel(submitted)

    async def close(self) -> None:
        """Cancel all runs, and wait a moment until they have ended."""
        for submitted in list(self._submitted.values()):
            if submitted.ended is None:
                self.cancel(submitted)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=CLOSING_S)

    @contextlib.contextmanager
    def removed_on_error(self, folder: Path) -> Iterator[None]:
        """Remove a folder of the storage if it does not become a run."""
        try:
            yield
        except BaseException:
            self.storage.remove(folder)
            raise

    def _submit(
        self,
        source: Path,
        output: Path,
        flags: Sequence[str],
        *,
        folder: Path | None = None,
        order: StudyOrder | None = None,
    ) -> Submitted:
        self.check_open()
        words = [*flags, "-i", str(source), "-o", str(output)]
        paths = self._read_command(words).paths
        if paths["input"] != str(source) or paths["output"] != str(output):
            raise OptionError("flags must not contain input or output.")
        own = () if folder is None else OWN
        for name in paths.keys() - own:
            self.limits.check(Path(paths[name]))
        submitted = self._new(words, paths, folder)
        self._queue.reserve(submitted.run)
        task = asyncio.ensure_future(self._follow(submitted, order))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return submitted

    def _new(
        self, words: Sequence[str], paths: Mapping[str, str], folder: Path | None
    ) -> Submitted:
        loop = asyncio.get_running_loop()

        def send(event: Frame) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended
                loop.call_soon_threadsafe(submitted.note, event)

        own = () if folder is None else OWN
        run = Run(
            number=self._queue.next_number(),
            words=tuple(words),
            paths=dict(paths),
            send=send,
            check=functools.partial(self.limits.check_again, own=own),
        )
        submitted = Submitted(id=secrets.token_hex(16), folder=folder, run=run)
        self._submitted[submitted.id] = submitted
        return submitted

    async def _follow(self, submitted: Submitted, order: StudyOrder | None) -> None:
        """Do a run's steps, within its time, and note how it ends."""
        loop = asyncio.get_running_loop()
        run_s, keep_s = self.limits.run_s, self.limits.keep_s
        timer = None if run_s is None else loop.call_later(run_s, self._end_late, submitted)
        try:
            last = await self._steps.last_event(submitted, order)
        finally:
            self._queue.release(submitted.run)
            if timer is not None:
                timer.cancel()
        if submitted.is_late and last["code"] != 0:
            last = {**last, "error": f"ERROR: the run took more than {run_s:.0f} s (--max-time)."}
        if submitted.folder is not None:
            self.storage.measure(submitted.folder)
        submitted.note(last)
        self.ended[submitted.state] += 1
        if keep_s is not None:
            loop.call_later(keep_s, self._forget, submitted)

    def _end_late(self, submitted: Submitted) -> None:
        submitted.is_late = True
        self.cancel(submitted)

    def _forget(self, submitted: Submitted) -> None:
        self._submitted.pop(submitted.id, None)
        if submitted.folder is not None:
            self.storage.remove(submitted.folder)


def _output_in(folder: Path, command: Command) -> Path:
    """Return the output of a command in a folder of the storage."""
    (folder / "result").mkdir(exist_ok=True)
    return folder / "result" / command.output_name
