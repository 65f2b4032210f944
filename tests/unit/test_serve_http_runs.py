"""Runs that come by HTTP, without HTTP: limits of time, what is kept, late watchers."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

import pytest

from totalfast.serve import submitted as submitted_runs
from totalfast.serve.http_limits import HttpLimits, OutsideError
from totalfast.serve.http_runs import BusyError, Command, HttpRuns
from totalfast.serve.run_queue import RunQueue
from totalfast.serve.runs import Ending
from totalfast.serve.storage import FullError, Storage


def read_command(words):
    paths = {"input": words[words.index("-i") + 1], "output": words[words.index("-o") + 1]}
    return Command(paths=paths, output_name="segmentation.nii.gz")


def endless(words, paths, progress):
    with progress:
        while True:
            progress.advance(1.0)
            time.sleep(0.005)


def quick(words, paths, progress):
    with progress:
        progress.expect(2.0)
        progress.advance(1.0)
    return Ending(code=0)


def in_loop(job, work, folder, *, waiting=1, studies=None, **limits):
    """Await ``work(runs)`` in a loop with runs of a job."""

    async def main():
        queue = RunQueue(job, at_a_time=1, waiting=waiting)
        limits_of_runs = HttpLimits(roots=(folder,), **limits)
        storage = Storage(folder, limit_bytes=1 << 20, free_bytes=0)
        runs = HttpRuns(
            queue,
            limits=limits_of_runs,
            read_command=read_command,
            storage=storage,
            studies=studies,
        )
        try:
            return await work(runs)
        finally:
            await queue.stop()

    return asyncio.run(main())


async def events_of(submitted):
    return [event["event"] async for event in submitted.watch()]


def test_a_run_is_cancelled_after_its_time(tmp_path):
    async def work(runs):
        submitted = runs.submit_paths(tmp_path / "a", tmp_path / "b", [])
        await asyncio.wait_for(events_of(submitted), 10)
        return submitted.as_json()

    began = time.monotonic()
    assert in_loop(endless, work, tmp_path, run_s=0.2)["state"] == "cancelled"
    assert 0.2 <= time.monotonic() - began < 5


def test_uploads_and_results_are_removed_after_their_time(tmp_path):
    async def work(runs):
        folder = runs.storage.new_folder()
        submitted = runs.submit_upload(folder / "scan", [], folder)
        await events_of(submitted)
        was = runs.get(submitted.id), folder.exists()
        await asyncio.sleep(0.3)
        return submitted, was, (runs.get(submitted.id), folder.exists())

    submitted, before, after = in_loop(quick, work, tmp_path, keep_s=0.1)
    assert before == (submitted, True)
    assert after == (None, False)


def test_late_watchers_see_everything_and_long_logs_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(submitted_runs, "KEPT_EVENTS", 3)

    async def work(runs):
        submitted = runs.submit_paths(tmp_path / "a", tmp_path / "b", [])
        first = await events_of(submitted)
        return first, await events_of(submitted)

    first, late = in_loop(quick, work, tmp_path)
    assert first == late == ["begun", "bar", "expect", "ended"]


def test_a_full_queue_and_paths_outside_are_refused(tmp_path):
    async def work(runs):
        for number in range(2):
            runs.submit_paths(tmp_path / "a", tmp_path / f"{number}", [])
        with pytest.raises(BusyError, match="1 runs are waiting"):
            runs.submit_paths(tmp_path / "a", tmp_path / "b", [])

    in_loop(endless, work, tmp_path)

    async def outside(runs):
        for path in (tmp_path.parent, tmp_path / ".." / "x"):
            with pytest.raises(OutsideError, match="outside"):
                runs.submit_paths(tmp_path / "a", path, [])
            with pytest.raises(OutsideError, match="outside"):
                runs.submit_paths(path, tmp_path / "a", [])

    in_loop(quick, outside, tmp_path)


def test_paths_that_lead_elsewhere_when_the_run_begins_are_refused(tmp_path):
    (tmp_path / "root" / "scan").mkdir(parents=True)
    (tmp_path / "root" / "link").symlink_to("scan")

    async def work(runs):
        first = runs.submit_paths(tmp_path / "root" / "scan", tmp_path / "root" / "a", [])
        second = runs.submit_paths(tmp_path / "root" / "link", tmp_path / "root" / "b", [])
        (tmp_path / "root" / "link").unlink()
        (tmp_path / "root" / "link").symlink_to(tmp_path)
        return [(await events_of(each), each.as_json()) for each in (first, second)]

    (_, first), (_, second) = in_loop(quick, work, tmp_path / "root")
    assert first["state"] == "done"
    assert (second["state"], second["exit_code"]) == ("failed", 2)
    assert "outside" in second["error"]


class FakeStudies:
    """Fetches a file of 10 bytes, and stores nothing."""

    def __init__(self, *, fetch_s=0.0, fetch_error=None, push_error=None):
        self.fetch_s, self.fetch_error, self.push_error = fetch_s, fetch_error, push_error

    async def fetch(self, order, folder, note):
        note({"event": "fetching", "instances": 0, "of": None})
        await asyncio.sleep(self.fetch_s)
        if self.fetch_error is not None:
            raise self.fetch_error
        (folder / "scan").write_bytes(b"0" * 10)
        note({"event": "fetching", "instances": 1, "of": 1})
        return "1.2"

    async def push(self, order, folder):
        if self.push_error is not None:
            raise self.push_error
        return {"server": order.push}


@dataclass
class Order:
    push: str | None = "pacs"


def ordered(tmp_path, studies, *, job=quick, push="pacs", flags=(), act=None, **limits):
    """Submit an order; return its events and its last state."""

    async def work(runs):
        submitted = runs.submit_order(Order(push=push), [*flags])
        assert len(runs) == 1
        if act is not None:
            await asyncio.sleep(0.05)
            act(runs, submitted)
        events = [event["event"] async for event in submitted.watch()]
        assert len(runs) == 0
        return events, submitted, runs

    return in_loop(job, work, tmp_path, studies=studies, **limits)


def test_a_study_is_fetched_run_and_pushed(tmp_path):
    events, submitted, _ = ordered(tmp_path, FakeStudies())
    assert events == [
        *("fetching", "fetching", "waiting", "begun", "bar", "expect", "advance", "bar"),
        *("pushing", "ended"),
    ]
    state = submitted.as_json()
    assert (state["state"], state["series"], state["has_result"]) == ("done", "1.2", True)
    assert state["stored"] == {"server": "pacs"}
    assert submitted.run.words[:2] == ("-ot", "dicom_seg")


def test_a_study_without_a_push_keeps_its_flags(tmp_path):
    events, submitted, _ = ordered(tmp_path, FakeStudies(), push=None)
    assert "pushing" not in events
    assert submitted.run.words[0] == "-i"
    assert submitted.as_json()["stored"] is None


def test_a_failed_fetch_begins_no_run(tmp_path):
    events, submitted, _ = ordered(tmp_path, FakeStudies(fetch_error=FullError("no room.")))
    assert events == ["fetching", "ended"]
    state = submitted.as_json()
    assert (state["state"], state["has_result"]) == ("failed", False)
    assert state["error"] == "ERROR: no room."


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (FullError("it is full."), "it is full."),
        (OSError(28, "No space left on device"), "No space left on device."),
        (KeyError("patient"), "the server failed: unexpected KeyError."),
    ],
)
def test_a_failed_push_leaves_the_result(tmp_path, error, text):
    _, submitted, _ = ordered(tmp_path, FakeStudies(push_error=error))
    state = submitted.as_json()
    assert (state["state"], state["exit_code"], state["has_result"]) == ("failed", 1, True)
    assert state["error"] == f"ERROR: the result can be fetched, but it is not pushed: {text}"


def test_a_fetch_is_cancelled(tmp_path):
    began = time.monotonic()
    events, submitted, runs = ordered(
        tmp_path, FakeStudies(fetch_s=30), act=lambda runs, submitted: runs.cancel(submitted)
    )
    assert time.monotonic() - began < 5
    assert events == ["fetching", "ended"]
    assert submitted.as_json()["state"] == "cancelled"
    assert runs.ended == {"done": 0, "failed": 0, "cancelled": 1}


def test_a_fetch_ends_with_the_time_of_the_run(tmp_path):
    _, submitted, _ = ordered(tmp_path, FakeStudies(fetch_s=30), run_s=0.1)
    state = submitted.as_json()
    assert state["state"] == "cancelled"
    assert "--max-time" in state["error"]


def test_the_end_of_the_server_ends_fetches(tmp_path):
    async def work(runs):
        submitted = runs.submit_order(Order(), [])
        await asyncio.sleep(0.05)
        await asyncio.wait_for(runs.close(), 5)
        return submitted.as_json()["state"]

    studies = FakeStudies(fetch_s=30)
    assert in_loop(quick, work, tmp_path, studies=studies) == "cancelled"


def test_fetches_count_as_runs_that_wait(tmp_path):
    async def work(runs):
        for _ in range(2):
            runs.submit_order(Order(), [])
        with pytest.raises(BusyError):
            runs.submit_order(Order(), [])
        with pytest.raises(BusyError):
            runs.check_open()
        await runs.close()
        return len(runs)

    assert in_loop(quick, work, tmp_path, studies=FakeStudies(fetch_s=30)) == 0


def test_few_series_are_fetched_before_their_runs_begin(tmp_path):
    async def work(runs):
        runs.submit_paths(tmp_path / "a", tmp_path / "b", [])  # it runs until it is cancelled
        waiting = [runs.submit_order(Order(), []) for _ in range(4)]
        await asyncio.sleep(0.2)
        fetched = [each.series is not None for each in waiting]
        for each in waiting:
            runs.cancel(each)
            await events_of(each)
        return fetched, [each.state for each in waiting]

    fetched, states = in_loop(endless, work, tmp_path, waiting=10, studies=FakeStudies())
    assert fetched == [True, True, False, False]
    assert states == ["cancelled"] * 4


def test_runs_without_limits_of_time(tmp_path):
    _, submitted, runs = ordered(tmp_path, FakeStudies(), run_s=None, keep_s=None)
    assert runs.get(submitted.id) is submitted
