"""Runs that were submitted by HTTP: their state, their files, and who watches them.

Knows nothing of HTTP itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from totalfast.errors import OptionError, TotalfastError
from totalfast.serve.runs import Run

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from totalfast.serve.frames import Frame
    from totalfast.serve.run_queue import RunQueue

KEPT_EVENTS = 10_000
"""Maximum number of events of a run that are kept for late watchers; later ones are dropped."""

LAST_EVENTS = ("ended", "refused")


class BusyError(TotalfastError):
    """No run is accepted now."""


class OutsideError(TotalfastError):
    """A path lies outside of the folders that the server may use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpLimits:
    """What clients may do.

    Parameters
    ----------
    roots
        Folders in which clients may name inputs and outputs; none allows uploads only.
    upload_bytes
        Maximum size of an upload.
    run_s
        Maximum seconds of a run, its waiting included.
    keep_s
        Seconds for which a run that has ended, and its uploaded and written files, are kept.
    """

    roots: tuple[Path, ...] = ()
    upload_bytes: int = 4 << 30
    run_s: float = 3600.0
    keep_s: float = 3600.0

    def check(self, path: Path) -> None:
        """Check that a path, with its symbolic links resolved, lies in one of the roots.

        Raises
        ------
        OutsideError
            If it does not.
        """
        place = path.resolve()
        if not any(place.is_relative_to(root.resolve()) for root in self.roots):
            raise OutsideError(f"{path} is outside of the folders that this server may use.")


@dataclass(slots=True, kw_only=True, eq=False)
class Submitted:
    """A submitted run.

    Parameters
    ----------
    id
        Random name.
    folder
        Private folder of an uploaded scan and its results; None for paths.
    """

    id: str
    folder: Path | None
    run: Run
    state: str = "waiting"
    stage: str = ""
    code: int | None = None
    error: str = ""
    ended: float | None = None
    total: float = 1.0
    work: float = 0.0
    events: list[Frame] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def note(self, event: Frame) -> None:
        """Note what happened, and wake up watchers; for the event loop's thread."""
        kind = event["event"]
        if kind == "begun":
            self.state = "running"
        elif kind == "stage":
            self.stage = event["name"]
        elif kind == "expect":
            self.total = event["total"] or 1.0
        elif kind == "advance":
            self.work += event["work"]
        elif kind in LAST_EVENTS:
            self._end(event)
        if len(self.events) < KEPT_EVENTS or kind in LAST_EVENTS:
            self.events.append(event)
        self.changed.set()
        self.changed = asyncio.Event()

    def _end(self, event: Frame) -> None:
        self.code = event.get("code", 1)
        self.error = event.get("error") or event.get("reason", "")
        failed = "cancelled" if self.run.cancelled.is_set() else "failed"
        self.state = "done" if self.code == 0 else failed
        self.ended = time.monotonic()

    def as_json(self) -> dict[str, Any]:
        """Return the state for clients."""
        return {
            "id": self.id,
            "state": self.state,
            "stage": self.stage,
            "fraction": 1.0 if self.state == "done" else min(self.work / self.total, 1.0),
            "exit_code": self.code,
            "error": self.error,
            "log": [event["text"] for event in self.events if _is_shown(event)],
        }

    async def watch(self) -> AsyncIterator[Frame]:
        """Yield all events, from the first to the last."""
        number = 0
        while True:
            changed = self.changed
            for event in self.events[number:]:
                yield event
                number += 1
                if event["event"] in LAST_EVENTS:
                    return
            await changed.wait()


def _is_shown(event: Frame) -> bool:
    return bool(event["event"] == "log" and event["level"] >= logging.INFO)


class HttpRuns:
    """All submitted runs. The methods are for the event loop's thread.

    Parameters
    ----------
    queue
        Does the runs.
    limits
        What clients may do.
    paths_of
        Parses a command line; returns the absolute paths in it. It raises ``OptionError`` for one
        that is not valid or not allowed.
    folder
        Private folder for uploads; its owner removes it.
    """

    def __init__(
        self,
        queue: RunQueue,
        *,
        limits: HttpLimits,
        paths_of: Callable[[Sequence[str]], dict[str, str]],
        folder: Path,
    ) -> None:
        self.limits = limits
        self.ended: dict[str, int] = {"done": 0, "failed": 0, "cancelled": 0}
        """How many runs have ended, by state."""
        self._queue, self._paths_of, self._folder = queue, paths_of, folder
        self._submitted: dict[str, Submitted] = {}
        self._tasks: set[asyncio.Task[None]] = set()

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

    def new_folder(self) -> Path:
        """Return a new folder for an upload."""
        folder = self._folder / secrets.token_hex(16)
        folder.mkdir(mode=0o700)
        return folder

    def submit(
        self, source: Path, output: Path, flags: Sequence[str], folder: Path | None
    ) -> Submitted:
        """Submit a run.

        Raises
        ------
        BusyError, OptionError, OutsideError
            If no run is accepted, the flags are not valid, or a path is outside of the roots.
        """
        self.check_open()
        words = [*flags, "-i", str(source), "-o", str(output)]
        paths = self._paths_of(words)
        if paths["input"] != str(source) or paths["output"] != str(output):
            raise OptionError("flags must not contain input or output.")
        for name, path in paths.items():
            if folder is None or name not in ("input", "output"):
                self.limits.check(Path(path))
        submitted = self._new(words, paths, folder)
        task = asyncio.ensure_future(self._follow(submitted, self._queue.start(submitted.run)))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return submitted

    def discard(self, folder: Path) -> None:
        """Remove the folder of an upload that did not become a run."""
        shutil.rmtree(folder, ignore_errors=True)

    def cancel(self, submitted: Submitted) -> None:
        """End a run, or forget it and remove its uploaded and written files if it has ended."""
        if submitted.ended is None:
            self._queue.cancel(submitted.run)
        else:
            self._forget(submitted)

    def _new(self, words: Sequence[str], paths: dict[str, str], folder: Path | None) -> Submitted:
        loop = asyncio.get_running_loop()

        def send(event: Frame) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended
                loop.call_soon_threadsafe(submitted.note, event)

        run = Run(number=self._queue.next_number(), words=tuple(words), paths=paths, send=send)
        submitted = Submitted(id=secrets.token_hex(16), folder=folder, run=run)
        self._submitted[submitted.id] = submitted
        return submitted

    async def _follow(self, submitted: Submitted, last_event: Awaitable[Frame]) -> None:
        loop = asyncio.get_running_loop()
        timer = loop.call_later(self.limits.run_s, self._queue.cancel, submitted.run)
        try:
            submitted.note(await last_event)
        finally:
            timer.cancel()
        self.ended[submitted.state] += 1
        loop.call_later(self.limits.keep_s, self._forget, submitted)

    def _forget(self, submitted: Submitted) -> None:
        self._submitted.pop(submitted.id, None)
        if submitted.folder is not None:
            shutil.rmtree(submitted.folder, ignore_errors=True)
