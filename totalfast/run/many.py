"""Many runs in a few threads: while one run's networks run, others read, restore and write."""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, TypeVar

from totalfast.system.progress import CancellableProgress

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator
    from concurrent.futures import Future

Key = TypeVar("Key")
Value = TypeVar("Value")

THREAD_NAME = "totalfast-case"
"""Prefix of the names of the threads that runs are in."""


class StageClock(CancellableProgress):
    """Takes the place of a run's bar, and measures its stages."""

    def __init__(self, cancelled: threading.Event) -> None:
        super().__init__(cancelled)
        self._stage = "Preparing"
        self._since = time.perf_counter()
        self._total, self._done, self._ended = 1.0, 0.0, -1
        self.tasks = 1
        """Number of tasks, each of which expects work of its own."""
        self.seconds: dict[str, float] = {}

    @property
    def fraction(self) -> float:
        """Share of the run's expected work that is done."""
        return (max(self._ended, 0) + min(self._done / self._total, 1.0)) / self.tasks

    def stage(self, name: str) -> None:
        """Begin another stage. The models of a task count as one."""
        self._check()
        self._measure(name.partition(" ")[0])

    def _measure(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + now - self._since
        self._stage, self._since = name, now

    def end(self) -> None:
        """End the last stage."""
        self._measure("")

    def expect(self, total: float) -> None:
        """Set the total amount of work of a task."""
        self._total, self._done, self._ended = total, 0.0, self._ended + 1

    def correct(self, total: float) -> None:
        """Set another total amount of work of the same task."""
        self._total = total

    def advance(self, work: float) -> None:
        """Add finished work."""
        self._check()
        self._done += work

    def __exit__(self, *_: object) -> None:
        """There is no bar to close."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome(Generic[Key, Value]):
    """How a run ended.

    Parameters
    ----------
    key
        What was run.
    value
        Its result; None after an error.
    error
        Why it failed; None if it did not.
    seconds
        Stage to seconds, for example "Reading", "Predicting", and "Waiting" for its turn.
    total_s
        Seconds from its start to its end.
    warnings
        Its warnings.
    """

    key: Key
    value: Value | None
    error: Exception | None
    seconds: dict[str, float]
    total_s: float
    warnings: tuple[str, ...]


@dataclass(slots=True)
class Running(Generic[Key]):
    """The runs that have begun, for a bar over all runs."""

    clocks: dict[Key, StageClock] = field(default_factory=dict)

    def fractions(self) -> dict[Key, float]:
        """Share of the work of each run that is done."""
        return {key: clock.fraction for key, clock in list(self.clocks.items())}


def run_many(
    keys: Iterable[Key],
    job: Callable[[Key, StageClock], Value],
    *,
    threads: int,
    running: Running[Key] | None = None,
    ended: Callable[[Outcome[Key, Value]], None] | None = None,
) -> Generator[Outcome[Key, Value], None, None]:
    """Run a job for each key in threads; yield outcomes as the runs end.

    An error of a job is an outcome and does not stop the others. If the generator is closed, or an
    error is raised while it waits (such as KeyboardInterrupt), the runs end at their next sign of
    progress; what they have begun to write is removed.

    Parameters
    ----------
    keys
        Taken one by one, when a thread is free.
    job
        Called with a key and the progress of its run.
    threads
        Number of runs at a time.
    running
        Filled with the runs that have begun.
    ended
        As in ``run_one``; also called for runs that end after the generator was closed.
    """
    cancelled = threading.Event()
    running = Running() if running is None else running

    def run(key: Key) -> Outcome[Key, Value]:
        clock = running.clocks[key] = StageClock(cancelled)
        try:
            return run_one(key, job, clock, ended=ended)
        finally:
            running.clocks.pop(key, None)  # a key may be given twice

    with ThreadPoolExecutor(threads, thread_name_prefix=THREAD_NAME) as pool:
        waiting: set[Future[Outcome[Key, Value]]] = set()
        try:
            for key in keys:
                waiting.add(pool.submit(run, key))
                if len(waiting) >= threads:
                    done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    for future in done:
                        yield future.result()
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        finally:
            cancelled.set()


def run_one(
    key: Key,
    job: Callable[[Key, StageClock], Value],
    clock: StageClock,
    *,
    ended: Callable[[Outcome[Key, Value]], None] | None = None,
) -> Outcome[Key, Value]:
    """Run a job for a key in this thread; an error of the job is an outcome.

    Parameters
    ----------
    key, job
        As in ``run_many``.
    clock
        Progress of the run.
    ended
        Called with the outcome in this thread, as long as an error has its traceback.
    """
    value, error, began = None, None, time.perf_counter()
    with _warnings_of_this_thread() as warnings:
        try:
            value = job(key, clock)
        except Exception as caught:  # noqa: BLE001 - an outcome
            error = caught
        clock.end()
    outcome = Outcome(
        key=key,
        value=value,
        error=error,
        seconds=clock.seconds,
        total_s=time.perf_counter() - began,
        warnings=tuple(warnings),
    )
    if ended is not None:
        ended(outcome)
    if error is not None:
        error.with_traceback(None)  # its frames hold the scan
    return outcome


class _Collector(logging.Handler):
    """Keeps the warnings of one thread."""

    def __init__(self, warnings: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._thread, self._warnings = threading.get_ident(), warnings

    def emit(self, record: logging.LogRecord) -> None:
        if record.thread == self._thread:
            self._warnings.append(record.getMessage().removeprefix("WARNING: "))


@contextmanager
def _warnings_of_this_thread() -> Iterator[list[str]]:
    warnings: list[str] = []
    handler = _Collector(warnings)
    logger = logging.getLogger("totalfast")
    logger.addHandler(handler)
    try:
        yield warnings
    finally:
        logger.removeHandler(handler)
