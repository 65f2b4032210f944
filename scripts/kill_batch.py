"""Kill ``totalfast batch`` at many moments, resume it, and compare with an uninterrupted batch.

    python scripts/kill_batch.py HOME --json FILE [--moments 20] [--cases 12]
        [--signals KILL TERM INT]

HOME holds weights, such as the stand-ins of scripts/make_standin_weights.py. The scans are small
synthetic ones. For each signal the moments are spread evenly over the time from a command's start
to its end. Each moment has a folder of its own: the command is hit there once, then runs again to
its end. One more folder is hit at all moments, one after the other. Afterwards these are compared
with the uninterrupted batch:

- cases that are missing, and cases that the manifest has as done more than once;
- label maps that differ, and whether the table of statistics has the same bytes;
- files that remain beside the results, such as staging folders;
- after SIGTERM and SIGINT also the exit code, the last line, the seconds until the end, and
  files that remain before the batch goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.benchmark_command import WEIGHTS, machine

SHAPE, SPACING_MM = (60, 60, 50), (2.0, 2.0, 3.0)

FLAGS = ("--fastest", "-ml", "--statistics", "-d", "cpu", "--quiet")

PROGRAM = (sys.executable, "-m", "totalfast", "batch")

EXIT_CODES = {"KILL": -signal.SIGKILL, "TERM": 143, "INT": 130}

LAST_LINE = "Interrupted; no file is half-written."

SECONDS_TO_END = 10.0
"""A batch that is told to end must end within this time."""


@dataclass(frozen=True, kw_only=True)
class Commands:
    """Starts batches of one set of scans."""

    home: Path
    scans: Path

    def start(self, output: Path) -> subprocess.Popen[str]:
        """Start a batch; SIGINT is not ignored, as it would be in a background job."""
        return subprocess.Popen(
            [*PROGRAM, "-i", self.scans, "-o", output, *FLAGS],
            env={**os.environ, "TOTALSEG_HOME_DIR": str(self.home)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=_default_sigint if os.name == "posix" else None,
        )

    def finish(self, output: Path) -> float:
        """Run a batch to its end; return its seconds."""
        began = time.perf_counter()
        process = self.start(output)
        _, errors = process.communicate()
        if process.returncode:
            raise RuntimeError(f"a batch ended with {process.returncode}: {errors[-2000:]}")
        return time.perf_counter() - began

    def hit(self, output: Path, name: str, after_s: float) -> Hit:
        """Start a batch and send it a signal after some time."""
        process = self.start(output)
        time.sleep(after_s)
        began = time.perf_counter()
        process.send_signal(getattr(signal, f"SIG{name}"))
        _, errors = process.communicate()
        return Hit(
            code=process.returncode,
            seconds=time.perf_counter() - began,
            errors=errors,
            done=sum(done_lines(output).values()),
        )


def _default_sigint() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@dataclass(frozen=True, kw_only=True)
class Hit:
    """How a batch ended after a signal, or before it."""

    code: int
    seconds: float
    errors: str
    done: int

    def wrong(self, name: str) -> list[str]:
        """What is wrong with this end."""
        if self.code == 0:
            return []
        faults = []
        if self.code != EXIT_CODES[name]:
            faults.append(f"exit code {self.code}: {self.errors[-300:]}")
        if name != "KILL":
            if self.seconds > SECONDS_TO_END:
                faults.append(f"it ended after {self.seconds:.1f} s")
            if not self.errors.rstrip().endswith(LAST_LINE) or "Traceback" in self.errors:
                faults.append(f"the last line is {self.errors[-300:]!r}")
        return faults


@dataclass
class Tally:
    """Results of all moments of one signal."""

    moments_s: list[float] = field(default_factory=list)
    ended_before: int = 0
    done_when_hit: list[int] = field(default_factory=list)
    longest_end_s: float = 0.0
    cases_missing: int = 0
    cases_done_twice: int = 0
    label_maps_that_differ: int = 0
    tables_that_differ: int = 0
    files_left: int = 0
    wrong: list[str] = field(default_factory=list)

    def count(self, hit: Hit, name: str) -> None:
        """Count the end of a batch."""
        self.ended_before += hit.code == 0
        self.done_when_hit.append(hit.done)
        self.longest_end_s = max(self.longest_end_s, round(hit.seconds, 2))
        self.wrong += hit.wrong(name)

    def compare(self, output: Path, reference: Path, names: set[str]) -> None:
        """Count what differs from the uninterrupted batch."""
        done = done_lines(output)
        missing, twice = names - done.keys(), [name for name in done if done[name] > 1]
        maps = [f"{name}/segmentation.nii.gz" for name in sorted(names)]
        different = [path for path in maps if not same_bytes(output / path, reference / path)]
        other_table = not same_bytes(output / "statistics.csv", reference / "statistics.csv")
        left = sorted(files_of(output) ^ files_of(reference))
        self.cases_missing += len(missing)
        self.cases_done_twice += len(twice)
        self.label_maps_that_differ += len(different)
        self.tables_that_differ += other_table
        self.files_left += len(left)
        for problem in (missing, twice, different, left):
            if problem:
                self.wrong.append(f"{output.name}: {sorted(problem)[:5]}")


def done_lines(output: Path) -> Counter[str]:
    """Count the lines of each case that is done in a folder's manifests; a cut line is none."""
    names: Counter[str] = Counter()
    for file in output.glob("manifest*.jsonl"):
        for line in file.read_text().splitlines():
            try:
                content = json.loads(line)
            except ValueError:
                continue
            if content.get("state") == "done":
                names[content["name"]] += 1
    return names


