"""The HTTP side without a network: requests that are refused for lack of room, results of runs."""

from __future__ import annotations

import asyncio
import json

import pytest

pytest.importorskip("starlette")

from totalfast.serve.http import create_app
from totalfast.serve.http_limits import HttpLimits
from totalfast.serve.http_runs import Command, HttpRuns
from totalfast.serve.run_queue import RunQueue
from totalfast.serve.runs import Ending
from totalfast.serve.storage import Storage

TOKEN = "token"  # noqa: S105 - of this test


def read_command(words):
    paths = {"input": words[words.index("-i") + 1], "output": words[words.index("-o") + 1]}
    return Command(paths=paths, output_name="segmentation.nii.gz")


def two_files(words, paths, progress):
    from pathlib import Path

    for number in range(2):
        Path(paths["output"]).with_name(f"{number}.nii.gz").write_bytes(b"0" * 60)
    return Ending(code=0)


async def ask(app, method, path, body=b"", **headers):
    """Send a request to an ASGI application; return status and body."""
    name, _, query = path.partition("?")
    parts = [body[start : start + 50] for start in range(0, len(body), 50)] or [b""]
    messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    messages[-1]["more_body"] = False
    sent = []

    async def receive():
        if not messages:
            await asyncio.Event().wait()  # the client stays
        return messages.pop(0)

    async def send(message):
        sent.append(message)

    given = {"authorization": f"Bearer {TOKEN}", **headers}
    scope = {
        "type": "http",
        "method": method,
        "path": name,
        "query_string": query.encode(),
        "headers": [(key.encode(), value.encode()) for key, value in given.items()],
    }
    await app(scope, receive, send)
    assert not (body and messages), "the rest of the body was not read"
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])


def in_app(folder, work, **limits):
    """Await ``work(app, runs)`` with a server whose storage has 200 bytes."""

    async def main():
        queue = RunQueue(two_files, at_a_time=1, waiting=5)
        storage = Storage(folder, limit_bytes=200, free_bytes=0)
        runs = HttpRuns(
            queue, limits=HttpLimits(**limits), read_command=read_command, storage=storage
        )
        try:
            return await work(create_app(runs, TOKEN), runs)
        finally:
            await queue.stop()

    return asyncio.run(main())


@pytest.mark.parametrize("headers", [{}, {"content-length": "300"}])
def test_an_upload_without_room_is_refused_and_removed(tmp_path, headers):
    async def work(app, runs):
        answer = await ask(app, "POST", "/runs?name=ct.nii.gz", b"0" * 300, **headers)
        return answer, runs.storage.used_bytes

    (status, body), used = in_app(tmp_path, work)
    assert (status, used, list(tmp_path.iterdir())) == (507, 0, [])
    assert "--max-storage" in json.loads(body)["error"]


def test_an_upload_that_is_too_large_is_refused_and_removed(tmp_path):
    async def work(app, runs):
        return await ask(app, "POST", "/runs?name=ct.nii.gz", b"0" * 101)

    assert in_app(tmp_path, work, upload_bytes=100)[0] == 413
    assert not list(tmp_path.iterdir())


def test_results_count_and_a_zip_file_of_them_needs_room(tmp_path):
    async def submit(app, runs):
        _, body = await ask(app, "POST", "/runs?name=ct.nii.gz", b"0" * 10)
        submitted = runs.get(json.loads(body)["id"])
        async for _event in submitted.watch():
            pass
        return f"/runs/{submitted.id}/result"

    async def work(app, runs):
        path = await submit(app, runs)
        assert runs.storage.used_bytes == 130
        refused = await ask(app, "GET", path)
        runs.storage._limit_bytes = 300
        status, body = await ask(app, "GET", path)
        assert runs.storage.used_bytes == 130
        return refused[0], status, body[:2]

    assert in_app(tmp_path, work) == (507, 200, b"PK")


def test_a_study_needs_dicomweb_servers(tmp_path):
    async def work(app, runs):
        body = json.dumps({"dicomweb": "pacs", "study": "1.2"}).encode()
        return await ask(app, "POST", "/runs", body, **{"content-type": "application/json"})

    status, body = in_app(tmp_path, work)
    assert status == 400
    assert "--dicomweb" in json.loads(body)["error"]
