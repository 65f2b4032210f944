"""Interrupt a run at every step of its writing, and check what it leaves.

    python scripts/inject_faults.py WEIGHTS_HOME SCAN [--classes 6] [--json FILE]

The run writes masks, statistics, a preview, a report and a completion marker. At every call of
open, write, rename, unlink, mkdir, rmdir and fsync that concerns these files, one fault happens:
one SIGTERM, two, SIGHUP, SIGINT, SIGKILL, a disk that is full from then on, or a refused call. Each
fault hits a run into a new folder, and a run into a folder with the results of another scan. After
each fault the files, the exit code, the last line and a second run are checked.

The label map is computed once; the network does not run again. Needs Linux and a C compiler.
WEIGHTS_HOME may hold stand-in weights; the labels do not matter here.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

FAULTS = {
    "SIGTERM": (-signal.SIGTERM, 0, 0),
    "SIGTERM twice": (-signal.SIGTERM, 1, 0),
    "SIGHUP": (-signal.SIGHUP, 0, 0),
    "SIGINT": (-signal.SIGINT, 0, 0),
    "SIGKILL": (-signal.SIGKILL, 0, 0),
    "disk full": (errno.ENOSPC, 0, 1),
    "refused": (errno.EACCES, 0, 0),
}
"""Name to (number, send again, for ever), as in fault_injection.c."""

SIGNAL_CODES = {
    "SIGTERM": 143,
    "SIGTERM twice": 143,
    "SIGHUP": 129,
    "SIGINT": 130,
    "SIGKILL": -signal.SIGKILL,
}

OLD = b"old"
COMPLETE, HALF = "the results were already complete.", "no file is half-written."


def main() -> None:
    """Inject faults, print and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("home", type=Path)
    parser.add_argument("scan", type=Path)
    parser.add_argument("--classes", type=int, default=6)
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if "FAULT_LIBRARY" not in os.environ:
        restart_with_library()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        report = inject(args, Path(folder))
    print(json.dumps({key: report[key] for key in ("injections", "outcomes", "wrong")}, indent=2))
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    sys.exit(1 if report["wrong"] else 0)


def restart_with_library() -> None:
    """Compile the library and start this program again with it."""
    source = Path(__file__).with_name("fault_injection.c")
    with tempfile.TemporaryDirectory() as folder:
        library = str(Path(folder) / "fault.so")
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
        environment = {**os.environ, "LD_PRELOAD": library, "FAULT_LIBRARY": library}
        done = subprocess.run([sys.executable, *sys.argv], env=environment, check=False)
    sys.exit(done.returncode)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Paths of one run; everything that it writes is below ``folder``."""

    folder: Path

    @property
    def words(self) -> list[str]:
        """The command's output flags."""
        return [
            *("-o", str(self.folder / "out"), "-s", str(self.folder / "stats.json")),
            *("-rp", str(self.folder / "other/report.json"), "--preview", "--completion-marker"),
        ]

    def files(self) -> dict[str, bytes]:
        """Visible files: relative path to content."""
        paths = [path for path in self.folder.rglob("*") if path.is_file()]
        named = {str(path.relative_to(self.folder)): path for path in paths}
        return {name: path.read_bytes() for name, path in named.items() if "/." not in f"/{name}"}

    def hidden(self) -> list[str]:
        """Names of hidden files and folders."""
        return [path.name for path in self.folder.rglob(".*")]


