"""Check ``totalfast batch`` with scans and results in an object store: faults, kills, requests.

    python scripts/check_remote.py HOME --json FILE [--cases 12] [--moments 12]
        [--weed PROGRAM | --rclone PROGRAM | --gcs PROGRAM]

HOME holds weights, such as the stand-ins of scripts/make_standin_weights.py. The scans are small
synthetic ones. The store is moto's server, or SeaweedFS, rclone's server of a folder, or
fake-gcs-server (gs://, which needs gcsfs), if its program is given. A proxy counts all requests and
makes the faults. Everything is compared with a batch of the same scans on this disk: label maps and
the table must have the same bytes.

- whole: a batch; then the same command again, which must download no scan.
- faults: a share of all requests fails (status 503, an answer that is cut off, a connection that
  ends); then the store is away for some seconds in the middle of a batch.
- refused: the results of one case can't be written; they must be kept on this machine, and the next
  command does that case only.
- kills: the batch is killed (SIGKILL) at many moments, then runs again to its end. Half of the
  moments are those at which a file is being uploaded, the others are spread evenly over the time.
  Cases with a completion marker must have all of their files; their markers are written once, and
  the second command does not download their scans.
- web: the scans come from a web server, with and without answers to requests for ranges.

Of fake-gcs-server only the first is checked.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.benchmark_command import WEIGHTS, machine
from scripts.kill_batch import FLAGS, PROGRAM, SHAPE, SPACING_MM, make_scans, same_bytes
from tests.object_store import (
    CREDENTIALS,
    GCS_CONTENT,
    Fault,
    Proxy,
    free_port,
    moto_server,
    proxy_to,
    wait_for,
    web_server,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

SHARE_OF_FAULTS = 0.1
AWAY_S = 8.0
MARKER = "segmentation.nii.gz.complete.json"
LABELS = "segmentation.nii.gz"


@dataclass(kw_only=True)
class RandomFault(Fault):
    """Requests that fail by chance, each in one of several ways."""

    share: float = SHARE_OF_FAULTS
    dice: random.Random = field(default_factory=lambda: random.Random(0))  # noqa: S311
    hit: int = 0

    def hits(self, method: str, path: str) -> bool:
        """Whether this request fails; chooses how."""
        if self.dice.random() >= self.share:
            return False
        self.kind = self.dice.choice(("status", "cut", "hang up"))
        self.hit += 1
        return True


@dataclass(kw_only=True)
class KillAtUpload(Fault):
    """Kills a batch when it uploads a file, which then does not arrive."""

    process: subprocess.Popen[str]
    number: int
    """Of the upload, from 0."""

    def hits(self, method: str, path: str) -> bool:
        """Count the uploads, and kill the batch at the wanted one."""
        self.number -= method == self.method
        if self.number == -1 and method == self.method:
            self.process.kill()
            return True
        return False


@dataclass(kw_only=True)
class Check:
    """Batches against one store, and what was wrong with them."""

    home: Path
    scratch: Path
    proxy: Proxy
    scheme: str
    settings: dict[str, str]
    files: Any
    """fsspec's file system, without the proxy."""
    names: list[str]
    wrong: list[str] = field(default_factory=list)

    @property
    def scans(self) -> Path:
        """The scans on this disk."""
        return self.scratch / "scans"

    def start(self, scans: str, output: str | Path, *words: str) -> subprocess.Popen[str]:
        """Start a batch."""
        environment = {**os.environ, **self.settings, "TOTALSEG_HOME_DIR": str(self.home)}
        environment["TOTALFAST_RESCUE_DIR"] = str(self.scratch / "rescued")
        return subprocess.Popen(
            [*PROGRAM, "-i", scans, "-o", output, *FLAGS, *words],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, scans: str, output: str | Path, *words: str, code: int = 0) -> float:
        """Run a batch to its end; return its seconds."""
        began_s = time.perf_counter()
        process = self.start(scans, output, *words)
        _, errors = process.communicate()
        if process.returncode != code:
            self.wrong.append(f"{output}: exit code {process.returncode}: {errors[-1500:]}")
        return time.perf_counter() - began_s

    def url(self, path: str) -> str:
        """Address of a path in the bucket."""
        return f"{self.scheme}://bucket/{path}"

    def download(self, output: str) -> Path:
        """Download a batch's results."""
        target = self.scratch / "downloaded" / output
        shutil.rmtree(target, ignore_errors=True)
        for path in self.files.find(f"bucket/{output}"):
            place = target / path.removeprefix(f"bucket/{output}/")
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(self.files.cat_file(path))
        return target

    def compare(self, output: str, *, reference: Path | None = None, without: str = "") -> None:
        """Compare a batch's results with those of the batch on this disk."""
        target = self.download(output)
        reference = reference or self.scratch / "reference"
        table = [] if without else ["statistics.csv"]
        files = table + [
            f"{name}/{file}"
            for name in self.names
            if name != without
            for file in (LABELS, "statistics.json")
        ]
        different = [file for file in files if not same_bytes(target / file, reference / file)]
        if different:
            self.wrong.append(f"{output}: {different[:5]} differ")
        lines = Counter(
            entry["name"]
            for line in (target / "manifest.jsonl").read_text().splitlines()
            if (entry := json.loads(line)).get("state") == "done"
        )
        missing = [name for name in self.names if name != without and lines[name] != 1]
        if missing:
            self.wrong.append(f"{output}: done lines of {missing[:5]} are not one")

    def marked(self, output: str) -> set[str]:
        """Cases that have a completion marker; each must have all of its files."""
        marked = set()
        for path in self.files.find(f"bucket/{output}"):
            if path.endswith(MARKER):
                name = path.split("/")[-2]
                marked.add(name)
                labels = self.files.cat_file(f"bucket/{output}/{name}/{LABELS}")
                if labels != (self.scratch / "reference" / name / LABELS).read_bytes():
                    self.wrong.append(f"{output}/{name} has a marker, but other labels")
                files = json.loads(self.files.cat_file(path))["files"]
                if not all(self.files.exists(f"bucket/{output}/{name}/{file}") for file in files):
                    self.wrong.append(f"{output}/{name} has a marker, but is not whole")
        return marked

    def downloads(self) -> Counter[str]:
        """Scan to the number of times that it was downloaded."""
        found: Counter[str] = Counter()
        query = re.escape(GCS_CONTENT) if self.scheme == "gs" else ""
        for path, count in self.proxy.bodies.items():
            if match := re.search(rf"scans(?:/|%2F)(\w+)\.nii\.gz{query}$", path):
                found[match[1]] += count
        return found

    def marker_writes(self) -> Counter[str]:
        """Case to the number of times that its marker was written."""
        found: Counter[str] = Counter()
        for method, path in self.proxy.order:
            if method == "PUT" and path.endswith(MARKER):
                found[path.split("/")[-2]] += 1
        return found

    def counts(self) -> dict[str, int]:
        """Requests by their method."""
        counts: Counter[str] = Counter()
        for (method, _), count in self.proxy.requests.items():
            counts[method] += count
        return dict(sorted(counts.items()))


