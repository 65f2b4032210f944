"""Time a run with ``--guided`` and one without, in turn, and watch their memory.

    python scripts/benchmark_guided.py HOME --json scripts/results/guided_time.json

HOME holds stand-ins of the official size for models 291 to 295 (scripts/make_standin_weights.py).
The model of ``totalfast demo``, which was trained on phantoms like this scan, guides. What it finds
decides how many tiles are saved; the time of a tile does not depend on the weights. Labels are
compared by ``measure_guided.py``, with trained networks.
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
import time
from pathlib import Path
from typing import Any

import nibabel as nib
from benchmark_command import WEIGHTS, Watch, command, machine, make_scan
from readme import write_table

from totalfast.cli.demo import MODEL as DEMO

SCANS = ("phantom:488x404x336:0.75x0.75x1", "phantom:512x512x336:0.98x0.98x1")
"""The scan of the other benchmarks, which the body fills, and a field of view of 500 mm."""

RUNS: dict[str, list[str]] = {"full": [], "guided": ["--guided"]}


def link_models(source: Path, home: Path) -> None:
    """Put the five models and the guide into a folder of models."""
    results = home / "nnunet" / "results"
    results.mkdir(parents=True)
    models = [path for path in (source / "nnunet" / "results").glob("Dataset29[1-5]_*")]
    for path in [*models, *DEMO.glob("Dataset297_*")]:
        (results / path.name).symlink_to(path.absolute())


def run_once(scan: Path, output: Path, flags: list[str], home: Path) -> dict[str, Any]:
    """Run the command in a new process."""
    began = time.perf_counter()
    process = subprocess.Popen(
        command("totalfast", scan, output, flags),
        env={**os.environ, "TOTALSEG_HOME_DIR": str(home)},
        stdout=subprocess.PIPE,
        text=True,
    )
    watch = Watch(process, share=0.05)
    log = process.communicate()[0]
    if process.returncode:
        raise RuntimeError(f"{flags} failed:\n{log}")
    found = re.search(r"Guided: (\d+) of (\d+) tiles", log)
    return {
        "wall_s": round(time.perf_counter() - began, 2),
        "peak_bytes": watch.peak_bytes,
        "tiles": [int(number) for number in found.groups()] if found else None,
    }


def measure(description: str, home: Path, repeats: int) -> dict[str, Any]:
    """Run both in turn on one scan."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in RUNS}
    with tempfile.TemporaryDirectory() as name:
        scan = make_scan(description, Path(name))
        for repeat in range(repeats):
            for kind, flags in RUNS.items():
                output = Path(name) / f"{kind}{repeat}"
                runs[kind].append(run_once(scan, output, flags, home))
                print(description, kind, runs[kind][-1], flush=True)
        image = nib.load(scan)
        spacing = [round(float(mm), 2) for mm in image.header.get_zooms()]
    return {
        "scan": description,
        "field_of_view_mm": [round(n * mm) for n, mm in zip(image.shape, spacing, strict=True)],
        "runs": runs,
        "median_s": {
            kind: statistics.median(run["wall_s"] for run in own) for kind, own in runs.items()
        },
    }


def table(result: dict[str, Any]) -> str:
    """Return a JSON's content as Markdown."""
    lines = ["| field of view | tiles | full | guided | peak memory |", "|---|---|---|---|---|"]
    for case in result["cases"]:
        few, many = case["runs"]["guided"][-1]["tiles"]
        peaks = [
            max(run["peak_bytes"] for run in case["runs"][kind]) / 1e9
            for kind in ("full", "guided")
        ]
        lines.append(
            f"| {' x '.join(map(str, case['field_of_view_mm']))} mm | {few} of {many} | "
            f"{case['median_s']['full']:.0f} s | {case['median_s']['guided']:.0f} s | "
            f"{peaks[0]:.1f} GB, {peaks[1]:.1f} GB |"
        )
    hardware = result["machine"]
    lines += [
        "",
        f"1.5 mm, one mask per class, default backend; {result['weights']}, and the model of "
        f"`totalfast demo` as guide; {hardware['cores']} cores of {hardware['processor']}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("home", type=Path)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--readme", action="store_true", help="also write the table in scripts/results"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        link_models(options.home, Path(name))
        cases = [measure(scan, Path(name), options.repeats) for scan in SCANS]
    result = {"weights": WEIGHTS, "machine": machine(), "cases": cases}
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))
    if options.readme:
        write_table(Path(__file__).name, table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
