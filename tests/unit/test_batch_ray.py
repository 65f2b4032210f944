"""A batch on a Ray cluster, without Ray: which case comes next, and what a node's process does."""

from __future__ import annotations

import os
import sys
from dataclasses import fields, replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from totalfast.about import versions
from totalfast.batch.cluster.actor import SAME_VERSIONS, CaseActor, Job, Ready, Result
from totalfast.batch.cluster.connection import Node, connected
from totalfast.batch.cluster.engine import RayEngine
from totalfast.batch.cluster.pool import Ended, Share
from totalfast.batch.cluster.waiting import Try, WaitingCases
from totalfast.batch.finding.cases import Case
from totalfast.batch.results.entries import DONE, FAILED, Entry
from totalfast.batch.results.manifest import Manifest
from totalfast.errors import OptionError, OutputError
from totalfast.system import process_memory


def case(name, source="/scans/x.nii"):
    return Case(name=name, source=Path(source), series=None, found=f"f-{name}")


def names(tries):
    return [(attempt.case.name, attempt.attempt, attempt.is_alone) for attempt in tries]


def test_cases_come_in_order_and_failed_ones_after_the_others():
    waiting = WaitingCases([case("a"), case("b")], retries=1)
    first = waiting.take([])
    assert waiting.failed(first)
    taken = [waiting.take([first]), waiting.take([])]
    assert names([first, *taken]) == [("a", 1, False), ("b", 1, False), ("a", 2, False)]
    assert waiting.take([]) is None
    assert not waiting


def test_a_case_whose_process_ended_comes_last_and_alone():
    waiting = WaitingCases([case("deadly"), case("other")], retries=2)
    deadly = waiting.take([])
    assert waiting.lost(deadly)
    other = waiting.take([])
    assert other.case.name == "other"
    assert waiting.take([other]) is None, "the process works on another case"
    alone = waiting.take([])
    assert names([alone]) == [("deadly", 2, True)]
    waiting.failed(other)
    assert waiting.take([alone]) is None, "its process takes no other case"
    assert waiting.take([]).case.name == "other"


@pytest.mark.parametrize("retries", [0, 1, 3])
@pytest.mark.parametrize("again", [WaitingCases.failed, WaitingCases.lost])
def test_a_case_is_tried_as_often_as_retries_allow(retries, again):
    waiting = WaitingCases([case("a")], retries)
    tries = 0
    while (attempt := waiting.take([])) is not None:
        tries += 1
        assert attempt == Try(case=case("a"), attempt=tries, is_alone=attempt.is_alone)
        assert again(waiting, attempt) == (tries <= retries)
    assert tries == retries + 1


@pytest.mark.parametrize(
    ("cores", "gpus", "per_node", "on_gpus", "expected"),
    [
        (16, 0, None, False, (1, 16, 0.0)),
        (16, 0, 3, False, (3, 5, 0.0)),
        (2, 0, 5, False, (2, 1, 0.0)),
        (0, 0, None, False, (0, 0, 0.0)),
        (16, 2, None, True, (2, 8, 1.0)),
        (16, 2, 4, True, (4, 4, 0.5)),
        (16, 2, 3, True, (3, 5, 0.5)),
        (16, 2, 1, True, (1, 16, 1.0)),
        (16, 0, None, True, (0, 0, 0.0)),
        (16, 2, None, False, (1, 16, 0.0)),
    ],
)
def test_a_node_is_shared_among_its_processes(cores, gpus, per_node, on_gpus, expected):
    node = Node(identity="n", host="h", cores=cores, gpus=gpus)
    share = Share.of(node, per_node, on_gpus=on_gpus)
    assert (share.actors, share.cores, share.gpus) == expected


