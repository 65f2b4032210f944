"""Check 'totalfast serve --dicomweb' against a real Orthanc, and measure a long series.

    python scripts/check_dicomweb.py HOME --scan FOLDER --json FILE [--slices N]

HOME holds weights, such as the stand-ins of scripts/make_standin_weights.py; FOLDER holds one DICOM
series. Orthanc and its DICOMweb plugin come from Debian (orthanc, orthanc-dicomweb). It is started
on the loopback, with a login.

- The series of FOLDER: stored in Orthanc, fetched, segmented, stored as DICOM SEG. The SEG is read
  back from Orthanc and compared with that of a local run: voxels, and the images that it refers to.
- A synthetic series of N slices of 512 x 512: seconds of the fetch, and how much the server's
  memory grows meanwhile; seconds until a fetch is cancelled.
- A wrong password: the error, and that it is not quoted.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pydicom
import requests

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.benchmark_command import machine
from tests import orthanc
from tests.dicom_series import write_series

PROGRAM = (sys.executable, "-m", "totalfast")
FLAGS = ["--fast", "-d", "cpu"]
LONG_STUDY, LONG_SERIES = "1.2.826.1", "1.2.826.1.1"
WORKING = ("waiting", "fetching", "running", "pushing")
WRONG_PASSWORD = "not-the-password"  # noqa: S105 - of this check
POLL_S = 0.02


class Server:
    """``totalfast serve`` with two names for Orthanc, the second one with a wrong password."""

    def __init__(self, process: subprocess.Popen[str], url: str, token: str) -> None:
        self.process, self._url = process, url
        self._session = requests.Session()
        self._session.headers["Authorization"] = f"Bearer {token}"

    def submit(self, **wanted: Any) -> str:
        """Submit a study; return the id of its run."""
        answer = self._session.post(f"{self._url}/runs", json=wanted, timeout=60)
        answer.raise_for_status()
        return str(answer.json()["id"])

    def state(self, run: str) -> dict[str, Any]:
        """State of a run."""
        found: dict[str, Any] = self._session.get(f"{self._url}/runs/{run}", timeout=60).json()
        return found

    def ended(self, run: str) -> dict[str, Any]:
        """Wait for the end of a run."""
        while (state := self.state(run))["state"] in WORKING:
            time.sleep(POLL_S)
        return state

    def cancel(self, run: str) -> None:
        """Cancel a run, or remove it."""
        self._session.delete(f"{self._url}/runs/{run}", timeout=60)

    def close(self) -> None:
        """End the server."""
        self._session.close()
        self.process.terminate()
        self.process.wait(60)

    def resident_mb(self) -> float:
        """Memory of the server's process."""
        return float(psutil.Process(self.process.pid).memory_info().rss) / 1e6


@contextlib.contextmanager
def serving(home: Path, pacs: str, folder: Path) -> Iterator[Server]:
    """Start the server."""
    command = [*PROGRAM, "serve", "-d", "cpu", "--http", "0", "--socket", str(folder / "s.sock")]
    for name in ("pacs", "locked"):
        command += ["--dicomweb", f"{name}={pacs}"]
    environment = {
        **os.environ,
        "TOTALSEG_HOME_DIR": str(home),
        "XDG_RUNTIME_DIR": str(folder),
        "TMPDIR": str(folder),
        "TOTALFAST_DICOMWEB_PACS": ":".join(orthanc.LOGIN),
        "TOTALFAST_DICOMWEB_LOCKED": f"alice:{WRONG_PASSWORD}",
    }
    with (folder / "serve.log").open("w") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True
        )
    assert process.stdout is not None
    process.stdout.readline()
    _, url, _, _, token_file = process.stdout.readline().replace(",", "").split()
    server = Server(process, url, Path(token_file).read_text())
    try:
        yield server
    finally:
        server.close()
        process.stdout.close()


def with_uids(scan: Path, folder: Path) -> Path:
    """Copy a series; if it lacks UIDs, which Orthanc needs, it gets them."""
    folder.mkdir()
    for path in sorted(scan.iterdir()):
        header = pydicom.dcmread(path)
        header.StudyInstanceUID = header.get("StudyInstanceUID") or "1.2.826.2"
        header.SeriesInstanceUID = header.get("SeriesInstanceUID") or "1.2.826.2.1"
        instance = header.file_meta.MediaStorageSOPInstanceUID
        header.SOPInstanceUID = header.get("SOPInstanceUID") or instance
        header.save_as(folder / f"{path.name}.dcm")
    return folder


