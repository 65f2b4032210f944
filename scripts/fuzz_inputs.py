"""Read damaged inputs, and check each time that totalfast only does what it may do.

    python scripts/fuzz_inputs.py --kind nifti gzip itk dicom zip model --cases 1000 [--json FILE]

Each case damages a small input by random numbers, and reads it as a run does. It must be read, or
be refused by a TotalfastError of one line. The other rules, in ``fuzzing/watch.py``: no patient's
name in messages, no file elsewhere, no temporary file left, no program, no connection, no import
beside the known parts, bounded memory and time. Where damage has no effect, the result must be that
of the undamaged input. Each kind runs in a process of its own, so that crashes and endless loops in
compiled code are found too.

``--first NUMBER --cases 1`` repeats a case of a finding. Needs Linux.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import json
import logging
import multiprocessing
import os
import platform
import resource
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

from fuzzing.case import Place  # noqa: E402 - after the path is set
from fuzzing.loop import Tally, read_cases  # noqa: E402 - after the path is set
from fuzzing.watch import Watch  # noqa: E402 - after the path is set

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.sharedctypes import Synchronized

KINDS = {
    "nifti": ("scans", "Nifti"),
    "gzip": ("scans", "Gzip"),
    "itk": ("itk", "Itk"),
    "dicom": ("dicom", "Dicom"),
    "zip": ("zips", "Zip"),
    "model": ("models", "Model"),
}
"""Kind to module and class."""

CASES_PER_PROCESS = 5000
"""A new process then starts, which shows that cases do not depend on those before them."""

BLOCK = 100
"""Cases after which a process sends its counts, so that few are lost when it crashes."""

LONGEST_NOTE = 2000
"""Characters of what a process printed before it crashed."""

LIBRARIES = ("nibabel", "pydicom", "SimpleITK", "isal", "torch", "nnunetv2", "numpy", "pillow")


def main() -> None:
    """Run the kinds one after the other, print and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--cases", type=int, default=1000, help="of each kind")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=10.0, help="that a case may take")
    parser.add_argument("--json", type=Path, help="report; other kinds in it are kept")
    args = parser.parse_args()
    reports = {name: fuzz(name, args) for name in args.kind}
    if args.json:
        write_report(args.json, reports, args)
    sys.exit(any(report["findings"] for report in reports.values()))


def fuzz(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run the cases of a kind in processes, one after the other."""
    tally, number, last = Tally(), args.first, args.first + args.cases
    while number < last:
        stop = min(number + CASES_PER_PROCESS, last)
        number = run_process(name, range(number, stop), args, tally)
    print(f"{name}: {tally.cases} cases, {tally.read} read, {tally.refused} refused, ", end="")
    print(f"{tally.findings.total()} findings, {tally.seconds:.0f} s", flush=True)
    report = tally.report()
    for finding, example in tally.examples.items():
        print(f"  {finding}: case {example['case']} ({example['note']:.300})")
        print(example["details"])
    return report


def run_process(name: str, numbers: range, args: argparse.Namespace, tally: Tally) -> int:
    """Run cases in a new process; return the number of the first case that was not run.

    The process is ended when it stays in one case for ten times the time that a case may take,
    which happens in compiled code only.
    """
    context = multiprocessing.get_context("spawn")
    current = context.Value("q", -1, lock=False)
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        process = context.Process(
            target=work, args=(name, numbers, args, Path(folder), current, sender)
        )
        process.start()
        sender.close()
        done = collect(process, receiver, current, 10 * args.seconds, tally)
        process.join()
        note = (Path(folder) / "errors").read_text(errors="replace")
    if done:
        return numbers.stop
    if current.value < 0:
        raise SystemExit(f"{name}: the inputs could not be made: {note}")
    tally.found(f"the process ended with {process.exitcode}", current.value, "", first_lines(note))
    tally.cases += (current.value - numbers.start) % BLOCK + 1
    return int(current.value) + 1


def first_lines(text: str) -> str:
    """What a process printed when it crashed, without the lines about files before."""
    return text[max(text.find("Fatal Python error") - 500, 0) :][:LONGEST_NOTE]


def collect(
    process: Any, receiver: Connection, current: Any, longest_s: float, tally: Tally
) -> bool:
    """Add what a process sends, until it ends; return whether it ran all its cases."""
    seen, since = -1, time.monotonic()
    while True:
        if receiver.poll(1.0):
            try:
                part = receiver.recv()
            except EOFError:
                return False
            if part is None:
                return True
            tally.add(part)
        if current.value != seen:
            seen, since = current.value, time.monotonic()
        elif seen >= 0 and time.monotonic() - since > longest_s:
            process.kill()


def work(
    name: str,
    numbers: range,
    args: argparse.Namespace,
    folder: Path,
    current: Synchronized[int],
    sender: Connection,
) -> None:
    """Run cases in this process."""
    # What libraries print about damaged files is shown only after a crash.
    errors = os.open(folder / "errors", os.O_WRONLY | os.O_CREAT)
    os.dup2(errors, 1)
    os.dup2(errors, 2)
    faulthandler.enable(errors)
    logging.captureWarnings(capture=True)
    place = Place.below(folder / "root")
    tempfile.tempdir = os.environ["TMPDIR"] = str(place.temporary)
    module, kind_name = KINDS[name]
    kind = getattr(importlib.import_module(f"fuzzing.{module}"), kind_name)(place)
    watch = Watch(place, args.seconds)

    def begins(number: int) -> None:
        current.value = number

    seed = f"{args.seed} {name}"
    for at in range(0, len(numbers), BLOCK):
        block = numbers[at : at + BLOCK]
        sender.send(read_cases(kind, watch, seed=seed, numbers=block, begins=begins))
    sender.send(None)
    sender.close()
    os._exit(0)  # libraries' threads and handlers need not end in order


def write_report(path: Path, reports: dict[str, dict[str, Any]], args: argparse.Namespace) -> None:
    """Write the reports of kinds into a file; kinds that were not run keep theirs."""
    kinds = json.loads(path.read_text())["kinds"] if path.exists() else {}
    for name, report in reports.items():
        kinds[name] = {"seed": args.seed, "first": args.first, **report}
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    content = {
        "cases": sum(kind["cases"] for kind in kinds.values()),
        "findings": sum(sum(kind["findings"].values()) for kind in kinds.values()),
        "seconds a case may take": args.seconds,
        "largest process_mb": round(used.ru_maxrss / 1e3),
        "kinds": {name: kinds[name] for name in KINDS if name in kinds},
        "versions": {name: version(name) for name in LIBRARIES},
        "python": platform.python_version(),
    }
    path.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