def check_whole(check: Check) -> dict[str, Any]:
    """Run a batch, and the same again."""
    check.proxy.forget()
    seconds = check.run(check.url("scans/"), check.url("whole"))
    check.compare("whole")
    downloads, first = check.downloads(), check.counts()
    if downloads != dict.fromkeys(check.names, 1):
        check.wrong.append(f"whole: downloads {downloads}")
    check.proxy.forget()
    again_s = check.run(check.url("scans/"), check.url("whole"))
    if check.downloads() or check.marker_writes():
        check.wrong.append("whole: the second command downloaded a scan or wrote a case")
    return {
        "seconds": round(seconds, 2),
        "again_s": round(again_s, 2),
        "downloads_of_a_scan": max(downloads.values(), default=0),
        "requests": first,
        "requests_again": check.counts(),
    }


def check_ray(check: Check) -> dict[str, Any]:
    """Run a batch by the processes of a Ray cluster, which download and upload themselves."""
    check.proxy.forget()
    seconds = check.run(check.url("scans/"), check.url("ray"), "--engine", "ray")
    check.compare("ray")
    return {"seconds": round(seconds, 2), "downloads": sum(check.downloads().values())}


def check_faults(check: Check) -> dict[str, Any]:
    """Let requests fail, then let the store be away."""
    check.proxy.forget()
    fault = RandomFault(kind="status", method="", path="")
    check.proxy.faults.append(fault)
    seconds = check.run(check.url("scans/"), check.url("faults"))
    requests = check.counts()
    check.proxy.forget()
    check.compare("faults")
    process = check.start(check.url("scans/"), check.url("away"))
    while not check.marker_writes() and process.poll() is None:
        time.sleep(0.02)
    check.proxy.is_down = True
    threading.Timer(AWAY_S, lambda: setattr(check.proxy, "is_down", False)).start()
    _, errors = process.communicate()
    check.proxy.is_down = False
    if process.returncode:
        check.wrong.append(f"away: exit code {process.returncode}: {errors[-1500:]}")
    check.compare("away")
    return {
        "failed_requests": fault.hit,
        "requests": requests,
        "seconds": round(seconds, 2),
        "away_s": AWAY_S,
    }