class Harness:
    """Runs the command in forked processes, with a fault or without."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        import totalfast.preview.page as page
        import totalfast.run.pipeline as pipeline
        from totalfast.run.context import RunContext
        from totalfast.upstream import CLASS_MAPS

        os.environ["TOTALSEG_HOME_DIR"] = str(args.home)
        self.folder, self.rescue = folder, folder / "rescue"
        os.environ["TOTALFAST_RESCUE_DIR"] = str(self.rescue)
        self.library = ctypes.CDLL(os.environ["FAULT_LIBRARY"])
        self.library.fault_calls.restype = ctypes.c_long
        self.library.fault_last.restype = ctypes.c_char_p
        self.library.fault_watch(os.fsencode(folder / "watched"))
        classes = list(CLASS_MAPS["total"].values())[: args.classes]
        subset = [] if args.classes >= len(CLASS_MAPS["total"]) else ["-rs", *classes]
        self.words = ["-i", str(args.scan), "-d", "cpu", "--backend", "torch", *subset]
        label_map = self._label_map(args)
        pipeline.label = lambda *arguments: label_map
        RunContext.start_loading = lambda *arguments: None
        page.draw_preview = self._once(page.draw_preview)

    def _once(self, draw: Callable[..., Any]) -> Callable[..., Any]:
        """Draw the first picture only; drawing takes longer than all the rest."""
        pictures: list[Any] = []

        def draw_once(*arguments: Any, **keywords: Any) -> Any:
            if not pictures:
                pictures.append(draw(*arguments, **keywords))
            return pictures[0]

        return draw_once

    def _label_map(self, args: argparse.Namespace) -> Any:
        """Compute the label map in another process, because this one is forked later."""
        import nibabel as nib
        import numpy as np

        from totalfast.run.restoring import LabelMap

        path = self.folder / "label_map.nii"
        command = [sys.executable, "-m", "totalfast", *self.words, "-o", str(path), "-ml"]
        subprocess.run(command, check=True, capture_output=True)
        image = nib.load(path)
        labels = np.asarray(image.dataobj)
        return LabelMap(image=nib.Nifti1Image(labels, image.affine, image.header))

    def run(self, place: Place, number: int, fault: tuple[int, int, int]) -> tuple[int, str, int]:
        """Run with a fault at a call; return exit code, stderr and the number of calls."""
        log, count = self.folder / "log", self.folder / "count"
        count.write_text("0")
        child = os.fork()
        if not child:
            try:
                self._child(place, number, fault, log, count)
            finally:  # never back into the parent's code
                traceback.print_exc()
                os._exit(99)
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status), log.read_text(), int(count.read_text())

    def _child(
        self, place: Place, number: int, fault: tuple[int, int, int], log: Path, count: Path
    ) -> None:
        from totalfast.cli.main import main as command

        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 2)
        os.dup2(descriptor, 1)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
        what, twice, ever = fault
        self.library.fault_at(ctypes.c_long(number), what, twice, ever)
        code = command([*self.words, *place.words])
        sys.stderr.flush()
        count.write_text(str(self.library.fault_calls()))
        os._exit(code)


def inject(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Inject all faults; return counts and what was wrong."""
    from totalfast.cli.main import main as command

    harness = Harness(args, folder)
    none, reference = (0, 0, 0), Place(folder=folder / "watched/reference")
    (reference.folder / "other").mkdir(parents=True)
    # In this process, so that forked ones need not import anything.
    if command([*harness.words, *reference.words]):
        sys.exit("the run without a fault failed")
    expected = set(reference.files())
    outcomes: Counter[str] = Counter()
    wrong: list[str] = []
    injections: dict[str, int] = {}
    run_folder = folder / "watched/run"
    began = time.perf_counter()
    for scenario in ("new folder", "old results"):
        for name in args.faults:
            _, _, calls = harness.run(prepared(run_folder, scenario, expected), 0, none)
            for number in range(1, calls + 1):
                place = prepared(run_folder, scenario, expected)
                shutil.rmtree(harness.rescue, ignore_errors=True)
                before = place.files()
                code, messages, _ = harness.run(place, number, FAULTS[name])
                outcome, faults = judge(harness, place, before, expected, name, code, messages)
                second, text, _ = harness.run(place, 0, none)
                if second or set(place.files()) != expected or place.hidden():
                    faults.append(f"the second run: exit code {second}, {text[-200:]}")
                if is_old(place.files()):
                    faults.append("the second run left old files")
                outcomes[f"{scenario}, {name}: {outcome}"] += 1
                wrong += [f"{scenario}, {name}, call {number}: {text}" for text in faults]
            injections[f"{scenario}, {name}"] = calls
            print(f"{scenario}, {name}: {calls} calls, {len(wrong)} wrong so far", flush=True)
    return {
        "injections": {"total": sum(injections.values()), **injections},
        "outcomes": dict(sorted(outcomes.items())),
        "wrong": wrong,
        "files of a run": len(expected),
        "seconds": round(time.perf_counter() - began),
    }


def prepared(folder: Path, scenario: str, names: set[str]) -> Place:
    """Make the folder of a run, with old results or without."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "other").mkdir(parents=True)
    if scenario == "old results":
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(OLD)
    return Place(folder=folder)


def is_old(files: dict[str, bytes]) -> bool:
    """Whether any file is one of the old results."""
    return any(content == OLD for content in files.values())


def judge(
    harness: Harness,
    place: Place,
    before: dict[str, bytes],
    expected: set[str],
    fault: str,
    code: int,
    messages: str,
) -> tuple[str, list[str]]:
    """Return the outcome in a few words, and everything that is wrong with it."""
    files, hidden = place.files(), place.hidden()
    new = {name for name, content in files.items() if content != OLD}
    unchanged, complete = files == before, new == expected == set(files)
    wrong = []
    if new and len(new) < len(files):
        wrong.append(f"{len(new)} new files and {len(files) - len(new)} old ones")
    killed = fault == "SIGKILL" and code == SIGNAL_CODES[fault]
    if killed:
        if not unchanged and not complete and not hidden:
            wrong.append("a part of the files, and no journal")
        return ("killed: " + state(unchanged, complete)), wrong
    if not unchanged and not complete:
        wrong.append(f"{len(files)} files, of which {len(new)} are new")
    if hidden and "can't delete the temporary folder" not in messages:
        wrong.append(f"left {hidden}")
    last = re.split(r"[\r\n]+", messages.strip())[-1]
    if "Traceback" in messages:
        wrong.append("a traceback")
    if code == 0:
        if not complete:
            wrong.append("exit code 0 without all files")
        return f"exit code 0, {state(unchanged, complete)}", wrong
    if fault in SIGNAL_CODES:
        if code != SIGNAL_CODES[fault]:
            wrong.append(f"exit code {code}")
        if not last.endswith(COMPLETE if complete else HALF):
            wrong.append(f"the last line is not true: {last}")
        return f"interrupted, {state(unchanged, complete)}", wrong
    if not last.startswith("ERROR: "):
        wrong.append(f"no error line: {last}")
    return errors_outcome(harness, expected, last, state(unchanged, complete), wrong)


def errors_outcome(
    harness: Harness, expected: set[str], last: str, files: str, wrong: list[str]
) -> tuple[str, list[str]]:
    """Check an error's line, and the rescue folder that it may name."""
    named = re.search(r"complete in (\S+);", last)
    kept = [path for path in harness.rescue.rglob("*") if path.is_file()]
    if named is None:
        if kept:
            wrong.append("files in the rescue folder, which the error does not name")
        return f"error, {files}", wrong
    if {path.name for path in kept} != {Path(name).name for name in expected}:
        wrong.append(f"{len(kept)} of {len(expected)} files in the rescue folder")
    return f"error, {files}, rescued", wrong


def state(unchanged: bool, complete: bool) -> str:  # noqa: FBT001 - two plain facts
    """Describe the visible files."""
    if complete:
        return "all files new"
    return "as before" if unchanged else "a part, with a journal"


if __name__ == "__main__":
    main()