class FakePool:
    """Stands for the actors: each attempt ends as told, at once."""

    def __init__(self, endings):
        self.endings, self.in_work, self.tried = endings, 0, []
        self._given = []

    def give(self, waiting):
        while (attempt := waiting.take(self._given)) is not None:
            self._given.append(attempt)
        self.in_work = len(self._given)

    def wait(self):
        attempt = self._given.pop(0)
        self.in_work = len(self._given)
        self.tried.append((attempt.case.name, attempt.attempt))
        yield self.endings(attempt)


def ended(attempt, error=None, **facts):
    entry = Entry(
        name=attempt.case.name,
        state=FAILED if error else DONE,
        attempt=attempt.attempt,
        error=error,
    )
    return Ended(attempt=attempt, result=Result(entry=entry, **facts))


@pytest.fixture
def handed_out(tmp_path):
    """Hand out cases to a fake pool: its tries, the entries, those of the manifest, lost cases."""

    def hand_out(endings, *cases, retries=1):
        pool, lost = FakePool(endings), set()
        with Manifest(tmp_path / "batch", {}) as manifest:
            engine = RayEngine(job=None, manifest=manifest, retries=retries)
            entries = list(engine._run(WaitingCases(cases, retries), pool, lost))
        return pool.tried, entries, manifest.entries(), {case.name for case in lost}

    return hand_out


def test_only_the_case_that_ends_its_process_fails_and_its_reason_is_noted(handed_out):
    def endings(attempt):
        if attempt.case.name == "deadly" or attempt.attempt == 1:
            return Ended(attempt=attempt, result=None, reason="its process ended")
        return ended(attempt)

    tried, entries, noted, lost = handed_out(endings, case("deadly"), case("other"))
    assert tried == [("deadly", 1), ("other", 1), ("deadly", 2), ("other", 2)]
    assert {entry.name: entry.state for entry in entries} == {"deadly": FAILED, "other": DONE}
    assert noted["deadly"].error == "its process ended"
    assert noted["deadly"].fingerprint == "f-deadly"
    assert lost == {"deadly", "other"}


def test_a_failed_case_is_tried_again_unless_that_is_hopeless(handed_out):
    def endings(attempt):
        is_fine = attempt.case.name == "flaky" and attempt.attempt == 2
        error = None if is_fine else "some reason"
        return ended(attempt, error, is_hopeless=attempt.case.name == "damaged")

    tried, entries, noted, lost = handed_out(endings, case("damaged"), case("flaky"), case("bad"))
    assert tried == [("damaged", 1), ("flaky", 1), ("bad", 1), ("flaky", 2), ("bad", 2)]
    assert len(entries) == 5
    states = {name: entry.state for name, entry in noted.items()}
    assert states == {"damaged": FAILED, "flaky": DONE, "bad": FAILED}
    assert not lost


def test_the_last_attempt_counts_although_the_clocks_of_nodes_differ(handed_out):
    def endings(attempt):
        how = ended(attempt, "some reason" if attempt.attempt == 1 else None)
        finished = f"{2100 - attempt.attempt}-01-01T00:00:00+00:00"
        entry = replace(how.result.entry, finished=finished)
        return replace(how, result=replace(how.result, entry=entry))

    _, _, noted, _ = handed_out(endings, case("a"))
    assert (noted["a"].state, noted["a"].attempt) == (DONE, 2)


def test_a_full_disk_ends_the_batch_after_the_cases_in_work(tmp_path):
    def endings(attempt):
        is_full = attempt.case.name == "c0"
        return ended(attempt, "No space left" if is_full else None, is_disk_full=is_full)

    job = Job(**{f.name: None for f in fields(Job) if f.name != "folder"}, folder=tmp_path)
    with Manifest(tmp_path / "batch", {}) as manifest:
        engine = RayEngine(job=job, manifest=manifest, retries=1)
        pool = FakePool(endings)
        waiting = WaitingCases([case(f"c{n}") for n in range(3)], 1)
        with pytest.raises(OutputError, match="is full, so no further cases were begun"):
            list(engine._run(waiting, pool, set()))
    assert [name for name, _ in pool.tried] == ["c0", "c1", "c2"]
    assert sorted(manifest.entries()) == ["c0", "c1", "c2"]


