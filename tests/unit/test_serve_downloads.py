"""Downloads of missing models in a server: shown to the run's client, and cancelled with it."""

from __future__ import annotations

import asyncio

import pytest

from tests.weights_server import (
    MODEL,
    broken_after,
    model_files,
    serve,
    silent_after,
    whole,
    zipped,
)
from totalfast.errors import WeightsError
from totalfast.serve.run_queue import CANCELLED, RunQueue
from totalfast.serve.runs import Ending, Run
from totalfast.weights import transfer
from totalfast.weights.bar import downloads_shown_by
from totalfast.weights.install import download

ZIP = zipped(model_files())
LABEL = f"Downloading model {MODEL.model_id}"


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    monkeypatch.setenv("TOTALSEG_WEIGHTS_PATH", str(tmp_path / "home"))
    monkeypatch.setenv("TOTALFAST_DOWNLOAD_STALL_S", "1")
    monkeypatch.setattr(transfer, "FIRST_PAUSE_S", 0.01)


def events_of(monkeypatch, *answers, quiet=False, cancel_at=None):
    """Do a run that only downloads; return its events and the last one."""
    events = []

    def job(words, paths, progress):
        with downloads_shown_by(progress):
            try:
                download(MODEL, quiet=quiet)
            except WeightsError as error:
                return Ending(code=1, error=str(error))
        return Ending(code=0)

    def send(event):
        events.append(event)
        if event["event"] == cancel_at:
            run.cancelled.set()

    run = Run(number=1, words=(), paths={}, send=send)

    async def main():
        queue = RunQueue(job, at_a_time=1, waiting=0)
        try:
            return await queue.start(run)
        finally:
            await queue.stop()

    with serve(*answers) as server:
        monkeypatch.setenv("TOTALFAST_WEIGHTS_MIRROR", server.url)
        last = asyncio.run(main())
    return [event for event in events if event["event"] not in ("begun", "log")], last


def test_a_download_is_shown_to_the_client_only(monkeypatch, capfd):
    events, last = events_of(monkeypatch, whole(ZIP))
    assert last["code"] == 0, last
    assert [event["event"] for event in events[:3]] == ["bar", "stage", "expect"]
    assert events[1] == {"event": "stage", "name": LABEL}
    assert events[2]["total"] == len(ZIP)
    assert sum(event["work"] for event in events if event["event"] == "advance") == len(ZIP)
    assert [event.get("shown") for event in events if event["event"] == "bar"] == [True, False]
    assert capfd.readouterr().err == ""


def test_a_download_that_is_continued_is_shown_from_there(monkeypatch):
    tag = {"ETag": '"one"'}
    events, last = events_of(monkeypatch, broken_after(100_000, ZIP, **tag), whole(ZIP, **tag))
    assert last["code"] == 0, last
    assert [event.get("shown") for event in events if event["event"] == "bar"] == [
        True,
        False,
        True,
        False,
    ]
    again = max(number for number, event in enumerate(events) if event["event"] == "expect")
    assert sum(event["work"] for event in events[again:] if "work" in event) == len(ZIP)


def test_a_quiet_download_shows_nothing(monkeypatch, capfd):
    events, last = events_of(monkeypatch, whole(ZIP), quiet=True)
    assert (events, last["code"]) == ([], 0)
    assert capfd.readouterr().err == ""


def test_a_download_is_cancelled_with_its_run(monkeypatch, tmp_path):
    events, last = events_of(monkeypatch, silent_after(200_000, ZIP), cancel_at="expect")
    assert last["code"] == CANCELLED
    assert not [event for event in events if event["event"] == "advance"]
    assert not MODEL.dataset.exists()
