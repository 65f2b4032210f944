"""Read damaged inputs one by one, and collect what should not happen."""

from __future__ import annotations

import os
import random
import re
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fuzzing.case import WrongResultError
from fuzzing.watch import ForbiddenError, TooLateError, Watch, peak, reset_peak
from totalfast.errors import TotalfastError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from fuzzing.case import Case, Kind

MOST_FINDINGS = 20
"""Findings of one kind that are kept with their tracebacks; all are counted."""


@dataclass
class Tally:
    """What happened to the cases of a kind."""

    cases: int = 0
    read: int = 0
    refused: int = 0
    must_read: int = 0
    messages: set[str] = field(default_factory=set)
    slowest_s: float = 0.0
    peak_mb: float = 0.0
    seconds: float = 0.0
    findings: Counter[str] = field(default_factory=Counter)
    examples: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, other: Tally) -> None:
        """Add the cases of another process."""
        for name in ("cases", "read", "refused", "must_read", "seconds"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("slowest_s", "peak_mb"):
            setattr(self, name, max(getattr(self, name), getattr(other, name)))
        self.messages |= other.messages
        self.findings += other.findings
        self.examples = {**other.examples, **self.examples}

    def found(self, finding: str, number: int, note: str, details: str = "") -> None:
        """Count a finding, and keep the first of its kind."""
        self.findings[finding] += 1
        if len(self.examples) < MOST_FINDINGS:
            example = {"case": number, "note": note, "details": details}
            self.examples.setdefault(finding, example)

    def report(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "cases": self.cases,
            "read": self.read,
            "refused": self.refused,
            "must be read": self.must_read,
            "different messages": len(self.messages),
            "slowest_s": round(self.slowest_s, 3),
            "peak_mb": round(self.peak_mb, 1),
            "seconds": round(self.seconds, 1),
            "findings": dict(self.findings.most_common()),
            "examples": self.examples,
        }


def read_cases(
    kind: Kind,
    watch: Watch,
    *,
    seed: str,
    numbers: Iterable[int],
    begins: Callable[[int], None] = lambda number: None,
) -> Tally:
    """Read cases, each from random numbers of its own, so that each can be repeated alone.

    Parameters
    ----------
    kind
        Damages and reads.
    watch
        Observes the process.
    seed
        Seed of the run and the kind.
    numbers
        Numbers of the cases.
    begins
        Is called with each number before its case.
    """
    tally = Tally()
    for number in numbers:
        begins(number)
        chance = random.Random(f"{seed} {number}")  # noqa: S311 - repeatable damage
        began = time.perf_counter()
        case = kind.damage(chance)
        _read(kind, watch, case, number, tally)
        tally.seconds += time.perf_counter() - began
        tally.cases += 1
    return tally


def _read(kind: Kind, watch: Watch, case: Case, number: int, tally: Tally) -> None:
    watch.findings.clear()
    before = reset_peak()
    began = time.perf_counter()
    message, details = None, ""
    try:
        with warnings.catch_warnings(), watch.on():
            warnings.simplefilter("ignore")
            result = kind.read(case)
        if case.expected is not None and not kind.equal(result, case.expected):
            watch.findings.append("the result is not that of the undamaged input")
        tally.read += 1
    except TotalfastError as error:
        message = str(error)
        tally.refused += 1
        tally.messages.add(re.sub(r"[\d.]+|'.*'", "*", message))
        if case.must_read:
            watch.findings.append("refused, though the damage has no effect")
            details = message
        if _is_from_memory(error):
            watch.findings.append("refused, because memory ran out")
    except ForbiddenError:
        details = traceback.format_exc(limit=-12)
    except TooLateError:
        details = traceback.format_exc(limit=-12)
        watch.findings.append(f"longer than {watch.seconds:g} s")
    except WrongResultError as error:
        watch.findings.append(f"wrong result: {error}")
    except BaseException as error:  # noqa: BLE001 - each of them is a finding
        details = traceback.format_exc(limit=-12)
        watch.findings.append(_describe(error))
    tally.must_read += case.must_read
    tally.slowest_s = max(tally.slowest_s, time.perf_counter() - began)
    used_mb = (peak() - before) / 1e6
    tally.peak_mb = max(tally.peak_mb, used_mb)
    if used_mb > kind.slack_mb:
        watch.findings.append(f"more than {kind.slack_mb} MB of memory")
    watch.check_messages(message)
    watch.check_files()
    for finding in dict.fromkeys(watch.findings):
        tally.found(finding, number, case.note, details)


def _describe(error: BaseException) -> str:
    """Name an error and the last place in totalfast, without values."""
    frames = [
        f"{Path(frame.filename).name}:{frame.name}"
        for frame in traceback.extract_tb(error.__traceback__)
        if f"{os.sep}totalfast{os.sep}" in frame.filename
    ]
    return f"{type(error).__name__} in {frames[-1] if frames else 'the fuzzer'}"


def _is_from_memory(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, MemoryError):
            return True
        error = error.__cause__ or error.__context__
    return False