def test_without_ray_the_command_to_install_it_is_given(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    before = dict(os.environ)
    with pytest.raises(OptionError, match=r"pip install 'totalfast\[ray\]'"):
        connected(None).__enter__()
    assert dict(os.environ) == before


@pytest.fixture
def scan(tmp_path):
    values = np.random.default_rng(0).normal(0, 300, (24, 22, 20)).astype(np.int16)
    nib.save(nib.Nifti1Image(values, np.diag([2.0, 2.0, 3.0, 1.0])), tmp_path / "scan.nii.gz")
    return tmp_path / "scan.nii.gz"


@pytest.fixture
def job(tmp_path, standin_home, monkeypatch):
    """Make jobs; the process stays in its folder, and its environment as it was."""
    monkeypatch.setattr(process_memory, "prepare_process", lambda: None)
    monkeypatch.chdir(Path.cwd())
    monkeypatch.setenv("TOTALSEG_HOME_DIR", "/nowhere")
    monkeypatch.delenv("TOTALSEG_WEIGHTS_PATH", raising=False)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/sign").touch()

    def job(**changes):
        keywords = {"fastest": True, "device": "cpu", "ml": True, "quiet": True}
        values = {
            "folder": tmp_path / "out",
            "keywords": keywords | {"completion_marker": True},
            "tasks": ["total"],
            "options": "hash",
            "at_a_time": None,
            "working_folder": tmp_path,
            "environment": {"TOTALSEG_HOME_DIR": str(standin_home)},
            "versions": versions(*SAME_VERSIONS),
            "sign": "sign",
        }
        return Job(**(values | changes))

    return job


def test_a_node_that_can_do_the_job_is_ready_in_the_folder_of_the_command(job, tmp_path):
    assert CaseActor(job()).prepare() == Ready(at_a_time=3)
    assert Path.cwd() == tmp_path
    assert os.environ["TOTALSEG_HOME_DIR"] != "/nowhere"
    assert CaseActor(job(at_a_time=5)).prepare() == Ready(at_a_time=5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"versions": {"totalfast": "0.0.1"}}, "but the command runs with totalfast 0.0.1"),
        ({"working_folder": Path("/nowhere/at/all")}, "current folder, /nowhere/at/all"),
        ({"sign": "other"}, "does not see the files that the command writes to"),
        ({"environment": {}}, "All nodes need the same folder of models"),
        ({"tasks": ["no_such_task"]}, "no_such_task"),
    ],
)
def test_a_node_that_cannot_do_the_job_tells_why(job, changes, message):
    ready = CaseActor(job(**changes)).prepare()
    assert ready.at_a_time == 0
    assert message in ready.problem


def test_a_process_segments_cases_and_tells_which_errors_are_hopeless(job, tmp_path, scan):
    actor = CaseActor(job())
    assert actor.segment(case("early", scan), 1) is None, "prepare comes first"
    actor.prepare()
    done = actor.segment(case("good", scan), 2)
    assert (done.entry.state, done.entry.attempt, done.is_hopeless) == (DONE, 2, False)
    assert done.entry.files
    assert (tmp_path / "out/good/segmentation.nii.gz").exists()
    damaged = tmp_path / "damaged.nii.gz"
    damaged.write_bytes(b"no scan")
    failed = actor.segment(case("bad", damaged), 1)
    assert (failed.entry.state, failed.is_hopeless) == (FAILED, True)
    assert actor._running.clocks == {}


def test_a_process_that_was_told_to_end_segments_nothing(job, tmp_path, scan):
    actor = CaseActor(job())
    actor.prepare()
    actor.end()
    assert actor.segment(case("late", scan), 1) is None
    assert actor.fractions() == {}
    assert not (tmp_path / "out/late").exists()