def check_refused(check: Check) -> dict[str, Any]:
    """Refuse the results of one case, then allow them."""
    check.proxy.forget()
    name = check.names[0]
    refused = Fault("status", "PUT", f"{name}/{LABELS}$", times=1000, status=403)
    check.proxy.faults.append(refused)
    check.run(check.url("scans/"), check.url("refused"), code=1)
    downloads = check.downloads()
    if name in check.marked("refused"):
        check.wrong.append("refused: the case has a marker")
    kept = list((check.scratch / "rescued").rglob(LABELS))
    reference = check.scratch / "reference" / name / LABELS
    if not kept or not all(same_bytes(path, reference) for path in kept):
        check.wrong.append(f"refused: kept {kept}")
    check.compare("refused", without=name)
    check.proxy.forget()
    check.run(check.url("scans/"), check.url("refused"))
    check.compare("refused")
    if check.downloads() != {name: 1}:
        check.wrong.append(f"refused: the second command downloaded {check.downloads()}")
    return {"copies_kept": len(kept), "downloads_of_a_scan": max(downloads.values())}


def check_kills(check: Check, moments: int, whole_s: float) -> dict[str, Any]:
    """Kill batches at many moments, and let them go on."""
    marked_when_killed, partial, ended_before = [], 0, 0
    uploads = 3 * len(check.names)
    for number in range(moments):
        output = f"kill{number}"
        check.proxy.forget()
        process = check.start(check.url("scans/"), check.url(output))
        place = (number + 0.5) / moments
        if number % 2:
            time.sleep(whole_s * place)
            process.kill()
        else:
            kill = KillAtUpload("hang up", "PUT", "", process=process, number=int(uploads * place))
            check.proxy.faults.append(kill)
        process.communicate()
        check.proxy.faults.clear()
        ended_before += process.returncode == 0
        time.sleep(0.3)  # the proxy hands on what it has received
        marked = check.marked(output)
        marked_when_killed.append(len(marked))
        files = check.files.find(f"bucket/{output}")
        begun = {path.split("/")[-2] for path in files if path.endswith(LABELS)}
        partial += len(begun - marked)
        check.proxy.bodies.clear()
        check.run(check.url("scans/"), check.url(output))
        check.compare(output)
        if again := check.downloads().keys() & marked:
            check.wrong.append(f"{output}: {again} were done, but downloaded again")
        if twice := [name for name, count in check.marker_writes().items() if count > 1]:
            check.wrong.append(f"{output}: {twice} were done twice")
        check.files.rm(f"bucket/{output}", recursive=True)
        print(f"killed at moment {number}: {len(check.wrong)} wrong so far", flush=True)
    return {
        "moments": moments,
        "ended_before": ended_before,
        "done_when_killed": marked_when_killed,
        "half_uploaded_cases_seen": partial,
    }


def check_web(check: Check) -> dict[str, Any]:
    """Read scans from a web server."""
    report = {}
    for ranges in (True, False):
        check.proxy.forget()
        with (
            web_server(check.scans, ranges=ranges) as url,
            proxy_to(int(url.rpartition(":")[2])) as proxy,
        ):
            web = proxy.url
            lines = "".join(f"{name},{web}/{name}.nii.gz?sig=x\n" for name in check.names)
            cases = check.scratch / f"web-{ranges}.csv"
            cases.write_text(f"case,path\n{lines}")
            output = check.scratch / f"web-{ranges}"
            check.run(str(cases), output)
            if set(proxy.bodies.values()) != {1}:
                check.wrong.append(f"web: downloads {proxy.bodies}")
            for name in check.names:
                reference = check.scratch / "reference" / name / LABELS
                if not same_bytes(output / name / LABELS, reference):
                    check.wrong.append(f"web: {name} differs")
            if "sig=" in (output / "manifest.jsonl").read_text():
                check.wrong.append("web: a signature is in the manifest")
            report["with ranges" if ranges else "without ranges"] = sum(proxy.requests.values())
    return report


@contextlib.contextmanager
def program(words: list[str], port: int, log: Path) -> Iterator[int]:
    """Run a server."""
    with log.open("w") as stream:
        process = subprocess.Popen(words, stdout=stream, stderr=subprocess.STDOUT)
        try:
            wait_for(port, process)  # type: ignore[arg-type]
            time.sleep(3)
            yield port
        finally:
            process.terminate()
            process.wait()


