"""Kill processes and nodes under ``totalfast batch --engine ray``, and compare with a local batch.

    python scripts/kill_ray.py HOME --json FILE [--moments 6] [--cases 24]
        [--kinds process node all]

HOME holds weights, such as the stand-ins of scripts/make_standin_weights.py. The scans are small
synthetic ones. The cluster is on this machine: a head without cores, on which no case runs, and two
nodes. A moment is a number of cases that are done. At each moment of a batch of its own

- "process" kills the process that segments cases on one of the nodes (SIGKILL);
- "node" kills one of the nodes, without notice (SIGKILL of its raylet), and starts another one.

With "all", one batch meets a killed process at each moment, and a killed node in the middle. Each
batch must end by itself. Afterwards these are compared with a batch without Ray:

- cases that are missing, and cases that the manifest has as done more than once;
- label maps that differ;
- files that remain beside the results, such as staging folders.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.benchmark_command import WEIGHTS, machine
from scripts.kill_batch import (
    FLAGS,
    PROGRAM,
    SHAPE,
    SPACING_MM,
    done_lines,
    files_of,
    make_scans,
    same_bytes,
)
from totalfast.batch.results.entries import read_entries

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ACTOR = "ray::CaseActor"
"""Beginning of the title of a process that segments cases."""

KINDS = ("process", "node", "all")

RETRIES = 3
"""Cases may lose their process so often; with "all" more often, because more is killed."""

PATIENCE_S = 300.0
"""A batch that takes longer has hung."""

POLL_S = 0.02


class TwoNodes:
    """A Ray cluster on this machine, for this user only: a head without cores, and two nodes."""

    def __init__(self, folder: Path) -> None:
        # Read when Ray is imported. The first one lets it listen on the loopback only.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        os.environ["RAY_TMPDIR"] = str(folder)
        (folder / "ray").mkdir()
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "include_dashboard": False}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self.address: str = self._cluster.address
        self._nodes = [self._add(), self._add()]

    def _add(self) -> Any:
        return self._cluster.add_node(num_cpus=2)

    def actors(self) -> list[psutil.Process]:
        """Processes that segment cases, those of the older node first."""
        found = []
        for node in self._nodes:
            (raylet,) = node.all_processes["raylet"]
            for process in _children(raylet.process.pid):
                try:
                    title = " ".join(process.cmdline())
                except psutil.Error:
                    continue
                if title.startswith(ACTOR):
                    found.append(process)
        return found

    def kill_process(self) -> bool:
        """Kill the process of the older node; False if there is none."""
        actors = self.actors()
        for process in actors[:1]:
            process.kill()
        return bool(actors)

    def kill_node(self) -> bool:
        """Kill the older node, and start another one."""
        self._cluster.remove_node(self._nodes.pop(0), allow_graceful=False)
        self._nodes.append(self._add())
        return True

    def stop(self) -> None:
        """End all nodes."""
        self._cluster.shutdown()


def _children(process: int) -> list[psutil.Process]:
    try:
        return psutil.Process(process).children(recursive=True)
    except psutil.Error:
        return []


@dataclass
class Tally:
    """What became of the batches of one kind."""

    kills: int = 0
    batches: int = 0
    done_when_killed: list[int] = field(default_factory=list)
    attempts_without_result: int = 0
    """Attempts whose process ended."""
    cases_lost: int = 0
    cases_done_twice: int = 0
    label_maps_that_differ: int = 0
    files_left: int = 0
    longest_s: float = 0.0
    wrong: list[str] = field(default_factory=list)

    def compare(self, output: Path, reference: Path, names: set[str]) -> None:
        """Count what differs from the batch without Ray."""
        done = done_lines(output)
        maps = [f"{name}/segmentation.nii.gz" for name in sorted(names)]
        found = {
            "lost": sorted(names - done.keys()),
            "done twice": sorted(name for name in done if done[name] > 1),
            "other labels": [p for p in maps if not same_bytes(output / p, reference / p)],
            "other files": sorted(files_of(output) ^ files_of(reference)),
        }
        self.cases_lost += len(found["lost"])
        self.cases_done_twice += len(found["done twice"])
        self.label_maps_that_differ += len(found["other labels"])
        self.files_left += len(found["other files"])
        self.wrong += [f"{output.name}: {what}: {n[:5]}" for what, n in found.items() if n]


@dataclass(frozen=True, kw_only=True)
class Batches:
    """Runs batches of one set of scans."""

    home: Path
    scans: Path
    reference: Path
    cluster: TwoNodes

    def start(self, output: Path, *words: str) -> subprocess.Popen[str]:
        """Start a batch."""
        return subprocess.Popen(
            [*PROGRAM, "-i", self.scans, "-o", output, *FLAGS, *words],
            env={**os.environ, "TOTALSEG_HOME_DIR": str(self.home)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def finish(self, process: subprocess.Popen[str]) -> str:
        """Wait for the end of a batch; return what it printed, which should be nothing."""
        try:
            printed, _ = process.communicate(timeout=PATIENCE_S)
        finally:
            process.kill()
        if process.returncode:
            raise RuntimeError(f"a batch ended with {process.returncode}: {printed[-2000:]}")
        return printed

    def run(self, output: Path, kills: Sequence[tuple[int, str]], tally: Tally) -> None:
        """Run a batch on the cluster, kill at moments, and compare.

        Parameters
        ----------
        output
            New folder.
        kills
            Number of done cases, and what is killed then.
        tally
            Counts.
        """
        began = time.perf_counter()
        retries = str(RETRIES if len(kills) == 1 else 2 * len(kills))
        words = ("--engine", "ray", "--ray-address", self.cluster.address, "--retries", retries)
        process = self.start(output, *words)
        for moment, kind in kills:
            self._wait_for(moment, output, process)
            tally.done_when_killed.append(sum(done_lines(output).values()))
            tally.kills += self._kill(kind, process)
        printed = self.finish(process)
        if printed:
            tally.wrong.append(f"{output.name}: it printed {printed[-300:]!r}")
        tally.batches += 1
        tally.longest_s = max(tally.longest_s, round(time.perf_counter() - began, 1))
        tally.attempts_without_result += attempts_without_result(output)
        tally.compare(output, self.reference, names_of(self.scans))
        shutil.rmtree(output)

    def _wait_for(self, moment: int, output: Path, process: subprocess.Popen[str]) -> None:
        """Wait until as many cases are done; 0 is when the first process is there."""
        end = time.monotonic() + PATIENCE_S
        while process.poll() is None and time.monotonic() < end:
            if sum(done_lines(output).values()) >= moment and self.cluster.actors():
                return
            time.sleep(POLL_S)

    def _kill(self, kind: str, process: subprocess.Popen[str]) -> bool:
        if process.poll() is not None:
            return False
        return self.cluster.kill_node() if kind == "node" else self.cluster.kill_process()


def attempts_without_result(output: Path) -> int:
    """Count the attempts before the last ones; in this script only lost processes cause them."""
    entries = read_entries(output).values()
    return sum(entry.attempt - 1 for entry in entries)


def names_of(scans: Path) -> set[str]:
    """Names of the cases."""
    return {path.name.removesuffix(".nii.gz") for path in scans.iterdir()}


def plans(kind: str, moments: int, cases: int) -> Iterator[list[tuple[int, str]]]:
    """Yield what is killed in each batch of a kind."""
    numbers = [round(cases * number / moments) for number in range(moments)]
    if kind == "all":
        yield [(n, "node" if n == numbers[moments // 2] else "process") for n in numbers]
        return
    for number in numbers:
        yield [(number, kind)]


def main() -> int:
    """Command line; 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("home", type=Path, help="TOTALSEG_HOME_DIR with stand-in weights")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--moments", type=int, default=6)
    parser.add_argument("--cases", type=int, default=24)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    options = parser.parse_args()
    place = "/tmp" if os.name == "posix" else None  # noqa: S108 - Ray's sockets need short paths
    with (
        tempfile.TemporaryDirectory(prefix="totalfast-kills-") as folder,
        tempfile.TemporaryDirectory(prefix="totalfast-", dir=place) as private,
    ):
        scratch = Path(folder)
        make_scans(scratch / "scans", options.cases)
        cluster = TwoNodes(Path(private))
        try:
            report = measure(cluster, options, scratch)
        finally:
            cluster.stop()
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    wrong = [line for tally in report["kinds"].values() for line in tally["wrong"]]
    print("\n".join(wrong) or "nothing is wrong")
    return int(bool(wrong))


def measure(cluster: TwoNodes, options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Run all batches."""
    batches = Batches(
        home=options.home.absolute(),
        scans=scratch / "scans",
        reference=scratch / "reference",
        cluster=cluster,
    )
    batches.finish(batches.start(batches.reference))
    whole = Tally()
    batches.run(scratch / "whole", [], whole)
    tallies: dict[str, Tally] = {"none": whole}
    for kind in options.kinds:
        tally = tallies[kind] = Tally()
        for number, kills in enumerate(plans(kind, options.moments, options.cases)):
            batches.run(scratch / f"{kind}-{number}", kills, tally)
            print(f"{kind} at {kills}: {len(tally.wrong)} wrong so far", flush=True)
    return {
        "weights": WEIGHTS,
        "scans": f"{options.cases} synthetic, {SHAPE} voxels of {SPACING_MM} mm",
        "flags": f"{' '.join(FLAGS)} --engine ray",
        "cluster": "a head without cores and two nodes with 2 cores each, all on this machine",
        "machine": machine(),
        "kinds": {kind: vars(tally) for kind, tally in tallies.items()},
    }


if __name__ == "__main__":
    sys.exit(main())