def files_of(folder: Path) -> set[str]:
    """Files and folders below a folder, also hidden ones."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def hidden_in(folder: Path) -> list[str]:
    """Hidden files and folders, without locks, which stay."""
    paths = [path.name for path in folder.rglob(".*")]
    return [name for name in paths if not name.endswith(".lock")]


def same_bytes(one: Path, two: Path) -> bool:
    """Whether both files exist and have the same content."""
    return one.is_file() and two.is_file() and one.read_bytes() == two.read_bytes()


def make_scans(folder: Path, count: int) -> None:
    """Write small synthetic scans, each different."""
    folder.mkdir(parents=True)
    affine = np.diag([*SPACING_MM, 1.0])
    for number in range(count):
        values = np.random.default_rng(number).normal(0, 300, SHAPE).astype(np.int16)
        nib.save(nib.Nifti1Image(values, affine), folder / f"scan{number:02d}.nii.gz")


def kill_at_moments(
    commands: Commands, scratch: Path, name: str, moments: int, reference: Path
) -> Tally:
    """Hit batches with one signal at many moments, let them go on, and compare."""
    names = {path.name.removesuffix(".nii.gz") for path in commands.scans.iterdir()}
    whole_s = commands.finish(scratch / "warm")
    shutil.rmtree(scratch / "warm")
    tally = Tally()
    again = scratch / f"{name}-again"
    for number in range(moments):
        after_s = whole_s * (number + 0.5) / moments
        tally.moments_s.append(round(after_s, 2))
        output = scratch / f"{name}-{number}"
        tally.count(commands.hit(output, name, after_s), name)
        if name != "KILL" and output.exists() and (left := hidden_in(output)):
            tally.wrong.append(f"{output.name}: {left} before the batch went on")
        commands.finish(output)
        tally.compare(output, reference, names)
        shutil.rmtree(output)
        commands.hit(again, name, after_s)
        print(f"{name} after {after_s:.2f} s: {len(tally.wrong)} wrong so far", flush=True)
    commands.finish(again)
    tally.compare(again, reference, names)
    return tally


def main() -> int:
    """Command line; 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("home", type=Path, help="TOTALSEG_HOME_DIR with stand-in weights")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--cases", type=int, default=12)
    parser.add_argument("--signals", nargs="+", choices=EXIT_CODES, default=list(EXIT_CODES))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="totalfast-kills-") as folder:
        scratch = Path(folder)
        commands = Commands(home=options.home.absolute(), scans=scratch / "scans")
        make_scans(commands.scans, options.cases)
        reference = scratch / "reference"
        whole_s = commands.finish(reference)
        results = {
            name: kill_at_moments(commands, scratch, name, options.moments, reference)
            for name in options.signals
        }
    report: dict[str, Any] = {
        "weights": WEIGHTS,
        "scans": f"{options.cases} synthetic, {SHAPE} voxels of {SPACING_MM} mm",
        "flags": " ".join(FLAGS),
        "machine": machine(),
        "uninterrupted_s": round(whole_s, 2),
        "signals": {f"SIG{name}": vars(tally) for name, tally in results.items()},
    }
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    wrong = [line for tally in results.values() for line in tally.wrong]
    print("\n".join(wrong) or "nothing is wrong")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
