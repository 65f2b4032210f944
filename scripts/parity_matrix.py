"""Run all parity cases: the TotalSegmentator command and totalfast, compared file by file.

    python scripts/parity_matrix.py HOME [--only TEXT ...] [--json FILE] [--device gpu]

HOME contains tiny stand-in weights (scripts/make_standin_weights.py HOME --tiny). The script adds
weights for tasks of the head in HOME/head. TOTALFAST_TEST_DATA names the folder of the public
scans. The exit code is 1 if there is a difference. On a GPU a few voxels differ between any two
runs of upstream, too; tests/cuda measures that.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.parity.matrix import (
    MAXIMUM_BOUNDARY,
    MINIMUM_CLASSES,
    Case,
    Comparison,
    all_cases,
    input_file,
    make_head_weights,
    make_small_v3_weights,
    run_pair,
)


def failures(case: Case, result: Comparison) -> list[str]:
    """Return the reasons why a pair fails: differences, or too little structure."""
    reasons = list(result.problems)
    if result.differing_voxels:
        reasons.append(f"{result.differing_voxels} voxels differ")
    if not result.classes and not case.expects_empty and "-ss" not in case.flags:
        reasons.append("the label map is empty")
    if case.structured and (result.classes < MINIMUM_CLASSES or result.boundary > MAXIMUM_BOUNDARY):
        reasons.append("the label map is not structured")
    return reasons


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("home", type=Path, help="TOTALSEG_HOME_DIR with tiny stand-ins")
    parser.add_argument(
        "--only", nargs="+", default=[""], help="run cases whose name contains one of these texts"
    )
    parser.add_argument(
        "--rest", action="store_true", help="run only cases that the tests do not run"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, help="number of pairs to run at the same time"
    )
    parser.add_argument("--device", default="cpu", help="cpu, gpu or gpu:X; default: %(default)s")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    options = parser.parse_args()
    rows, failed = [], 0
    home = options.home.absolute()
    make_head_weights(home)
    make_small_v3_weights(home)
    with (
        tempfile.TemporaryDirectory(prefix="totalfast-parity-") as scratch,
        ThreadPoolExecutor(options.jobs) as pool,
    ):
        scans = Path(scratch) / "scans"
        scans.mkdir()
        selected = [
            (case, input_file(case.scan, scans))
            for case in all_cases()
            if any(text in case.name for text in options.only) and not (options.rest and case.in_ci)
        ]
        skipped = [case.name for case, scan in selected if scan is None]
        pairs = [(case, scan) for case, scan in selected if scan is not None]

        def run(number: int) -> Comparison:
            case, scan = pairs[number]
            try:
                return run_pair(
                    case, scan, home, Path(scratch) / str(number), device=options.device
                )
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                return Comparison(case.name, problems=[str(error)])

        for (case, _), result in zip(pairs, pool.map(run, range(len(pairs))), strict=True):
            problems = failures(case, result)
            failed += bool(problems)
            rows.append({**dataclasses.asdict(result), "failures": problems})
            print(
                f"{'FAIL' if problems else 'ok  '} {case.name:<34} "
                f"{result.differing_voxels:>6} of {result.voxels:>10} voxels differ, "
                f"{result.classes:>3} classes, {result.boundary:6.1%} boundary, "
                f"{result.upstream_s:5.1f} s -> {result.totalfast_s:4.1f} s",
                *problems[:3],
                flush=True,
            )
    print(f"{len(rows)} pairs run, {failed} failed; skipped: {', '.join(skipped) or 'none'}")
    if options.json:
        for row in rows:
            del row["totalfast_stdout"]
        options.json.write_text(json.dumps({"pairs": rows, "skipped": skipped}, indent=1) + "\n")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
