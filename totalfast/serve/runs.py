"""One run in the server: its progress and log records become events for its client."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from totalfast.system.progress import CancellableProgress

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import TypeAlias

    from totalfast.serve.frames import Frame
    from totalfast.system.progress import Progress

    Send: TypeAlias = Callable[[Frame], None]
    """Sends an event to a client, from any thread; does not wait and raises no error."""

    Job: TypeAlias = Callable[[tuple[str, ...], Mapping[str, str], Progress], "Ending"]
    """Does what a command line asks for; its errors are endings."""

SERVERS_OWN = "totalfast.serve"
"""Name of the logger whose records are not a run's."""

PAUSE_S = 0.05
"""Minimum pause between two events of progress."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How a run ended.

    Parameters
    ----------
    code
        Exit code for the client.
    error
        Lines for its stderr; empty if the run did not fail.
    """

    code: int
    error: str = ""


@dataclass(slots=True, kw_only=True, eq=False)
class Run:
    """A run that a client handed over.

    Parameters
    ----------
    number
        Counts the server's runs.
    words, paths
        The client's command line, and the absolute paths in it.
    send
        Sends events to the client.
    check
        Called with the paths when the run begins; returns those to use, or raises an error.
    """

    number: int
    words: tuple[str, ...]
    paths: dict[str, str]
    send: Send
    check: Callable[[dict[str, str]], Mapping[str, str]] = dict
    cancelled: threading.Event = field(default_factory=threading.Event)
    """Set to end the run at its next sign of progress."""
    since: float = field(default_factory=time.perf_counter)

    def __str__(self) -> str:
        return f"run {self.number}"

    def elapsed_s(self) -> float:
        """Seconds since it was handed over."""
        return time.perf_counter() - self.since


class EventProgress(CancellableProgress):
    """Sends a run's progress to its client."""

    def __init__(self, run: Run) -> None:
        super().__init__(run.cancelled)
        self._run = run
        self._work = 0.0
        self._sent = 0.0

    def __enter__(self) -> EventProgress:
        self._run.send({"event": "bar", "shown": True})
        return self

    def __exit__(self, *_: object) -> None:
        self._send_work()
        self._run.send({"event": "bar", "shown": False})

    def stage(self, name: str) -> None:
        """Send the name of the current stage."""
        self._check()
        self._send_work()
        self._run.send({"event": "stage", "name": name})

    def expect(self, total: float) -> None:
        """Send the total amount of work."""
        self._check()
        self._run.send({"event": "expect", "total": total})

    def advance(self, work: float) -> None:
        """Send finished work, several pieces together if they are small."""
        self._check()
        self._work += work
        if time.perf_counter() - self._sent > PAUSE_S:
            self._send_work()

    def _send_work(self) -> None:
        if self._work:
            self._run.send({"event": "advance", "work": self._work})
        self._work, self._sent = 0.0, time.perf_counter()


class RunLog(logging.Handler):
    """Sends log records to the clients of their runs.

    A run's helper threads, such as those that load models, may work for several runs, so that their
    records go to all runs in work.
    """

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self._runs: dict[int, Run] = {}

    def add(self, run: Run) -> None:
        """Note that this thread works for a run."""
        self._runs[threading.get_ident()] = run

    def remove(self) -> None:
        """Note that this thread's run has ended."""
        del self._runs[threading.get_ident()]

    def emit(self, record: logging.LogRecord) -> None:
        """Send one record."""
        if record.name.startswith(SERVERS_OWN):
            return
        own = self._runs.get(record.thread or 0)
        event = {"event": "log", "level": record.levelno, "text": self.format(record)}
        for run in list(self._runs.values()) if own is None else [own]:
            run.send(event)
