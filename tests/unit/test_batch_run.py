"""What a batch notes as its cases end, and what ends the batch."""

from __future__ import annotations

import errno
import threading
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from totalfast.batch.finding.cases import Case, part_of
from totalfast.batch.results.entries import DONE, FAILED, Entry
from totalfast.batch.run import Batch
from totalfast.errors import OutputError
from totalfast.run.many import Running


@dataclass
class Notes:
    """Stands for a manifest."""

    folder: Path = Path("out")
    entries: list[Entry] = field(default_factory=list)

    def add(self, entry):
        self.entries.append(entry)


@dataclass
class Attempts:
    """Stands for what segments cases."""

    job: object

    def segment(self, case, clock):
        self.job(case)

    def entry(self, outcome, attempt):
        state = DONE if outcome.error is None else FAILED
        return Entry(name=outcome.key.name, state=state, attempt=attempt)


def batch(job, **keywords):
    return Batch(
        attempts=Attempts(job), manifest=Notes(), **{"retries": 1, "at_a_time": 1} | keywords
    )


def cases(count):
    return [
        Case(name=f"c{number}", source=Path(f"{number}"), series=None) for number in range(count)
    ]


def test_a_full_disk_ends_the_batch_before_more_cases_begin():
    def fail(case):
        if case.name == "c1":
            full = OSError(errno.ENOSPC, "No space left on device")
            raise OutputError("can't write") from full

    full = batch(fail)
    with pytest.raises(OutputError, match="the disk of out is full"):
        list(full.run(cases(9), Running()))
    assert [entry.name for entry in full.manifest.entries] == ["c0", "c1"]


def test_other_errors_are_tried_again_after_all_cases():
    errors = []

    def fail(case):
        if case.name == "c0":
            raise OutputError("can't write")

    failing = batch(fail)
    found = list(failing.run(cases(2), Running(), errors.append))
    assert [(entry.name, entry.attempt) for entry in found] == [("c0", 1), ("c1", 1), ("c0", 2)]
    assert found == failing.manifest.entries
    assert [str(error) for error in errors] == ["can't write"] * 2


def test_a_case_that_ends_after_an_interruption_is_noted():
    interrupted, saving = threading.Event(), threading.Event()

    def save(case):
        if case.name == "c1":
            saving.set()
            assert interrupted.wait(10)

    ended = batch(save, at_a_time=2)
    running = ended.run(cases(3), Running())
    assert next(running).name == "c0"
    assert saving.wait(10)
    threading.Timer(0.2, interrupted.set).start()
    running.close()
    assert {entry.name for entry in ended.manifest.entries} >= {"c0", "c1"}


def test_the_parts_of_a_batch_do_not_depend_on_names():
    some = [Case(name=name, source=Path(path), series=None) for name, path in ("bz", "ay", "cx")]
    renamed = [Case(name=each.name + "2", source=each.source, series=None) for each in some]
    parts = [[str(case.source) for case in part_of(each, 0, 2)] for each in (some, renamed)]
    assert parts == [["x", "z"], ["x", "z"]]
    assert {*part_of(some, 0, 2), *part_of(some, 1, 2)} == {*some}
