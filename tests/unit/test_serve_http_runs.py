"""Runs that come by HTTP, without HTTP: limits of time, what is kept, late watchers."""

from __future__ import annotations

import asyncio
import time

import pytest

from totalfast.serve import http_runs
from totalfast.serve.http_runs import BusyError, HttpLimits, HttpRuns, OutsideError
from totalfast.serve.run_queue import RunQueue
from totalfast.serve.runs import Ending


def paths_of(words):
    return {"input": words[words.index("-i") + 1], "output": words[words.index("-o") + 1]}


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


def in_loop(job, work, folder, **limits):
    """Await ``work(runs)`` in a loop with runs of a job."""

    async def main():
        queue = RunQueue(job, at_a_time=1, waiting=1)
        limits_of_runs = HttpLimits(roots=(folder,), **limits)
        runs = HttpRuns(queue, limits=limits_of_runs, paths_of=paths_of, folder=folder)
        try:
            return await work(runs)
        finally:
            await queue.stop()

    return asyncio.run(main())


async def events_of(submitted):
    return [event["event"] async for event in submitted.watch()]


def test_a_run_is_cancelled_after_its_time(tmp_path):
    async def work(runs):
        submitted = runs.submit(tmp_path / "a", tmp_path / "b", [], None)
        await asyncio.wait_for(events_of(submitted), 10)
        return submitted.as_json()

    began = time.monotonic()
    assert in_loop(endless, work, tmp_path, run_s=0.2)["state"] == "cancelled"
    assert 0.2 <= time.monotonic() - began < 5


def test_uploads_and_results_are_removed_after_their_time(tmp_path):
    async def work(runs):
        folder = runs.new_folder()
        submitted = runs.submit(folder / "scan", folder / "result", [], folder)
        await events_of(submitted)
        was = runs.get(submitted.id), folder.exists()
        await asyncio.sleep(0.3)
        return submitted, was, (runs.get(submitted.id), folder.exists())

    submitted, before, after = in_loop(quick, work, tmp_path, keep_s=0.1)
    assert before == (submitted, True)
    assert after == (None, False)


def test_late_watchers_see_everything_and_long_logs_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(http_runs, "KEPT_EVENTS", 3)

    async def work(runs):
        submitted = runs.submit(tmp_path / "a", tmp_path / "b", [], None)
        first = await events_of(submitted)
        return first, await events_of(submitted)

    first, late = in_loop(quick, work, tmp_path)
    assert first == late == ["begun", "bar", "expect", "ended"]


def test_a_full_queue_and_paths_outside_are_refused(tmp_path):
    async def work(runs):
        for number in range(2):
            runs.submit(tmp_path / "a", tmp_path / f"{number}", [], None)
        with pytest.raises(BusyError, match="1 runs are waiting"):
            runs.submit(tmp_path / "a", tmp_path / "b", [], None)

    in_loop(endless, work, tmp_path)

    async def outside(runs):
        for path in (tmp_path.parent, tmp_path / ".." / "x"):
            with pytest.raises(OutsideError, match="outside"):
                runs.submit(tmp_path / "a", path, [], None)
            with pytest.raises(OutsideError, match="outside"):
                runs.submit(path, tmp_path / "a", [], None)

    in_loop(quick, outside, tmp_path)
