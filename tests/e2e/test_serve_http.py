"""``totalfast serve --http`` as another program uses it."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import requests

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

FLAGS = ["--fastest", "-d", "cpu"]


class Client:
    """Requests to a server with its token."""

    def __init__(self, url: str, token: str) -> None:
        self.url = url
        self.session = requests.Session()
        self.session.headers["Authorization"] = f"Bearer {token}"

    def get(self, path, **keywords):
        return self.session.get(self.url + path, timeout=60, **keywords)

    def upload(self, data, name="ct.nii.gz", flags=(*FLAGS, "-ml")):
        return self.session.post(
            f"{self.url}/runs", params={"name": name, "flags": [*flags]}, data=data, timeout=60
        )

    def submit(self, **wanted):
        return self.session.post(f"{self.url}/runs", json=wanted, timeout=60)

    def delete(self, name):
        return self.session.delete(f"{self.url}/runs/{name}", timeout=60)

    def ended(self, answer):
        assert answer.status_code == 202, answer.text
        end = time.monotonic() + 60
        while (state := self.get(answer.headers["Location"]).json())["state"] in (
            "waiting",
            "running",
        ):
            assert time.monotonic() < end, state
            time.sleep(0.05)
        return state


@pytest.fixture(scope="module")
def folder():
    path = Path(tempfile.mkdtemp(prefix="tf", dir="/tmp"))
    (path / "data").mkdir()
    (path / "uploads").mkdir()
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def client(standin_home, folder):
    command = [sys.executable, "-m", "totalfast", "serve", "-d", "cpu", "--http", "0"]
    command += ["--socket", folder / "s.sock", "--http-root", folder / "data"]
    process = subprocess.Popen(
        [*command, "--max-upload", "0.001", "--at-a-time", "1", "--queue", "2"],
        env={
            **os.environ,
            "TOTALSEG_HOME_DIR": str(standin_home),
            "XDG_RUNTIME_DIR": str(folder),
            "TMPDIR": str(folder / "uploads"),
        },
        stdout=subprocess.PIPE,
        text=True,
    )
    process.stdout.readline()
    _, url, _, _, token_file = process.stdout.readline().replace(",", "").split()
    yield Client(url, Path(token_file).read_text())
    process.terminate()
    assert process.wait(30) == 0
    process.stdout.close()
    assert not list((folder / "uploads").glob("totalfast*"))
    assert not Path(token_file).exists()


@pytest.fixture(scope="module")
def scan():
    values = np.random.default_rng(0).normal(0, 300, (40, 36, 30)).astype(np.int16)
    return nib.Nifti1Image(values, np.diag([-2.0, 2.0, 3.0, 1.0]))


@pytest.fixture(scope="module")
def data(scan, tmp_path_factory):
    path = tmp_path_factory.mktemp("scan") / "ct.nii.gz"
    nib.save(scan, path)
    return path.read_bytes()


def test_an_uploaded_scan_is_segmented_and_fetched(client, data):
    answer = client.upload(data)
    state = client.ended(answer)
    assert (state["state"], state["fraction"], state["exit_code"]) == ("done", 1.0, 0), state
    assert any(line.startswith("Done in") for line in state["log"])
    result = client.get(f"/runs/{state['id']}/result")
    assert "segmentation.nii.gz" in result.headers["content-disposition"]
    image = nib.Nifti1Image.from_bytes(gzip.decompress(result.content))
    assert image.shape == (40, 36, 30)


def test_several_files_come_as_a_zip_file(client, data):
    state = client.ended(client.upload(data, flags=[*FLAGS, "-s"]))
    result = client.get(f"/runs/{state['id']}/result")
    names = zipfile.ZipFile(io.BytesIO(result.content)).namelist()
    assert len(names) == 118
    assert "segmentations/statistics.json" in names
    assert client.delete(state["id"]).status_code == 200
    assert client.get(f"/runs/{state['id']}").status_code == 404


def test_paths_within_the_roots_are_read_and_written(client, folder, data):
    (folder / "data" / "ct.nii.gz").write_bytes(data)
    output = folder / "data" / "seg.nii.gz"
    wanted = {"input": str(folder / "data" / "ct.nii.gz"), "output": str(output)}
    assert client.ended(client.submit(**wanted, flags=[*FLAGS, "-ml"]))["state"] == "done"
    assert nib.load(output).shape == (40, 36, 30)


def test_paths_outside_of_the_roots_are_refused(client, folder, data, tmp_path):
    inside = folder / "data" / "in.nii.gz"
    inside.write_bytes(data)
    (tmp_path / "ct.nii.gz").write_bytes(data)
    (folder / "data" / "link").symlink_to(tmp_path)
    good = {"input": str(inside), "output": str(folder / "data" / "out.nii.gz")}
    for wrong in (
        {"input": str(tmp_path / "ct.nii.gz")},
        {"output": str(tmp_path / "s.nii.gz")},
        {"output": str(folder / "data" / ".." / "s.nii.gz")},
        {"output": str(folder / "data" / "link" / "s.nii.gz")},
        {"flags": ["--report", str(tmp_path / "r.json")]},
        {"flags": ["-s", str(tmp_path / "s.json")]},
    ):
        assert client.submit(**{**good, **wrong}).status_code == 403, wrong
    assert client.upload(data, flags=["-rp", str(tmp_path / "r.json")]).status_code == 403
    assert [path.name for path in tmp_path.iterdir()] == ["ct.nii.gz"]


@pytest.mark.parametrize(
    "flags",
    [
        ["--trust-model"],
        ["-l", "aca_1"],
        ["--nora_tag", "x"],
        ["--nonsense"],
        ["--help"],
        ["--hel"],
        ["-lt"],
        ["--"],
        ["-ta", "nonsense"],
    ],
)
def test_flags_that_are_not_for_http_are_refused(client, data, flags):
    assert client.upload(data, flags=flags).status_code == 400


@pytest.mark.parametrize("name", ["", "..", "../x.nii", "a/b.nii.gz", "a\\b.nii.gz"])
def test_names_with_folders_are_refused(client, data, name):
    assert client.upload(data, name=name).status_code == 400


def test_malformed_submissions_are_refused(client):
    for body in (b"", b"[]", b"{", b'{"input": 1, "output": 2}', b'{"input": "a", "output": "b"}'):
        answer = client.session.post(
            f"{client.url}/runs",
            data=body,
            headers={"Content-Type": "application/json"},
            timeout=60,
        )
        assert answer.status_code == 400, body


def test_too_large_uploads_are_refused_and_removed(client, folder):
    before = len(list((folder / "uploads").glob("totalfast-serve-*/*")))
    assert client.upload(b"0" * 1_100_000).status_code == 413
    assert len(list((folder / "uploads").glob("totalfast-serve-*/*"))) == before


@pytest.mark.parametrize("header", [None, "Bearer x", "Basic x", "Bearer "])
def test_requests_without_the_token_are_refused(client, header):
    headers = {} if header is None else {"Authorization": header}
    for path in ("/metrics", "/runs/x", "/runs"):
        answer = requests.get(client.url + path, headers=headers, timeout=60)
        assert answer.status_code == 401
    assert requests.post(f"{client.url}/runs", headers=headers, timeout=60).status_code == 401
    assert requests.get(f"{client.url}/health", timeout=60).json()["status"] == "ok"


def test_damaged_scans_fail_and_are_named(client):
    state = client.ended(client.upload(b"no scan"))
    assert state["state"] == "failed"
    assert state["exit_code"] == 1
    assert state["error"].startswith("ERROR: ")
    assert client.get(f"/runs/{state['id']}/result").status_code == 409


def test_events_are_sent_until_the_end(client, data):
    answer = client.upload(data)
    with client.get(f"/runs/{answer.json()['id']}/events", stream=True) as lines:
        assert lines.headers["content-type"].startswith("text/event-stream")
        sent = [line for line in lines.iter_lines() if line.startswith(b"data: ")]
    events = [json.loads(line[6:]) for line in sent]
    kinds = [event["event"] for event in events]
    assert kinds[0] == "begun"
    assert kinds[-1] == "ended"
    assert {"log", "stage", "advance"} <= {*kinds}


def test_runs_are_cancelled_and_a_full_queue_refuses(client, folder):
    values = np.random.default_rng(0).normal(0, 300, (150, 150, 200)).astype(np.int16)
    nib.save(nib.Nifti1Image(values, np.diag([-3.0, 3.0, 3.0, 1.0])), folder / "data" / "l.nii.gz")
    wanted = {"input": str(folder / "data" / "l.nii.gz"), "flags": ["-d", "cpu", "-ml"]}
    answers = [
        client.submit(**wanted, output=str(folder / "data" / f"l{number}.nii.gz"))
        for number in range(4)
    ]
    assert [answer.status_code for answer in answers] == [202, 202, 202, 503]
    for answer in answers[:3]:
        client.delete(answer.json()["id"])
        assert client.ended(answer)["state"] == "cancelled"
    assert not list((folder / "data").glob("l?.nii.gz"))


def test_metrics_and_description(client):
    text = client.get("/metrics").text
    assert 'totalfast_runs_ended_total{state="done"}' in text
    assert "totalfast_runs 0" in text
    described = client.get("/openapi.json").json()
    assert described["openapi"].startswith("3.1")
    assert set(described["paths"]) == {
        "/health",
        "/metrics",
        "/runs",
        "/runs/{id}",
        "/runs/{id}/events",
        "/runs/{id}/result",
    }
