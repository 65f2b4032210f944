"""Steps that run whole commands: upstream, totalfast, FastSegmentator, the tests."""

from __future__ import annotations

import re
import shutil
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .labels import differing
from .programs import command, measured, timed
from .record import DEVICE, ON_CPU, RESULTS, ROOT, SCAN, TINY_HOME, WORK, record


def step_fast() -> None:
    """--fast, one mask per class: upstream, and totalfast with cold and with warm caches."""
    base = WORK / "fast"
    rows: dict[str, Any] = {}
    for label in ("upstream", "totalfast_first", "totalfast"):
        rows[label] = timed(command(label, base / label, ["--fast"]))
        record.keep("fast_per_class", rows)
    with ThreadPoolExecutor(1) as pool:  # times no longer matter
        again = pool.submit(timed, command("upstream", base / "upstream_again", ["--fast"]))
        pairs = {
            "ours_vs_upstream": ("upstream", "totalfast"),
            "ours_vs_itself": ("totalfast_first", "totalfast"),
        }
        for name, (one, other) in pairs.items():
            rows[name] = differing(base / one, base / other)
            record.keep("fast_per_class", rows)
        if again.result().get("rc") == 0:
            rows["upstream_vs_itself"] = differing(base / "upstream", base / "upstream_again")
    record.keep("fast_per_class", rows)


def step_total() -> None:
    """1.5 mm, label map: totalfast with cold and with warm caches, and upstream."""
    base = WORK / "total"
    base.mkdir(exist_ok=True)
    rows: dict[str, Any] = {}
    for label in ("totalfast_first", "totalfast", "upstream"):
        rows[label] = timed(command(label, base / f"{label}.nii.gz", ["-ml"]))
        record.keep("total_ml", rows)
    rows["ours_vs_upstream"] = differing(base / "upstream.nii.gz", base / "totalfast.nii.gz")
    rows["ours_vs_itself"] = differing(base / "totalfast_first.nii.gz", base / "totalfast.nii.gz")
    record.keep("total_ml", rows)


def step_deterministic() -> None:
    """--fast twice with --deterministic and twice without: seconds and differing voxels."""
    base = WORK / "deterministic"
    base.mkdir(exist_ok=True)
    rows: dict[str, Any] = {}
    for name, flags in (("deterministic", ["--deterministic"]), ("default", [])):
        targets = [base / f"{name}{k}.nii.gz" for k in range(2)]
        for target in targets:
            row = timed(command("totalfast", target, ["--fast", "-ml", *flags]))
            rows.setdefault(name, []).append(row)
            record.keep("deterministic", rows)
        rows[f"{name}_vs_itself"] = differing(*targets)
    rows["deterministic_vs_default"] = differing(
        base / "deterministic0.nii.gz", base / "default0.nii.gz"
    )
    record.keep("deterministic", rows)


def step_search() -> None:
    """--fast and 1.5 mm with cuDNN's search for algorithms."""
    base = WORK / "search"
    base.mkdir(exist_ok=True)
    rows: dict[str, Any] = {}
    for name, flags in (("fast", ["--fast", "-ml"]), ("total", ["-ml"])):
        words = command("totalfast", base / f"{name}.nii.gz", flags)
        rows[name] = timed(words, variables={"TOTALFAST_CUDNN_SEARCH": "1"})
        record.keep("search", rows)
    rows["total_vs_without"] = differing(WORK / "total/totalfast.nii.gz", base / "total.nii.gz")
    record.keep("search", rows)


def step_cold() -> None:
    """Where the seconds of a --fast process go: lines with times, stages of the start, imports."""
    (model,) = RESULTS.glob("Dataset297_*/*")
    words = command("totalfast", WORK / "cold", ["--fast", "-v"])
    rows = {"start": measured("measure_parts.py", "start", DEVICE, model)}
    record.keep("cold", rows)
    rows["lines"] = timed(words, every_line=True)
    record.keep("cold", rows)
    imports = timed([words[0], "-X", "importtime", *words[1:]], every_line=True)
    rows["imports_ms"] = import_ms([text for _, text in imports.pop("lines", [])])
    record.keep("cold", rows)


def import_ms(lines: list[str]) -> dict[str, float]:
    """Milliseconds per package, of the slowest packages, from the lines of ``-X importtime``."""
    spent: Counter[str] = Counter()
    for line in lines:
        found = re.match(r"import time:\s+(\d+) \|\s+\d+ \|\s+([\w.]+)$", line)
        if found:
            spent[found[2].partition(".")[0]] += int(found[1])
    slowest = {name: round(microseconds / 1e3, 1) for name, microseconds in spent.most_common(14)}
    return {"all": round(sum(spent.values()) / 1e3, 1), **slowest}


def step_tests() -> None:
    """The tests with the marker ``cuda``, in the time that is left."""
    files = sorted(ROOT.glob("tests/cuda/test_*.py"))
    words = [
        sys.executable, "-m", "pytest", "-v", "-m", "cuda", "-p", "no:cacheprovider", "-W",
        "default", "--tb=short", "--maxfail=8", "--rootdir", ROOT, "-c", ROOT / "pyproject.toml",
        "--basetemp", WORK / "pytest", *files,
    ]  # fmt: skip
    variables = {"TOTALFAST_STANDIN_HOME": str(TINY_HOME)} if TINY_HOME.exists() else {}
    if ON_CPU:
        variables["TOTALFAST_CUDA_TESTS_ON"] = "cpu"
    row = timed(words, limit_s=400.0, every_line=True, variables=variables)
    lines = [text for _, text in row.pop("lines", [])]
    found = [re.search(r"(tests/cuda/\S.*?) (PASSED|FAILED|ERROR|SKIPPED)", text) for text in lines]
    rows = [{"test": match[1], "outcome": match[2]} for match in found if match]
    counts = Counter(test["outcome"] for test in rows)
    row |= {"counts": counts, "tests": rows, "last_lines": lines[-60:] if row.get("rc") else []}
    record.keep("tests", row)


def step_cucim() -> None:
    """Upstream's --fast with cucim, if it is installed, against upstream without it."""
    base = WORK / "fast"
    rows = {"upstream_cucim": timed(command("upstream, cucim", base / "cucim", ["--fast"]))}
    record.keep("cucim", rows)
    rows["cucim_vs_upstream"] = differing(base / "upstream", base / "cucim")
    record.keep("cucim", rows)


def step_peer() -> None:
    """FastSegmentator on the same scan and weights, 1.5 mm, twice, if it is installed."""
    folder, target = WORK / "peer-in", WORK / "peer-out"
    folder.mkdir(exist_ok=True)
    shutil.copy(SCAN, folder / "ct.nii.gz")
    start = "from fastsegmentator.cli import main; main()"
    words = [
        sys.executable, "-c", start, "totalseg", "-i", folder, "-o", target, "--task", "total",
        "--weights_dir", RESULTS,
    ]  # fmt: skip
    variables = {"CUDA_VISIBLE_DEVICES": ""} if ON_CPU else {}
    rows: dict[str, Any] = {}
    for label in ("first", "second"):
        rows[label] = timed(words, variables=variables)
        record.keep("fastsegmentator_total", rows)
    written: list[Path] = sorted(target.glob("*.nii.gz"))
    if written:
        rows["vs_upstream"] = differing(WORK / "total/upstream.nii.gz", written[0])
    record.keep("fastsegmentator_total", rows)
