"""Run every parity case: the real TotalSegmentator command against totalfast, file by file.

    python scripts/parity_matrix.py HOME [--only TEXT ...] [--json FILE]

HOME holds tiny stand-in weights (scripts/make_standin_weights.py HOME --tiny); weights for tasks
that look at a head are added below HOME/head. The public scans are found through
TOTALFAST_TEST_DATA. Exit code 1 if anything differs.
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
    make_head,
    make_small_v3,
    run_pair,
)


def failures(case: Case, result: Comparison) -> list[str]:
    """What makes a pair fail: differences, or a label map that proves little."""
    found = list(result.problems)
    if result.differing_voxels:
        found.append(f"{result.differing_voxels} voxels differ")
    if not result.classes and not case.finds_nothing and "-ss" not in case.flags:
        found.append("nothing was found")
    if case.structured and (result.classes < MINIMUM_CLASSES or result.boundary > MAXIMUM_BOUNDARY):
        found.append("the label map is not structured")
    return found


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("home", type=Path, help="TOTALSEG_HOME_DIR with tiny stand-ins")
    parser.add_argument(
        "--only", nargs="+", default=[""], help="run cases whose name has one of these"
    )
    parser.add_argument("--rest", action="store_true", help="only what the tests do not run")
    parser.add_argument("--jobs", type=int, default=1, help="pairs at a time")
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args()
    rows, failed = [], 0
    home = options.home.absolute()
    make_head(home)
    make_small_v3(home)
    with (
        tempfile.TemporaryDirectory(prefix="totalfast-parity-") as scratch,
        ThreadPoolExecutor(options.jobs) as pool,
    ):
        scans = Path(scratch) / "scans"
        scans.mkdir()
        wanted = [
            (case, input_file(case.scan, scans))
            for case in all_cases()
            if any(text in case.name for text in options.only) and not (options.rest and case.in_ci)
        ]
        skipped = [case.name for case, scan in wanted if scan is None]
        pairs = [(case, scan) for case, scan in wanted if scan is not None]

        def run(number: int) -> Comparison:
            case, scan = pairs[number]
            try:
                return run_pair(case, scan, home, Path(scratch) / str(number))
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
