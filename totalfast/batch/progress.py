"""How far a batch is: cases, work, throughput, and the time that is left."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from totalfast.batch.cases import Case
    from totalfast.run.many import Running

WARM = 2
"""Number of cases after which the speed is measured. The first ones wait for models."""


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """How far a batch is.

    Parameters
    ----------
    done, failed, total
        Numbers of cases; ``done`` with the failed ones.
    share
        Share of the work that is done, also of cases that are in work.
    per_hour
        Cases an hour; None before the first one ends.
    left_s
        Seconds that are left; None before the first one ends.
    """

    done: int
    failed: int
    total: int
    share: float
    per_hour: float | None
    left_s: float | None

    def __str__(self) -> str:
        """One line for a bar or a log."""
        text = f"{self.done}/{self.total} cases"
        if self.failed:
            text += f", {self.failed} failed"
        if self.per_hour is not None and self.left_s is not None:
            text += f", {self.per_hour:.0f} an hour, {duration(self.left_s)} left"
        return text


class Meter:
    """Counts a batch's cases by the size of their files, and predicts when it ends.

    A case's work is the size of its files plus the mean size: its time does not begin at zero, and
    grows with the scan.

    Parameters
    ----------
    cases
        To be segmented.
    running
        Those that have begun.
    clock
        Time in seconds.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        running: Running[Case],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        sizes = {case.name: bytes_of(case.source) for case in cases}
        mean = sum(sizes.values()) / max(len(sizes), 1) or 1.0
        self._work = {name: size + mean for name, size in sizes.items()}
        self._total = sum(self._work.values())
        self._running, self._clock = running, clock
        self._began = self._warm_at = clock()
        self._warm_work = 0.0
        self._is_warm = False
        self._ended: dict[str, bool] = {}

    def end(self, name: str, *, failed: bool) -> None:
        """Count a case that has ended."""
        self._ended[name] = failed
        if not self._is_warm and len(self._ended) - sum(self._ended.values()) == WARM:
            self._is_warm = True
            self._warm_at, self._warm_work = self._clock(), self._work_done()

    def state(self) -> State:
        """Return how far the batch is."""
        now, work = self._clock(), self._work_done()
        speed = None
        if self._is_warm and now > self._warm_at + 1.0:
            speed = (work - self._warm_work) / max(now - self._warm_at, 1e-6)
        elif self._ended:
            speed = work / max(now - self._began, 1e-6)
        return State(
            done=len(self._ended),
            failed=sum(self._ended.values()),
            total=len(self._work),
            share=work / self._total if self._total else 1.0,
            per_hour=None if not speed else 3600 * speed * len(self._work) / self._total,
            left_s=None if not speed else (self._total - work) / speed,
        )

    def _work_done(self) -> float:
        in_work: Mapping[Case, float] = self._running.fractions()
        begun = {case.name: share for case, share in in_work.items()}
        return sum(self._work[name] for name in self._ended) + sum(
            self._work[name] * share for name, share in begun.items() if name not in self._ended
        )


class Ticker:
    """Calls a function again and again in a thread, until its context ends."""

    def __init__(self, call: Callable[[], object], *, every_s: float) -> None:
        self._call, self._every_s = call, every_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="totalfast-progress", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(self._every_s):
            self._call()


def bytes_of(source: Path) -> float:
    """Size of a file, or of the files in a folder; 0 if it can't be read."""
    try:
        if not source.is_dir():
            return float(source.stat().st_size)
        with os.scandir(source) as files:
            return float(sum(file.stat().st_size for file in files if file.is_file()))
    except OSError:
        return 0.0


def duration(seconds: float) -> str:
    """Return a duration with two units, such as "3 h 20 min"."""
    minutes, hours = round(seconds / 60), int(seconds // 3600)
    if seconds < 60:
        return f"{seconds:.0f} s"
    if hours < 1:
        return f"{minutes} min"
    if hours < 48:
        return f"{hours} h {minutes - 60 * hours:02d} min"
    return f"{hours // 24} d {hours % 24} h"
