"""Wall time and peak memory over the number of slices, for both programs.

    python scripts/benchmark_scaling.py HOME --json FILE [--slices 100 300 ...]
        [--programs totalfast upstream] [--flags "--fast -ml"] [--limit-gb 20] [--plot FILE.png]
        [--readme]

Each program segments synthetic CTs with slices of 512x512 voxels as a whole process. The results
are merged into FILE, so the cases can be run in several calls. A program is stopped if its memory
exceeds the limit. A program that failed or was stopped is not run on more slices with the same
flags; the failure is kept as a result. The table also shows totalfast's own estimate of its memory.
HOME: stand-in weights from make_standin_weights.py.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmark_command import PROGRAMS, SAMPLE_S, Watch, command, machine, make_scan
from readme import write_table

SLICES = (100, 300, 531, 800, 1100, 1500)
FLAGS = ("--fast -ml", "-ml")
SPACING = "0.75x0.75x1"
PLANNED = re.compile(rb"Memory: about ([0-9.]+) GB")
"""totalfast's estimate of its memory, which it prints before the run."""

SETTLE_S = 5.0
"""Pause before each run, so that the system can free the memory of the previous run."""


def measure(words: list[str | Path], home: Path, limit_gb: float) -> dict[str, Any]:
    """Run a command; return seconds, peak bytes of its process tree, and how it ended."""
    time.sleep(SETTLE_S)
    environment = {**os.environ, "TOTALSEG_HOME_DIR": str(home.absolute())}
    environment["TOTALFAST_BACKEND"] = "torch"
    began = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        # A new process group, so that upstream's worker processes can be stopped too.
        process = subprocess.Popen(
            words, env=environment, stdout=output, stderr=subprocess.DEVNULL, start_new_session=True
        )
        watch, ended = Watch(process), "finished"
        while process.poll() is None:
            time.sleep(SAMPLE_S)
            if watch.peak_bytes > limit_gb * 1e9 and ended == "finished":
                ended = f"stopped above {limit_gb:g} GB"
                os.killpg(process.pid, 9)
        seconds = time.perf_counter() - began
        output.seek(0)
        planned = PLANNED.search(output.read())
    if process.returncode and ended == "finished":
        ended = f"failed with exit code {process.returncode}"
    measured = {"wall_s": seconds, "peak_bytes": watch.peak_bytes, "ended": ended}
    return measured | ({"planned_gb": float(planned[1])} if planned else {})


def load(path: Path) -> dict[str, Any]:
    """Return the earlier results, or an empty result."""
    if path.exists():
        content: dict[str, Any] = json.loads(path.read_text())
        return content
    return {"weights": "tiny stand-ins (scripts/make_standin_weights.py)", "runs": []}


def failed_on_fewer_slices(runs: list[dict[str, Any]], case: dict[str, Any]) -> bool:
    """Whether the program failed or was stopped on fewer slices."""
    return any(
        run["ended"] != "finished"
        and run["slices"] < case["slices"]
        and all(run[key] == case[key] for key in ("program", "flags"))
        for run in runs
    )


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Plot seconds and gigabytes over slices; a cross marks a run that failed or was stopped."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    all_flags = sorted({run["flags"] for run in runs})
    figure, panels = plt.subplots(
        len(all_flags), 2, figsize=(9, 3 * len(all_flags)), layout="constrained", squeeze=False
    )
    for row, flags in zip(panels, all_flags, strict=True):
        for panel, key, scale, unit in (
            (row[0], "wall_s", 1.0, "seconds"),
            (row[1], "peak_bytes", 1e9, "peak memory, GB"),
        ):
            for program, colour in (("upstream", "tab:gray"), ("totalfast", "tab:blue")):
                series = [run for run in runs if (run["flags"], run["program"]) == (flags, program)]
                series.sort(key=lambda run: run["slices"])
                for ended, style in ((False, "o-"), (True, "x")):
                    points = [run for run in series if (run["ended"] != "finished") == ended]
                    panel.plot(
                        [run["slices"] for run in points],
                        [run[key] / scale for run in points],
                        style,
                        color=colour,
                        label=program if not ended else None,
                    )
            panel.set(xlim=(0, None), ylim=(0, None), ylabel=unit, title=flags)
            panel.grid(alpha=0.3)
    for panel in panels[-1]:
        panel.set_xlabel("slices of 512x512")
    panels[0][0].legend()
    figure.savefig(path, dpi=110)


