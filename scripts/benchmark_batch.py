"""Time many scans: a loop over upstream, over totalfast, over a server's commands, and a batch.

    python scripts/benchmark_batch.py HOME --json FILE [--repeats N] [--scale 0.5] [--tiny]
        [-- FLAGS ...]

HOME holds weights, such as the stand-ins of scripts/make_standin_weights.py. The scans are
synthetic, of three sizes (``SIZES``, all smaller with --scale); scans of one size are copies. The
ways run in turn on the same scans, each as one shell command that is timed from its start to its
end:

- upstream: a shell loop, one TotalSegmentator command per scan;
- totalfast: a shell loop, one totalfast command per scan;
- batch: one ``totalfast batch``;
- server: ``totalfast serve`` is started, a shell loop runs one command per scan, and the server is
  stopped; left out where there are no Unix sockets.

An untimed batch comes first, because the first run after an installation compiles code.

The results are wall and CPU seconds, the peak memory of the process tree (PSS, sampled while the
ways are timed), and the voxels that differ from upstream's. For the batch, its manifest gives the
share of the time in which a network ran, from the batch's start and from the first network's.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.benchmark_command import PROGRAMS, WEIGHTS, machine, make_scan, parse_with_flags, run
from tests.parity.matrix import voxels_of

SIZES = {
    "small": ((96, 96, 60), "3x3x5", 8),
    "medium": ((192, 192, 120), "2x2x3", 7),
    "large": ((320, 320, 200), "1.5x1.5x2", 5),
}
"""Name of a size to its voxels, their size in mm, and the number of scans."""

FLAGS = ["--fast"]

LABEL_MAP = "segmentation.nii.gz"
"""Name of the label map in the folder of a case, as the batch has it."""

SETTLE_S = 5.0
"""Pause before each way."""

SERVED = """
{python} -m totalfast serve --socket {socket} -d cpu --idle never --quiet &
server=$!
while ! test -S {socket}; do sleep 0.02; done
export TOTALFAST_SERVER={socket}
{loop}
kill $server
wait $server
"""


def make_scans(folder: Path, scale: float) -> dict[str, Any]:
    """Write the scans in the order of their names, in which the sizes alternate."""
    folder.mkdir()
    described, copies = {}, []
    for name, (shape, spacing, count) in SIZES.items():
        description = f"phantom:{'x'.join(str(round(n * scale)) for n in shape)}:{spacing}"
        one = make_scan(description, folder)
        one = one.rename(folder / f"{name}.part")
        described[name] = {"scan": description, "count": count, "bytes": one.stat().st_size}
        copies += [(index / count, one) for index in range(count)]
    for number, (_, one) in enumerate(sorted(copies)):
        shutil.copy(one, folder / f"{number:02d}-{one.stem}.nii.gz")
    for one in folder.glob("*.part"):
        one.unlink()
    return described


def loop(program: str, scans: Path, output: Path, flags: list[str]) -> str:
    """Return a shell loop that runs one command per scan."""
    words = f"-m {PROGRAMS[program]} -d cpu -ml {' '.join(flags)}"
    lines = []
    for scan in sorted(scans.iterdir()):
        folder = output / scan.name.removesuffix(".nii.gz")
        lines.append(f"mkdir -p {folder}")
        lines.append(f"{sys.executable} {words} -i {scan} -o {folder / LABEL_MAP} || exit 1")
    return "\n".join(lines)


def ways(scans: Path, scratch: Path, flags: list[str]) -> dict[str, list[str | Path]]:
    """Return the command of each way."""
    batch = [*(sys.executable, "-m", "totalfast", "batch", "-i", scans, "-o", scratch / "batch")]
    found: dict[str, list[str | Path]] = {
        "upstream": ["sh", "-c", loop("upstream", scans, scratch / "upstream", flags)],
        "totalfast": ["sh", "-c", loop("totalfast", scans, scratch / "totalfast", flags)],
        "batch": [*batch, "-ml", "-d", "cpu", *flags],
    }
    if os.name == "posix":
        served = loop("totalfast", scans, scratch / "server", flags)
        socket = scratch / "s.sock"
        text = SERVED.format(python=sys.executable, socket=socket, loop=f"({served}) || exit 1")
        found["server"] = ["sh", "-c", text]
    return found


def network_share(output: Path, wall_s: float) -> dict[str, Any]:
    """Read from a batch's manifest how long the networks ran, and which share of its time."""
    lines = [json.loads(line) for line in (output / "manifest.jsonl").read_text().splitlines()]
    entries = [line for line in lines if "name" in line]
    stages: dict[str, float] = {}
    for entry in entries:
        for stage, seconds in entry["seconds"].items():
            stages[stage] = stages.get(stage, 0.0) + seconds
    ends = sorted(datetime.fromisoformat(entry["finished"]).timestamp() for entry in entries)
    first = min(
        datetime.fromisoformat(entry["finished"]).timestamp()
        - sum(entry["seconds"].get(stage, 0.0) for stage in ("Predicting", "Restoring", "Saving"))
        for entry in entries
    )
    network_s = stages.get("Predicting", 0.0)
    return {
        "cases": len(entries),
        "network_s": network_s,
        "network_share_of_wall": network_s / wall_s,
        "network_share_since_the_first_network": network_s / (ends[-1] - first),
        "seconds_of_stages": {stage: round(seconds, 2) for stage, seconds in stages.items()},
    }


