"""Model how many scans a batch does in an hour, and what 1,000 scans cost, on several machines.

    python scripts/model_throughput.py HOME --scan FILE --json FILE [--cases 6] [-- FLAGS ...]

HOME holds weights, such as the stand-ins of scripts/make_standin_weights.py. One batch is measured
here: its manifest tells how long the networks ran and how long everything else took. The rest is a
model, not a measurement:

- A batch overlaps the networks with all other work, so a scan takes as long as the longer of both.
- On ``cores``, networks run ``NETWORK_SCALING`` of the ideal times faster in workers of up to 8
  cores, and other work ``OTHER_SCALING``.
- On a GPU the networks take ``--gpu-seconds``, which was measured on one (results/gpu.json).
- Machines share nothing, so their throughputs add up; each costs what ``MACHINES`` says. Prices are
  round figures for rented machines, in euros per hour; put in your own.

Disks, networks, downloads, starting machines, and scans of other sizes are not in the model.
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
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.benchmark_command import WEIGHTS, machine, make_scan, parse_with_flags

NETWORK_SCALING, OTHER_SCALING = 0.8, 0.7
"""Share of the ideal speed-up with the number of cores."""

MACHINES = {
    "laptop, 8 cores": {"cores": 8, "gpu": False, "count": 1, "euros_per_hour": None},
    "server, 16 cores": {"cores": 16, "gpu": False, "count": 1, "euros_per_hour": 0.6},
    "one GPU (H200), 16 cores": {"cores": 16, "gpu": True, "count": 1, "euros_per_hour": 3.5},
    "100 machines of 4 cores": {"cores": 4, "gpu": False, "count": 100, "euros_per_hour": 0.15},
}
"""Name to its cores, whether networks run on its GPU, how many there are, and the price of one."""


def measure(home: Path, scan: Path, cases: int, flags: list[str], scratch: Path) -> dict[str, Any]:
    """Run a batch over copies of a scan; return seconds a scan, of the networks and of the rest."""
    scans = scratch / "scans"
    scans.mkdir()
    for number in range(cases):
        shutil.copy(scan, scans / f"{number}.nii.gz")
    command = [sys.executable, "-m", "totalfast", "batch", "-i", str(scans)]
    command += ["-o", str(scratch / "out"), "-d", "cpu", "--quiet", *flags]
    before, began = os.times(), time.perf_counter()
    environment = {**os.environ, "TOTALSEG_HOME_DIR": str(home.absolute())}
    subprocess.run(command, env=environment, check=True)
    wall, after = time.perf_counter() - began, os.times()
    cpu = after.children_user + after.children_system
    cpu -= before.children_user + before.children_system
    lines = (scratch / "out" / "manifest.jsonl").read_text().splitlines()
    entries = [entry for entry in map(json.loads, lines) if "name" in entry]
    network = sum(entry["seconds"]["Predicting"] for entry in entries)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cases": cases,
        "cores": cores,
        "wall_s": round(wall / cases, 2),
        "network_s": round(network / cases, 2),
        "other_cpu_s": round(max(cpu - network * (cores or 1), 0.0) / cases, 2),
        "network_share_of_wall": round(network / wall, 3),
    }


def model(measured: dict[str, Any], gpu_s: float | None) -> dict[str, dict[str, Any]]:
    """Compute throughput and costs of each machine."""
    found = {}
    for name, each in MACHINES.items():
        faster = each["cores"] / measured["cores"]
        network = measured["network_s"] / max(faster * NETWORK_SCALING, 1.0)
        if each["gpu"]:
            if gpu_s is None:
                continue
            network = gpu_s
        other = measured["other_cpu_s"] / (each["cores"] * OTHER_SCALING)
        if not each["gpu"]:
            network += other  # both need the same cores
        seconds = max(network, other)
        per_hour = each["count"] * 3600 / seconds
        price = each["euros_per_hour"]
        euros = None if price is None else round(1000 * price * each["count"] / per_hour, 2)
        found[name] = {
            "seconds_a_scan": round(seconds, 2),
            "scans_an_hour": round(per_hour),
            "euros_per_1000_scans": euros,
            "bound_by": "networks" if network >= other else "reading, resampling and writing",
        }
    return found


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("home", type=Path, help="TOTALSEG_HOME_DIR with stand-in weights")
    parser.add_argument("--scan", required=True, help="a file, or phantom:XxYxZ:SPACING")
    parser.add_argument("--json", type=Path, required=True, help="write the results to this file")
    parser.add_argument("--cases", type=int, default=6)
    parser.add_argument("--gpu-seconds", type=float, help="of a scan's networks on a GPU")
    options = parse_with_flags(parser)
    with tempfile.TemporaryDirectory(prefix="totalfast-model-") as folder:
        scratch = Path(folder)
        scan = make_scan(options.scan, scratch)
        measured = measure(options.home, scan, options.cases, options.flags, scratch)
    result = {
        "weights": WEIGHTS,
        "scan": options.scan if options.scan.startswith("phantom:") else "a file",
        "flags": " ".join(options.flags),
        "measured_a_scan": measured,
        "gpu_network_s": options.gpu_seconds,
        "assumed": {
            "network_scaling": NETWORK_SCALING,
            "other_scaling": OTHER_SCALING,
            "machines": MACHINES,
        },
        "model_not_measured": model(measured, options.gpu_seconds),
        "machine": machine(),
    }
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["model_not_measured"], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