def table(result: dict[str, Any]) -> str:
    """Return seconds and gigabytes by slices, one column per program and set of flags."""
    runs = result["runs"]
    columns = sorted({(run["flags"], run["program"]) for run in runs}, reverse=True)
    titles = [f"`{flags}`, {program}" for flags, program in columns]
    lines = [f"| slices | {' | '.join(titles)} |", "|---" * (1 + len(columns)) + "|"]
    for slices in sorted({run["slices"] for run in runs}):
        row = {(run["flags"], run["program"]): run for run in runs if run["slices"] == slices}
        cells = [cell(row.get(column)) for column in columns]
        lines.append(f"| {slices} | {' | '.join(cells)} |")
    machine = result["machine"]
    lines += [
        "",
        f"Slices of 512x512 voxels of {SPACING} mm, {result['weights']}; one run each. In "
        f"brackets: totalfast's own estimate of the peak, in GB. {machine['cores']} cores of "
        f"{machine['processor']}, {machine['memory_gb']} GB.",
    ]
    return "\n".join(lines) + "\n"


def cell(run: dict[str, Any] | None) -> str:
    """Return one run as a cell of the table; empty if there is no such run."""
    if run is None:
        return ""
    if run["ended"] != "finished":
        return str(run["ended"])
    planned = f" ({run['planned_gb']:.1f})" if "planned_gb" in run else ""
    return f"{run['wall_s']:.0f} s, {run['peak_bytes'] / 1e9:.1f} GB{planned}"


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("home", type=Path, help="TOTALSEG_HOME_DIR with stand-in weights")
    parser.add_argument(
        "--json", type=Path, required=True, help="file to which the results are added"
    )
    parser.add_argument("--slices", type=int, nargs="*", default=list(SLICES))
    parser.add_argument("--programs", nargs="*", choices=list(PROGRAMS), default=list(PROGRAMS))
    parser.add_argument(
        "--flags",
        nargs="*",
        default=list(FLAGS),
        help='one or more sets of flags, such as "--fast -ml"',
    )
    parser.add_argument("--limit-gb", type=float, default=20.0)
    parser.add_argument("--plot", type=Path, metavar="PICTURE", help="plot all results of the file")
    parser.add_argument(
        "--readme", action="store_true", help="also write the table in scripts/results"
    )
    options = parser.parse_args()
    result = load(options.json)
    result["machine"] = machine()
    with tempfile.TemporaryDirectory(prefix="totalfast-scaling-") as scratch:
        for slices in sorted(options.slices):
            scan = make_scan(f"phantom:512x512x{slices}:{SPACING}", Path(scratch))
            for flags in options.flags:
                for program in options.programs:
                    case = {"slices": slices, "flags": flags, "program": program}
                    if failed_on_fewer_slices(result["runs"], case):
                        continue
                    target = Path(scratch) / "out" / "seg.nii.gz"
                    words = command(program, scan, target, flags.split())
                    case |= measure(words, options.home, options.limit_gb)
                    result["runs"] = [
                        run
                        for run in result["runs"]
                        if any(run[key] != case[key] for key in ("slices", "flags", "program"))
                    ] + [case]
                    options.json.write_text(json.dumps(result, indent=1) + "\n")
                    print(case, flush=True)
    if options.plot:
        plot(result["runs"], options.plot)
    if options.readme:
        write_table(Path(__file__).name, table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