def differing(expected: Path, actual: Path) -> dict[str, int]:
    """Count the voxels that differ from upstream's label maps."""
    voxels = different = missing = 0
    for path in sorted(expected.glob(f"*/{LABEL_MAP}")):
        other = actual / path.relative_to(expected)
        one = voxels_of(nib.load(path))
        voxels += one.size
        if not other.exists():
            missing += 1
            continue
        different += int(np.count_nonzero(one != voxels_of(nib.load(other))))
    return {"voxels": voxels, "differing_voxels": different, "missing_label_maps": missing}


def benchmark(
    home: Path, *, repeats: int, flags: list[str], scale: float, scratch: Path
) -> dict[str, Any]:
    """Run all ways in turn, and compare their label maps."""
    scans = scratch / "scans"
    described = make_scans(scans, scale)
    environment = {**os.environ, "TOTALSEG_HOME_DIR": str(home.absolute())}
    environment |= {"TOTALFAST_BACKEND": "torch"}
    environment.pop("TOTALFAST_SERVER", None)
    commands = ways(scans, scratch, flags)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    batches = []
    run(commands["batch"], environment, timed=True, watched=False)
    for _ in range(repeats):
        for name, command in commands.items():
            shutil.rmtree(scratch / name, ignore_errors=True)
            done = run(command, environment, timed=True, watched=True, settle_s=SETTLE_S)
            runs[name].append(done)
            print(name, {key: round(value, 1) for key, value in done.items()}, flush=True)
        batches.append(network_share(scratch / "batch", runs["batch"][-1]["wall_s"]))
    medians = {
        name: {key: statistics.median(one[key] for one in each) for key in each[0]}
        for name, each in runs.items()
    }
    upstream_s = medians["upstream"]["wall_s"]
    return {
        "scans": described,
        "flags": " ".join(["-ml", "-d", "cpu", *flags]),
        "weights": WEIGHTS,
        "machine": machine(),
        "runs": runs,
        "median": medians,
        "times_faster_than_upstream": {
            name: upstream_s / each["wall_s"] for name, each in medians.items()
        },
        "networks_in_the_batch": batches,
        "compared_with_upstream": {
            name: differing(scratch / "upstream", scratch / name)
            for name in commands
            if name != "upstream"
        },
    }


def main() -> int:
    """Command line; 1 if a voxel differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("home", type=Path, help="TOTALSEG_HOME_DIR with stand-in weights")
    parser.add_argument("--json", type=Path, required=True, help="write the results to this file")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--scale", type=float, default=1.0, help="of the voxels along each axis")
    parser.add_argument("--tiny", action="store_true", help="note that the weights are tiny ones")
    options = parse_with_flags(parser)
    with tempfile.TemporaryDirectory(prefix="totalfast-batch-") as folder:
        result = benchmark(
            options.home,
            repeats=options.repeats,
            flags=options.flags or FLAGS,
            scale=options.scale,
            scratch=Path(folder),
        )
    if options.tiny:
        result["weights"] += ", with --tiny: their networks take almost no time"
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    for name, compared in result["compared_with_upstream"].items():
        print(f"{name}: {result['times_faster_than_upstream'][name]:.1f} times faster, {compared}")
    print(result["networks_in_the_batch"])
    compared = result["compared_with_upstream"].values()
    return int(any(one["differing_voxels"] or one["missing_label_maps"] for one in compared))


if __name__ == "__main__":
    sys.exit(main())
