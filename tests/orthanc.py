"""A local Orthanc with its DICOMweb plugin (Debian: orthanc, orthanc-dicomweb), with a login."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import requests

PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
LOGIN = ("alice", "secret")
ROOT = "/dicom-web"
START_S = 30.0


def why_missing() -> str:
    """Why there is no Orthanc on this machine; an empty text if there is one."""
    if program() is None or not PLUGIN.exists():
        return "needs Orthanc: apt-get install orthanc orthanc-dicomweb"
    return ""


def program() -> str | None:
    """Path of the program."""
    return shutil.which("Orthanc", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")


@contextlib.contextmanager
def orthanc(folder: Path) -> Iterator[str]:
    """Start Orthanc with its data in a folder; yield its address without a slash at the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {
        "StorageDirectory": str(folder / "storage"),
        "IndexDirectory": str(folder / "storage"),
        "HttpPort": port,
        "DicomServerEnabled": False,
        "AuthenticationEnabled": True,
        "RegisteredUsers": dict([LOGIN]),
        "Plugins": [str(PLUGIN)],
        "DicomWeb": {"Enable": True, "Root": f"{ROOT}/"},
    }
    (folder / "orthanc.json").write_text(json.dumps(settings))
    with (folder / "orthanc.log").open("w") as log:
        process = subprocess.Popen(
            [program(), str(folder / "orthanc.json")], stdout=log, stderr=subprocess.STDOUT
        )
    try:
        address = f"http://127.0.0.1:{port}"
        _wait(address, process)
        yield address
    finally:
        process.terminate()
        process.wait(30)


def upload(address: str, folder: Path) -> None:
    """Store a folder's DICOM files by Orthanc's own interface."""
    with requests.Session() as session:
        session.auth = LOGIN
        for path in sorted(folder.iterdir()):
            session.post(f"{address}/instances", path.read_bytes(), timeout=60).raise_for_status()


def instance(address: str, uid: str) -> bytes:
    """Return the file of an instance by its SOPInstanceUID, by Orthanc's own interface."""
    with requests.Session() as session:
        session.auth = LOGIN
        found = session.post(f"{address}/tools/lookup", uid, timeout=60).json()
        (name,) = [each["ID"] for each in found if each["Type"] == "Instance"]
        answer = session.get(f"{address}/instances/{name}/file", timeout=60)
        answer.raise_for_status()
        return answer.content


def version(address: str) -> str:
    """Version of Orthanc."""
    return str(requests.get(f"{address}/system", auth=LOGIN, timeout=60).json()["Version"])


def _wait(address: str, process: subprocess.Popen) -> None:
    end = time.monotonic() + START_S
    while True:
        with contextlib.suppress(requests.ConnectionError):
            if requests.get(f"{address}/system", auth=LOGIN, timeout=5).ok:
                return
        assert process.poll() is None, "Orthanc has ended"
        assert time.monotonic() < end, "Orthanc does not answer"
        time.sleep(0.1)