def check_scan(
    server: Server, address: str, home: Path, scan: Path, folder: Path
) -> dict[str, Any]:
    """Segment a series of Orthanc; compare the SEG there with that of a local run."""
    scan = with_uids(scan, folder / "scan")
    slices = [pydicom.dcmread(path, stop_before_pixels=True) for path in scan.iterdir()]
    study, series = str(slices[0].StudyInstanceUID), str(slices[0].SeriesInstanceUID)
    orthanc.upload(address, scan)
    began = time.perf_counter()
    state = server.ended(server.submit(dicomweb="pacs", study=study, flags=FLAGS, push=True))
    elapsed_s = time.perf_counter() - began
    if state["state"] != "done":
        raise RuntimeError(state["error"])
    (stored,) = state["stored"]["instances"]
    result = pydicom.dcmread(io.BytesIO(orthanc.instance(address, stored["instance"])))
    command = [*PROGRAM, "-i", str(scan), "-o", str(folder / "local.dcm"), "-ot", "dicom_seg"]
    environment = {**os.environ, "TOTALSEG_HOME_DIR": str(home)}
    subprocess.run([*command, *FLAGS], check=True, env=environment, stdout=subprocess.DEVNULL)
    local = pydicom.dcmread(folder / "local.dcm")
    (referenced,) = result.ReferencedSeriesSequence
    images = {str(each.ReferencedSOPInstanceUID) for each in referenced.ReferencedInstanceSequence}
    return {
        "slices": len(slices),
        "transfer_syntax": slices[0].file_meta.TransferSyntaxUID.name,
        "series_was_chosen": state["series"] == series,
        "seconds": round(elapsed_s, 2),
        "segments": len(result.SegmentSequence),
        "frames": int(result.NumberOfFrames),
        "voxels_of_segments": int(np.count_nonzero(result.pixel_array)),
        "differing_voxels": int(np.count_nonzero(result.pixel_array != local.pixel_array)),
        "refers_to_the_series": str(referenced.SeriesInstanceUID) == series,
        "refers_to_its_images_only": images <= {str(each.SOPInstanceUID) for each in slices},
        "is_in_the_study": str(result.StudyInstanceUID) == study,
    }


def check_long_series(server: Server, address: str, folder: Path, count: int) -> dict[str, Any]:
    """Fetch a long series, and watch the server's memory; then cancel a fetch."""
    plane = np.random.default_rng(0).integers(-1000, 1000, (1, 512, 512)).astype(np.int16)
    voxels = np.broadcast_to(plane, (count, 512, 512))
    uids = {"StudyInstanceUID": LONG_STUDY, "SeriesInstanceUID": LONG_SERIES}
    scan = write_series(folder / "long", voxels, spacing_mm=(0.5, 0.8, 0.8), **uids)
    orthanc.upload(address, scan)
    size = sum(path.stat().st_size for path in scan.iterdir())
    wanted = {"dicomweb": "pacs", "study": LONG_STUDY, "flags": FLAGS}
    before_mb = peak_mb = server.resident_mb()
    began = time.perf_counter()
    run = server.submit(**wanted)
    while server.state(run)["state"] in ("waiting", "fetching"):
        peak_mb = max(peak_mb, server.resident_mb())
        time.sleep(POLL_S)
    fetched_s = time.perf_counter() - began
    server.cancel(run)
    server.ended(run)
    server.cancel(run)
    run = server.submit(**wanted)
    while not server.state(run)["stage"].startswith(tuple("123456789")):
        time.sleep(POLL_S)
    began = time.perf_counter()
    server.cancel(run)
    state = server.ended(run)
    return {
        "slices": count,
        "megabytes": round(size / 1e6, 1),
        "fetch_seconds": round(fetched_s, 2),
        "memory_before_mb": round(before_mb, 1),
        "memory_growth_mb": round(peak_mb - before_mb, 1),
        "cancelled_in_the_fetch": state["state"] == "cancelled",
        "cancel_seconds": round(time.perf_counter() - began, 3),
    }


def check_password(server: Server, folder: Path) -> dict[str, Any]:
    """Use a wrong password."""
    state = server.ended(server.submit(dicomweb="locked", study=LONG_STUDY, flags=FLAGS))
    text = json.dumps(state) + (folder / "serve.log").read_text()
    return {
        "state": state["state"],
        "error": state["error"],
        "is_quoted": WRONG_PASSWORD in text or orthanc.LOGIN[1] in text,
    }


def main() -> None:
    """Run all checks and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("home", type=Path)
    parser.add_argument("--scan", type=Path, required=True)
    parser.add_argument("--slices", type=int, default=1000)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    if orthanc.why_missing():
        parser.error(orthanc.why_missing())
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dicomweb-")))
        address = stack.enter_context(orthanc.orthanc(folder))
        server = stack.enter_context(serving(args.home, address + orthanc.ROOT, folder))
        results = {
            "orthanc": orthanc.version(address),
            "machine": machine(),
            "weights": "stand-ins",
            "flags": FLAGS,
            "long_series": check_long_series(server, address, folder, args.slices),
            "scan": check_scan(server, address, args.home, args.scan, folder),
            "wrong_password": check_password(server, folder),
        }
    args.json.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
