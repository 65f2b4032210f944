"""Several processes of a batch: cases from one queue, workers that are killed."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from totalfast.batch import workers as workers_module
from totalfast.batch.finding.cases import Case
from totalfast.batch.results.entries import DONE, FAILED
from totalfast.batch.results.manifest import Manifest
from totalfast.batch.shared_queue import VARIABLE, SharedQueue
from totalfast.batch.workers import Workers


def cases_of(count):
    return tuple(
        Case(name=f"c{n}", source=Path(f"/scans/ü {n}.nii"), series=None, found=f"f{n}")
        for n in range(count)
    )


def test_each_case_is_taken_once(tmp_path):
    queue = SharedQueue(tmp_path)
    queue.fill(cases_of(200))
    assert queue.cases() == cases_of(200)
    with ThreadPoolExecutor(4) as pool:
        taken = list(pool.map(lambda _: list(SharedQueue(tmp_path).take()), range(4)))
    names = [case.name for part in taken for case in part]
    assert sorted(names) == sorted(case.name for case in cases_of(200))


def test_a_queue_keeps_all_that_a_case_has(tmp_path):
    case = Case(name="a", source=Path("x"), series="1.2", found="f", files=("1.dcm", "2.dcm"))
    SharedQueue(tmp_path).fill([case])
    assert SharedQueue(tmp_path).cases() == (case,)


def test_a_process_knows_the_queue_of_its_parent(tmp_path, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert SharedQueue.of_parent() is None
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    assert SharedQueue.of_parent().folder == tmp_path


WORKER = """
import json, os, sys, time
from pathlib import Path
from totalfast.batch.shared_queue import SharedQueue
print("no JSON", flush=True)
for case in SharedQueue.of_parent().take():
    if case.name in sys.argv[1].split(",") and not Path(sys.argv[2], case.name).exists():
        Path(sys.argv[2], case.name).touch()
        os.kill(os.getpid(), 9)
    if case.name == "always":
        os.kill(os.getpid(), 9)
    event = {"event": "case", "name": case.name, "state": "done", "fingerprint": case.fingerprint()}
    print(json.dumps(event | {"host": os.environ["OMP_NUM_THREADS"]}), flush=True)
    time.sleep(0.02)
"""


@pytest.fixture
def start(monkeypatch, tmp_path):
    """Start workers that do nothing, and are killed once at some cases."""
    (tmp_path / "killed").mkdir()

    def start(cases, *, killed="", retries=1, out="out"):
        real = workers_module.subprocess.Popen
        started = []

        def worker(words, **keywords):
            started.append(words)
            command = [sys.executable, "-c", WORKER, killed, str(tmp_path / "killed")]
            return real(command, **keywords)

        monkeypatch.setattr(workers_module.subprocess, "Popen", worker)
        manifest = Manifest(tmp_path / out, {})
        try:
            workers = Workers(
                words=["-i", "x"], devices=["gpu:0", "gpu:2"], manifest=manifest, retries=retries
            )
            return list(workers.run(cases)), started, manifest.entries()
        finally:
            manifest.close()
            monkeypatch.setattr(workers_module.subprocess, "Popen", real)

    return start


def test_workers_share_the_cases_and_the_cores(start, monkeypatch):
    monkeypatch.setattr(workers_module, "usable_cores", lambda: 7)
    entries, started, _ = start(cases_of(20))
    assert sorted(entry.name for entry in entries) == sorted(case.name for case in cases_of(20))
    assert {entry.host for entry in entries} == {"3"}
    assert len(started) == 2
    for number, words in enumerate(started):
        text = " ".join(words)
        assert f"batch -i x --device gpu:{2 * number} --json" in text
        assert f"--num-parts 2 --part-id {number}" in text


def test_cases_of_a_killed_worker_are_tried_again(start, caplog):
    entries, started, _ = start(cases_of(12), killed="c3,c4")
    assert sorted(entry.name for entry in entries) == sorted(case.name for case in cases_of(12))
    assert {entry.state for entry in entries} == {DONE}
    assert len(started) == 4
    assert any("workers ended before" in line for line in caplog.messages)


def test_a_case_that_kills_its_worker_fails(start):
    deadly = Case(name="always", source=Path("/scans/x.nii"), series=None, found="f")
    entries, _, noted = start((deadly, *cases_of(3)), retries=2)
    (failed,) = [entry for entry in entries if entry.state == FAILED]
    assert failed.name == "always"
    assert "killed" in failed.error
    assert noted["always"].fingerprint == "f"
    assert sorted(e.name for e in entries if e.state == DONE) == ["c0", "c1", "c2"]


def test_a_worker_that_is_left_is_ended(start, monkeypatch, tmp_path):
    monkeypatch.setitem(globals(), "WORKER", "import time; print(flush=True); time.sleep(600)")
    queue = []

    class Interrupted(workers_module.queue.SimpleQueue):
        def get(self, *arguments):
            queue.append(self)
            raise KeyboardInterrupt

    manifest = Manifest(tmp_path / "out", {})
    workers = Workers(words=[], devices=["cpu"], manifest=manifest, retries=0, _lines=Interrupted())
    started = []
    real = workers_module.subprocess.Popen
    monkeypatch.setattr(
        workers_module.subprocess,
        "Popen",
        lambda words, **k: started.append(real([sys.executable, "-c", WORKER], **k)) or started[-1],
    )
    with pytest.raises(KeyboardInterrupt):
        list(workers.run(cases_of(1)))
    manifest.close()
    assert started[0].returncode is not None
    assert queue
