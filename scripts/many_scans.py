"""Segment hundreds of tiny scans in one batch, some of them damaged, and watch the memory.

    python scripts/many_scans.py HOME --json FILE [--scans 500]

HOME holds weights, such as the stand-ins of scripts/make_standin_weights.py. Seven scans are
damaged, each in another way. The results are how many cases are done, which failed and why, and the
process's memory (RSS) at ten moments of the batch, by the number of cases that were done.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.benchmark_command import WEIGHTS, machine

FLAGS = ["--fastest", "-ml", "--statistics", "-d", "cpu", "--json"]

MOMENTS = 10


def write_scans(folder: Path, count: int) -> list[str]:
    """Write tiny scans; return the names of the seven damaged ones."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(count):
        values = random.normal(0, 300, (24, 22, 20)).astype(np.int16)
        image = nib.Nifti1Image(values, np.diag([2.0, 2.0, 3.0, 1.0]))
        nib.save(image, folder / f"scan{number:03d}.nii.gz")
    places = [folder / f"scan{number * count // 7:03d}.nii.gz" for number in range(7)]
    empty, cut, text, packed, flat, many_axes, checksum = places
    whole = cut.read_bytes()
    empty.write_bytes(b"")
    cut.write_bytes(whole[: len(whole) // 2])
    text.write_text("this is no scan")
    packed.write_bytes(gzip.compress(b"nor is this"))
    nib.save(nib.Nifti1Image(np.zeros((24, 22), np.int16), np.eye(4)), flat)
    nib.save(nib.Nifti1Image(np.zeros((9, 9, 9, 2, 3), np.int16), np.eye(4)), many_axes)
    content = bytearray(checksum.read_bytes())
    content[-7] ^= 0xFF
    checksum.write_bytes(content)
    return [path.name.removesuffix(".nii.gz") for path in places]


def run_batch(home: Path, scans: Path, output: Path, count: int) -> dict[str, Any]:
    """Run the batch; read its events, and its memory as cases end."""
    command = [sys.executable, "-m", "totalfast", "batch", "-i", str(scans), "-o", str(output)]
    environment = {**os.environ, "TOTALSEG_HOME_DIR": str(home.absolute())}
    began, ended = time.perf_counter(), 0
    memory: dict[int, float] = {}
    failed: dict[str, str] = {}
    process = subprocess.Popen(
        [*command, *FLAGS], env=environment, stdout=subprocess.PIPE, text=True
    )
    watched = psutil.Process(process.pid)
    for line in process.stdout or ():
        event = json.loads(line)
        if event["event"] != "case":
            continue
        ended += 1
        if event["error"]:
            failed[event["name"]] = event["error"]
        if ended % (count // MOMENTS) == 0:
            memory[ended] = round(watched.memory_info().rss / 1e6)
    return {
        "exit_code": process.wait(),
        "seconds": round(time.perf_counter() - began, 1),
        "done": len(list(output.glob("*/segmentation.nii.gz"))),
        "failed": dict(sorted(failed.items())),
        "memory_mb_by_ended_cases": memory,
    }


def main() -> int:
    """Command line; 1 if a case is lost, or an undamaged one failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("home", type=Path, help="TOTALSEG_HOME_DIR with stand-in weights")
    parser.add_argument("--json", type=Path, required=True, help="write the results to this file")
    parser.add_argument("--scans", type=int, default=500)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="totalfast-many-") as folder:
        scans, output = Path(folder) / "scans", Path(folder) / "out"
        damaged = write_scans(scans, args.scans)
        found = run_batch(args.home, scans, output, args.scans)
    result = {
        "weights": WEIGHTS,
        "scans": args.scans,
        "damaged": damaged,
        "flags": " ".join(FLAGS),
        **found,
        "machine": machine(),
    }
    args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    return int(found["done"] != args.scans - len(damaged) or sorted(found["failed"]) != damaged)


if __name__ == "__main__":
    sys.exit(main())
