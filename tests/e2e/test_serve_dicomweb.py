"""``totalfast serve --dicomweb``: series come from a server, and results are stored there."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pydicom
import pytest
import requests

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("aiohttp")
pytest.importorskip("highdicom")

from tests import orthanc
from tests.dicom_series import write_series
from tests.dicomweb_double import Double, in_thread

FLAGS = ["--fastest", "-d", "cpu"]
STUDY, SERIES, SCOUT = "1.2.3", "1.2.3.4", "1.2.3.5"
WORKING = ("waiting", "fetching", "running", "pushing")


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """A study: a volume, and a scout of two images."""
    folder = tmp_path_factory.mktemp("study")
    voxels = np.random.default_rng(0).normal(0, 300, (30, 36, 40)).astype(np.int16)
    write_series(folder / "volume", voxels, spacing_mm=(3.0, 2.0, 2.0))
    scout = {"SeriesInstanceUID": SCOUT, "SeriesDescription": "Jane Doe"}
    write_series(folder / "scout", voxels[:2], **scout)
    return folder


class DoubleServer:
    """The server in this process."""

    def __init__(self, scans):
        self.double = Double()
        self.double.add(scans / "volume")
        self.double.add(scans / "scout")
        self.stack = in_thread(self.double)

    def __enter__(self):
        self.url = self.stack.__enter__()
        return self

    def __exit__(self, *error):
        self.stack.__exit__(*error)

    def instance(self, uid):
        return self.double.stored[uid]


class OrthancServer:
    """A real server."""

    def __init__(self, scans):
        self.scans = scans
        self.folder = Path(tempfile.mkdtemp(prefix="tf-orthanc", dir="/tmp"))
        self.stack = orthanc.orthanc(self.folder)

    def __enter__(self):
        self.address = self.stack.__enter__()
        self.url = self.address + orthanc.ROOT
        orthanc.upload(self.address, self.scans / "volume")
        orthanc.upload(self.address, self.scans / "scout")
        return self

    def __exit__(self, *error):
        self.stack.__exit__(*error)
        shutil.rmtree(self.folder)

    def instance(self, uid):
        return orthanc.instance(self.address, uid)


@pytest.fixture(scope="module", params=[DoubleServer, OrthancServer])
def pacs(request, scans):
    if request.param is OrthancServer and orthanc.why_missing():
        pytest.skip(orthanc.why_missing())
    with request.param(scans) as server:
        yield server


@contextlib.contextmanager
def serving(standin_home, **servers):
    """Start ``totalfast serve``; yield a client, and end it."""
    folder = Path(tempfile.mkdtemp(prefix="tf", dir="/tmp"))
    (folder / "login").write_text("alice:secret\n")
    command = [sys.executable, "-m", "totalfast", "serve", "-d", "cpu", "--http", "0"]
    command += ["--socket", folder / "s.sock"]
    for name, url in servers.items():
        command += ["--dicomweb", f"{name}={url}"]
    process = subprocess.Popen(
        command,
        env={
            **os.environ,
            "TOTALSEG_HOME_DIR": str(standin_home),
            "XDG_RUNTIME_DIR": str(folder),
            "TMPDIR": str(folder),
            "TOTALFAST_DICOMWEB_PACS_FILE": str(folder / "login"),
            "TOTALFAST_DICOMWEB_FAR": "alice:secret",
        },
        stdout=subprocess.PIPE,
        text=True,
    )
    printed = [process.stdout.readline()]
    while not printed[-1].startswith("HTTP: "):
        printed.append(process.stdout.readline())
    _, url, _, _, token_file = printed[-1].replace(",", "").split()
    with requests.Session() as session:
        session.headers["Authorization"] = f"Bearer {Path(token_file).read_text()}"
        yield Client(url, session, "".join(printed))
    process.terminate()
    assert process.wait(30) == 0
    process.stdout.close()
    assert not list(folder.glob("totalfast-*"))
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def client(standin_home, pacs):
    servers = {"pacs": pacs.url, "closed": "http://127.0.0.1:9/dicom-web"}
    with serving(standin_home, **servers) as found:
        yield found


class Client:
    """Requests to the server of totalfast."""

    def __init__(self, url, session, printed):
        self.url, self.session, self.printed = url, session, printed

    def submit(self, **wanted):
        return self.session.post(
            f"{self.url}/runs", json={"dicomweb": "pacs", "study": STUDY, **wanted}, timeout=60
        )

    def get(self, path):
        return self.session.get(self.url + path, timeout=60)

    def ended(self, answer):
        assert answer.status_code == 202, answer.text
        end = time.monotonic() + 60
        while (state := self.get(answer.headers["Location"]).json())["state"] in WORKING:
            assert time.monotonic() < end, state
            time.sleep(0.05)
        return state


@pytest.fixture(scope="module")
def pushed(client):
    return client.ended(client.submit(flags=FLAGS, push=True))


def test_the_volume_of_a_study_is_segmented_and_stored(
    pacs, pushed, scans, standins_are_used, tmp_path
):
    assert (pushed["state"], pushed["series"]) == ("done", SERIES), pushed
    assert pushed["stored"]["server"] == "pacs"
    (stored,) = pushed["stored"]["instances"]
    result = pydicom.dcmread(io.BytesIO(pacs.instance(stored["instance"])))
    assert (result.Modality, result.StudyInstanceUID) == ("SEG", STUDY)
    assert result.SeriesInstanceUID == stored["series"]
    (referenced,) = result.ReferencedSeriesSequence
    assert referenced.SeriesInstanceUID == SERIES
    sources = {str(each.ReferencedSOPInstanceUID) for each in referenced.ReferencedInstanceSequence}
    slices = [pydicom.dcmread(path) for path in (scans / "volume").iterdir()]
    assert sources <= {str(each.SOPInstanceUID) for each in slices}

    command = [sys.executable, "-m", "totalfast", "-i", scans / "volume", *FLAGS]
    command += ["-o", tmp_path / "local.dcm", "-ot", "dicom_seg"]
    subprocess.run(command, check=True)
    local = pydicom.dcmread(tmp_path / "local.dcm")
    assert len(local.SegmentSequence) == len(result.SegmentSequence) > 1
    assert np.array_equal(result.pixel_array, local.pixel_array)
    assert result.pixel_array.any()


def test_a_stored_result_can_be_fetched(client, pacs, pushed):
    answer = client.get(f"/runs/{pushed['id']}/result")
    (stored,) = pushed["stored"]["instances"]
    fetched = pydicom.dcmread(io.BytesIO(answer.content))
    assert fetched.SOPInstanceUID == stored["instance"]
    assert np.array_equal(
        fetched.pixel_array,
        pydicom.dcmread(io.BytesIO(pacs.instance(stored["instance"]))).pixel_array,
    )


def test_a_named_series_without_a_push(client):
    state = client.ended(client.submit(series=SERIES, flags=[*FLAGS, "-ml"]))
    assert (state["state"], state["stored"], state["has_result"]) == ("done", None, True), state
    assert client.get(f"/runs/{state['id']}/result").content[:2] == b"\x1f\x8b"


@pytest.mark.parametrize(
    ("flags", "modalities"),
    [
        (["--fastest", "-ot", "dicom_seg", "dicom_rtstruct"], ["RTSTRUCT", "SEG"]),
        (["--fast", "-ta", "total", "body"], ["SEG", "SEG"]),
    ],
)
def test_all_results_of_a_run_are_stored(client, pacs, flags, modalities):
    state = client.ended(client.submit(flags=[*flags, "-d", "cpu"], push=True))
    assert state["state"] == "done", state
    stored = [pacs.instance(each["instance"]) for each in state["stored"]["instances"]]
    assert sorted(pydicom.dcmread(io.BytesIO(file)).Modality for file in stored) == modalities


def test_a_push_that_fails_leaves_the_result(client):
    state = client.ended(client.submit(series=SERIES, flags=FLAGS, push="closed"))
    assert (state["state"], state["has_result"], state["stored"]) == ("failed", True, None), state
    assert "closed can't be reached" in state["error"]
    assert client.get(f"/runs/{state['id']}/result").status_code == 200


def test_what_is_not_there_fails_without_patient_data(client):
    state = client.ended(client.submit(study="1.2.4", flags=FLAGS))
    assert (state["state"], state["exit_code"]) == ("failed", 1)
    assert "no study 1.2.4" in state["error"]
    state = client.ended(client.submit(series="1.9", flags=FLAGS))
    assert f"{SERIES} (CT, 30 instances)" in state["error"]
    assert f"{SCOUT} (CT, 2 instances)" in state["error"]
    assert "Jane" not in state["error"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"dicomweb": "other"},
        {"dicomweb": "http://127.0.0.1:1"},
        {"push": "other"},
        {"push": 1},
        {"study": None},
        {"study": "1.2/../3"},
        {"study": "1" * 65},
        {"series": "1.2.x"},
        {"series": 5},
        {"flags": ["--nonsense"]},
        {"flags": ["-ot", "nifti"], "push": True},
        {"url": "http://127.0.0.1:1"},
    ],
)
def test_requests_that_name_something_else_are_refused(client, wrong):
    assert client.submit(**wrong).status_code == 400, wrong


def test_metrics_count_transfers(client, pushed):
    text = client.get("/metrics").text
    counted = re.search(r"^totalfast_dicomweb_stored_instances_total (\d+)$", text, re.MULTILINE)
    assert int(counted[1]) >= 1
    assert 'totalfast_dicomweb_failures_total{step="push"}' in text


def test_a_server_ends_while_it_fetches(standin_home, scans):
    async def stalled(request):
        await asyncio.sleep(60)

    with DoubleServer(scans) as pacs:
        pacs.double.faults["retrieve"] = [stalled]
        began = None
        with serving(standin_home, pacs=pacs.url, far="http://pacs.invalid") as client:
            assert "WARNING: The login and the scans of far are sent" in client.printed
            assert "scans of pacs" not in client.printed
            where = client.submit(flags=FLAGS).headers["Location"]
            while not pacs.double.requests["retrieve"]:
                time.sleep(0.01)
            assert client.get(where).json()["state"] == "fetching"
            began = time.monotonic()
        assert time.monotonic() - began < 10
