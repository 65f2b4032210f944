"""Time totalfast commands that a server runs, and those that run by themselves.

    python scripts/benchmark_server.py HOME --json FILE [--repeats N] [--requests N] [--clients N]

HOME holds weights, such as the stand-ins of scripts/make_standin_weights.py. The scan is a tiny
synthetic one, so that what remains is the time outside of the work. All commands are whole
processes (``python -m totalfast``), timed from their start to their end:

- alone: commands without a server;
- served, the first: the server has loaded nothing;
- served, later; and this minus the server's time for the run: the time outside of the work;
- a served command that fails at once, because its scan does not exist;
- many requests from several clients, of which two vanish (SIGKILL) in the middle: percentiles of
  the time of a request, and the server's memory before and after.

The files of all commands are compared: bytes that differ are counted.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.benchmark_command import machine

SHAPE, SPACING_MM = (40, 36, 30), (2.0, 2.0, 3.0)

FLAGS = ("--fastest", "-ml", "-d", "cpu")

VANISHING = 2
"""Number of clients that vanish."""

KILLED_AFTER_S = 0.15
"""From the start of a client that vanishes: its run has begun or waits."""

PAUSE_S = 4.0
"""After this a server without runs has returned memory to the system."""

PROGRAM = (sys.executable, "-m", "totalfast")


class Server:
    """A server's process; a context manager."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.place = folder / "server.sock"
        self.process = subprocess.Popen(
            [*PROGRAM, "serve", "--socket", self.place, "-d", "cpu", "--idle", "never"],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self._printed = self.process.stdout
        self._printed.readline()
        self.seconds: list[float] = []
        """Of the runs that have ended, as the server measured them."""
        threading.Thread(target=self._read, daemon=True).start()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(60)

    def _read(self) -> None:
        for line in self._printed:
            found = re.search(r"has ended after ([0-9.]+) s", line)
            if found:
                self.seconds.append(float(found[1]))

    def resident_mb(self) -> float:
        """Resident memory of the server."""
        return round(float(psutil.Process(self.process.pid).memory_info().rss) / 1e6, 1)


class Commands:
    """Runs commands on one scan, and keeps the bytes that they write."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self._folder, self._environment = folder, environment
        self.scan = folder / "ct.nii.gz"
        values = np.random.default_rng(0).normal(0, 300, SHAPE).astype(np.int16)
        nib.save(nib.Nifti1Image(values, np.diag([*SPACING_MM, 1.0])), self.scan)
        self._count, self._lock = 0, threading.Lock()
        self.outputs: set[bytes] = set()

    def timed(
        self, *, server: Server | None, scan: Path | None = None, kill: bool = False
    ) -> float:
        """Run a command; return its wall seconds."""
        with self._lock:
            self._count += 1
            output = self._folder / f"{self._count}.nii.gz"
        environment = dict(self._environment)
        if server is not None:
            environment["TOTALFAST_SERVER"] = str(server.place)
        began = time.perf_counter()
        process = subprocess.Popen(
            [*PROGRAM, "-i", scan or self.scan, "-o", output, *FLAGS],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        if kill:
            time.sleep(KILLED_AFTER_S)
            process.kill()
        printed, errors = process.communicate()
        elapsed_s = time.perf_counter() - began
        if kill:
            return elapsed_s
        if "WARNING: This run is not handed" in printed:
            raise RuntimeError(printed)
        if scan is None:
            if process.returncode:
                raise RuntimeError(errors)
            self.outputs.add(output.read_bytes())
        return elapsed_s


def summary(seconds: list[float]) -> dict[str, Any]:
    """Median and all values."""
    return {
        "median_s": round(statistics.median(seconds), 3),
        "all_s": [round(value, 3) for value in seconds],
    }


def many_requests(
    commands: Commands, server: Server, *, requests: int, clients: int
) -> dict[str, Any]:
    """Time requests of several clients, two of which vanish in the middle of theirs."""
    each = requests // clients
    before_mb = server.resident_mb()

    def client(number: int) -> list[float]:
        if number < VANISHING:
            done = [commands.timed(server=server) for _ in range(each // 2)]
            commands.timed(server=server, kill=True)
            return done
        return [commands.timed(server=server) for _ in range(each)]

    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        seconds = sorted(value for done in pool.map(client, range(clients)) for value in done)
    wall_s = time.perf_counter() - began
    busy_mb = server.resident_mb()
    time.sleep(PAUSE_S)
    percentiles = statistics.quantiles(seconds, n=100, method="inclusive")
    return {
        "requests": requests,
        "clients": clients,
        "vanished": VANISHING,
        "done": len(seconds),
        "wall_s": round(wall_s, 1),
        "p50_s": round(percentiles[49], 3),
        "p99_s": round(percentiles[98], 3),
        "resident_mb_before": before_mb,
        "resident_mb_after": busy_mb,
        "resident_mb_after_a_pause": server.resident_mb(),
    }


def measure(home: Path, *, repeats: int, requests: int, clients: int) -> dict[str, Any]:
    """Do all measurements."""
    environment = {
        **os.environ,
        "TOTALSEG_HOME_DIR": str(home.absolute()),
        "TOTALFAST_BACKEND": "torch",
    }
    environment.pop("TOTALFAST_SERVER", None)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        commands = Commands(folder, environment)
        commands.timed(server=None)  # fills the system's cache of files
        alone = [commands.timed(server=None) for _ in range(repeats)]
        with Server(folder, environment) as server:
            first = commands.timed(server=server)
            later = [commands.timed(server=server) for _ in range(repeats)]
            time.sleep(0.5)
            outside = [wall - work for wall, work in zip(later, server.seconds[1:], strict=True)]
            missing = folder / "missing.nii.gz"
            failing = [commands.timed(server=server, scan=missing) for _ in range(repeats)]
            many = many_requests(commands, server, requests=requests, clients=clients)
    return {
        "weights": "stand-in weights, not TotalSegmentator's (scripts/make_standin_weights.py)",
        "scan": f"synthetic, {SHAPE} voxels of {SPACING_MM} mm",
        "flags": " ".join(FLAGS),
        "machine": machine(),
        "alone": summary(alone),
        "served_first_s": round(first, 3),
        "served_later": summary(later),
        "served_later_outside_of_the_work": summary(outside),
        "served_and_failing_at_once": summary(failing),
        "many_requests": many,
        "different_outputs": len(commands.outputs) - 1,
    }


def main() -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("home", type=Path, metavar="HOME")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--clients", type=int, default=8)
    args = parser.parse_args()
    found = measure(args.home, repeats=args.repeats, requests=args.requests, clients=args.clients)
    text = json.dumps(found, indent=2)
    print(text)
    if args.json is not None:
        args.json.write_text(f"{text}\n")


if __name__ == "__main__":
    main()
