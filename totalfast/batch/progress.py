"""How far a batch is: cases, work, throughput, and the time that is left."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from totalfast.batch.finding.cases import Case
    from totalfast.run.many import Running

WARM = 2
"""Number of cases after which the speed is measured. The first ones wait for models."""

FIRST = (0.5, 1.0, 0.0, 0.25, 0.75)
"""Places, among all cases in the order of their sizes, of the cases that run first."""

GROUPS = 8
"""Maximum number of groups of similar size, in which cases that have ended are averaged."""

WAITING = "Waiting"
"""The stage in which a case waits for the networks of others."""


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


def typical_first(cases: Sequence[Case]) -> list[Case]:
    """Put cases of different sizes first, among them the largest; the others keep their order.

    After these, the time that is left is known, and whether the memory is large enough.
    """
    if len(cases) <= len(FIRST):
        return list(cases)
    by_size = sorted(cases, key=_size)
    first = [by_size[round(place * (len(cases) - 1))] for place in FIRST]
    names = {case.name for case in first}
    return first + [case for case in cases if case.name not in names]


class Meter:
    """Measures how long cases take, by the size of their files, and predicts when the batch ends.

    Until cases of a size have ended, the seconds are taken to grow with the size of the files plus
    the mean size: a case's time does not begin at zero.

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
        sizes = {case.name: _size(case) for case in cases}
        mean = sum(sizes.values()) / max(len(sizes), 1) or 1.0
        self._work = {name: size + mean for name, size in sizes.items()}
        self._seconds = dict(self._work)
        """What each case is expected to take, alone; before the first one ends in other units."""
        self._running, self._clock = running, clock
        self._began = self._warm_at = clock()
        self._spent_cold = 0.0
        self._is_warm = False
        self._failed: dict[str, bool] = {}
        """Of cases that have ended: whether they failed."""
        self._spent: dict[str, float] = {}
        """Seconds that they took, without waiting."""
        self._lock = threading.Lock()

    def end(self, name: str, *, failed: bool, seconds: Mapping[str, float]) -> None:
        """Count a case that has ended, with the seconds of its stages."""
        with self._lock:
            self._failed[name] = failed
            self._spent[name] = sum(seconds.values()) - seconds.get(WAITING, 0.0)
            self._seconds = self._predicted()
            if not self._is_warm and len(self._done()) == WARM:
                self._is_warm = True
                self._warm_at, self._spent_cold = self._clock(), self._spent_until_now()

    def state(self) -> State:
        """Return how far the batch is."""
        with self._lock:
            now, spent = self._clock(), self._spent_until_now()
            began, cold = self._began, 0.0
            if len(self._done()) > WARM:
                began, cold = self._warm_at, self._spent_cold
            speed = (spent - cold) / (now - began) if self._failed and now > began else 0.0
            shares = self._shares()
            total = spent + sum(
                seconds * (1.0 - shares.get(name, 0.0)) for name, seconds in self._seconds.items()
            )
            work = sum(self._work[name] * share for name, share in shares.items())
            return State(
                done=len(self._failed),
                failed=sum(self._failed.values()),
                total=len(self._work),
                share=work / sum(self._work.values()) if self._work else 1.0,
                per_hour=3600 * speed * len(self._work) / total if speed > 0 else None,
                left_s=(total - spent) / speed if speed > 0 else None,
            )

    def _done(self) -> list[str]:
        return [name for name, failed in self._failed.items() if not failed]

    def _shares(self) -> dict[str, float]:
        """Share that is done of each case that has begun or ended."""
        begun = {case.name: share for case, share in self._running.fractions().items()}
        return begun | dict.fromkeys(self._failed, 1.0)

    def _spent_until_now(self) -> float:
        begun = {name: share for name, share in self._shares().items() if name not in self._spent}
        return sum(self._spent.values()) + sum(
            self._seconds[name] * share for name, share in begun.items()
        )

    def _predicted(self) -> dict[str, float]:
        """Predict the seconds of each case from those of similar size that have ended.

        The first one counts only until there is another, because it imports and loads.
        """
        done = self._done()
        known = sorted(done[1:] or done, key=self._work.__getitem__)
        if not known:
            return self._seconds
        size = -(-len(known) // GROUPS)
        groups = [known[start : start + size] for start in range(0, len(known), size)]
        works = [sum(self._work[name] for name in group) for group in groups]
        seconds = [sum(self._spent[name] for name in group) for group in groups]
        means = [work / len(group) for work, group in zip(works, groups, strict=True)]
        work = np.array(list(self._work.values()))
        predicted = work * np.interp(work, means, np.divide(seconds, works))
        return dict(zip(self._work, predicted.tolist(), strict=True))


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


def _size(case: Case) -> float:
    if isinstance(case.source, Path):
        return bytes_of(case.source)
    return float(case.size or 0)


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