@contextlib.contextmanager
def store(options: argparse.Namespace, scratch: Path) -> Iterator[tuple[str, int]]:
    """Run the wanted store; give its name and port."""
    port, log = free_port(), scratch / "log"
    folder = scratch / "store"
    folder.mkdir()
    keys = [CREDENTIALS["AWS_ACCESS_KEY_ID"], CREDENTIALS["AWS_SECRET_ACCESS_KEY"]]
    if options.weed:
        identity = {
            "name": "check",
            "credentials": [{"accessKey": keys[0], "secretKey": keys[1]}],
            "actions": ["Admin", "Read", "Write", "List"],
        }
        (scratch / "s3.json").write_text(json.dumps({"identities": [identity]}))
        words = [options.weed, "server", f"-dir={folder}", "-s3", f"-s3.port={port}"]
        words += [f"-s3.config={scratch / 's3.json'}", "-ip=127.0.0.1", "-volume.max=20"]
        with program(words, port, log):
            yield "SeaweedFS", port
    elif options.rclone:
        words = [options.rclone, "serve", "s3", str(folder), "--addr", f"127.0.0.1:{port}"]
        with program([*words, "--auth-key", ",".join(keys)], port, log):
            yield "rclone serve s3", port
    elif options.gcs:
        words = [options.gcs, "-scheme", "http", "-host", "127.0.0.1", "-port", str(port)]
        words += ["-backend", "memory", "-public-host", f"127.0.0.1:{port}"]
        with program(words, port, log):
            yield "fake-gcs-server", port
    else:
        with moto_server(log) as port:
            yield "moto", port


def settings_of(port: int, *, gcs: bool = False) -> dict[str, str]:
    """Environment variables of fsspec's libraries for a store at a port."""
    url = f"http://127.0.0.1:{port}"
    if gcs:
        return {
            "STORAGE_EMULATOR_HOST": url,
            "FSSPEC_GS_TOKEN": "anon",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks Google for the kind of bucket
        }
    return {**CREDENTIALS, "AWS_ENDPOINT_URL": url}


@contextlib.contextmanager
def opened(
    home: Path, scratch: Path, cases: int, port: int, *, gcs: bool = False
) -> Iterator[Check]:
    """Fill the store at a port with scans, and do the batch on this disk that others must equal."""
    import fsspec

    make_scans(scratch / "scans", cases)
    with proxy_to(port) as proxy:
        os.environ.update(settings_of(port, gcs=gcs))
        scheme = "gs" if gcs else "s3"
        files = fsspec.filesystem(scheme, use_listings_cache=False, skip_instance_cache=True)
        files.mkdir("bucket")
        for path in sorted((scratch / "scans").iterdir()):
            files.pipe_file(f"bucket/scans/{path.name}", path.read_bytes())
        check = Check(
            home=home.absolute(),
            scratch=scratch,
            proxy=proxy,
            scheme=scheme,
            settings=settings_of(proxy.port, gcs=gcs),
            files=files,
            names=[f"scan{number:02d}" for number in range(cases)],
        )
        check.run(str(check.scans), scratch / "reference")
        yield check


def check_all(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Run all checks."""
    with (
        store(options, scratch) as (name, port),
        opened(options.home, scratch, options.cases, port, gcs=bool(options.gcs)) as check,
    ):
        local_s = check.run(str(check.scans), scratch / "local")
        report: dict[str, Any] = {"store": name, "on_this_disk_s": round(local_s, 2)}
        report["whole"] = check_whole(check)
        print(f"whole: {check.wrong or 'right'}", flush=True)
        if not options.gcs:
            report["refused"] = check_refused(check)
            print(f"refused: {check.wrong or 'right'}", flush=True)
            report["kills"] = check_kills(check, options.moments, report["whole"]["seconds"])
            report["faults"] = check_faults(check)
            print(f"faults: {check.wrong or 'right'}", flush=True)
            report["web"] = check_web(check)
            print(f"web: {check.wrong or 'right'}", flush=True)
        report["wrong"] = check.wrong
    return report


def main() -> int:
    """Command line; 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("home", type=Path, help="TOTALSEG_HOME_DIR with stand-in weights")
    parser.add_argument("--json", type=Path, help="add the results to this file")
    parser.add_argument("--cases", type=int, default=12)
    parser.add_argument("--moments", type=int, default=12)
    for server in ("weed", "rclone", "gcs"):
        parser.add_argument(f"--{server}", help="program of the store")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="totalfast-remote-check-") as folder:
        report = check_all(options, Path(folder))
    if options.json:
        old = json.loads(options.json.read_text()) if options.json.exists() else {}
        stores = old.get("stores", {}) | {report["store"]: report}
        content = {
            "weights": WEIGHTS,
            "scans": f"{options.cases} synthetic, {SHAPE} voxels of {SPACING_MM} mm",
            "flags": " ".join(FLAGS),
            "machine": machine(),
            "stores": stores,
        }
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    print("\n".join(report["wrong"]) or "nothing is wrong")
    return int(bool(report["wrong"]))


if __name__ == "__main__":
    sys.exit(main())
