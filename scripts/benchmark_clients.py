"""Run programs of others that use nnU-Net, alone and with ``python -m totalfast.patch``.

    python scripts/benchmark_clients.py FOLDER --json FILE [--only NAME ...] [--scale X]
        [--repeats N] [--nnunet VERSION] [--readme]

FOLDER is for the environment with the programs, which are installed from PyPI, and for the stand-in
weights (scripts/make_client_weights.py); an existing FOLDER is used again. Each program runs in
turn without and with the patch on the same synthetic CT, as a whole process, on the CPU. The
results are:

- wall and CPU seconds of the process and its descendants, median of the repeats;
- peak of the sum of the PSS of the process tree, and the largest number of processes at a time,
  sampled in a run of their own;
- the number of differing voxels of all files that the program wrote.

The results of several calls are merged into FILE.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmark_command import SETTLE_S, machine, make_scan, run
from readme import write_table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.clients.clients import CLIENTS, Client, Run, Weights, compare, make_weights
from tests.clients.environment import install

WEIGHTS = "stand-in weights, not the programs' (scripts/make_client_weights.py)"

PROGRAMS = [name for name in CLIENTS if "one file" not in name and "split" not in name]
"""The others are for the tests."""


def shape_of(client: Client, scale: float) -> tuple[int, ...]:
    """Voxels of the synthetic CT, (x, y, z)."""
    lengths = zip(client.field_mm, client.spacing_mm, strict=True)
    return tuple(max(round(scale * mm / voxel), 8) for mm, voxel in lengths)


def write_images(client: Client, scale: float, folder: Path) -> list[Path]:
    """Write the images of a client."""
    shape = "x".join(str(n) for n in shape_of(client, scale))
    spacing = "x".join(str(mm) for mm in client.spacing_mm)
    image = make_scan(f"phantom:{shape}:{spacing}", folder)
    return [image] * client.images


def measure(
    client: Client,
    weights: Weights,
    images: list[Path],
    folder: Path,
    *,
    patched: bool,
    watched: bool,
    settle_s: float,
) -> tuple[Run, dict[str, float]]:
    """Run a client once; return the run and the seconds, or the peak and the processes."""
    one = Run(weights, folder)
    folder.mkdir(parents=True)
    command = client.start(one, images, patched=patched)
    measured = run(
        command,
        weights.variables() | {"TOTALFAST_BACKEND": "torch"},
        timed=not watched,
        watched=watched,
        settle_s=settle_s,
        folder=folder,
    )
    return one, measured


def benchmark(
    name: str, weights: Weights, options: argparse.Namespace, scratch: Path
) -> dict[str, Any]:
    """Run one client without and with the patch; return the results."""
    client = CLIENTS[name]
    images = write_images(client, options.scale, scratch)
    labels = {"unpatched": False, "patched": True}
    runs: dict[str, list[dict[str, float]]] = {label: [] for label in labels}
    first: dict[str, Run] = {}
    for repeat in range(options.repeats + 1):
        for label, patched in labels.items():
            watched = repeat == options.repeats
            one, measured = measure(
                client,
                weights,
                images,
                scratch / f"{label}-{repeat}",
                patched=patched,
                watched=watched,
                settle_s=options.settle,
            )
            runs[label].append(measured)
            first.setdefault(label, one)
            print(name, label, {key: round(value, 2) for key, value in measured.items()})
    compared = compare(first["unpatched"], first["patched"])
    return {
        "client": name,
        "images": client.images,
        "shape_xyz": shape_of(client, options.scale),
        "spacing_mm": client.spacing_mm,
        "nnunetv2": weights.environment.versions()["nnunetv2"],
        **{label: summary(measured) for label, measured in runs.items()},
        "files": compared.files,
        "voxels": compared.voxels,
        "differing_voxels": compared.differing_voxels,
        "other_differences": compared.problems,
        "classes_present": compared.classes,
    }


def summary(runs: list[dict[str, float]]) -> dict[str, Any]:
    """Return medians, all timed runs, and the results of the watched run."""
    *timed, watched = runs
    medians = {key: statistics.median(one[key] for one in timed) for key in timed[0]}
    return medians | watched | {"runs": timed}


def table(result: dict[str, Any]) -> str:
    """Return all clients as Markdown; each cell is without and with the patch."""
    lines = [
        "| program | image | nnU-Net | CPU time | wall time | peak memory | processes "
        "| differing voxels |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in result["clients"]:
        theirs, ours = one["unpatched"], one["patched"]
        shape = "x".join(map(str, one["shape_xyz"]))
        cells = [one["client"], shape if one["images"] == 1 else f"{one['images']} of {shape}"]
        cells += [one["nnunetv2"]]
        cells += [f"{theirs[key]:.0f} -> {ours[key]:.0f} s" for key in ("cpu_s", "wall_s")]
        cells += [f"{theirs['peak_bytes'] / 1e9:.1f} -> {ours['peak_bytes'] / 1e9:.1f} GB"]
        cells += [f"{theirs['processes']} -> {ours['processes']}", str(one["differing_voxels"])]
        lines.append(f"| {' | '.join(cells)} |")
    hardware, versions = result["machine"], result["programs"]
    text = (
        f"Each cell is without -> with the patch. Small stand-in networks, synthetic CT, CPU. "
        f"{', '.join(f'{name} {number}' for name, number in versions.items())}. "
        f"{hardware['cores']} cores of {hardware['processor']}, {hardware['memory_gb']} GB. "
        f"Processes: the most at one time."
    )
    return "\n".join(lines) + f"\n\n{text}\n"


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="folder for the environment and the weights")
    parser.add_argument(
        "--json", type=Path, required=True, help="file to which the results are added"
    )
    parser.add_argument("--only", nargs="+", choices=CLIENTS, default=PROGRAMS, metavar="NAME")
    parser.add_argument("--scale", type=float, default=1.0, help="factor of the images' size")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--settle", type=float, default=SETTLE_S, help="seconds of pause before each run"
    )
    parser.add_argument("--nnunet", metavar="VERSION", help="version of nnunetv2 to install")
    parser.add_argument(
        "--readme", action="store_true", help="also write the table in scripts/results"
    )
    options = parser.parse_args()
    environment = install(options.folder / "environment", options.nnunet)
    weights = make_weights(environment, options.folder / "home")
    versions = environment.versions()
    del versions["nnunetv2"]
    clients: list[dict[str, Any]] = []
    if options.json.exists():
        clients = json.loads(options.json.read_text())["clients"]
    result = {"weights": WEIGHTS, "machine": machine(), "programs": versions, "clients": clients}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    failed = False
    for name in options.only:
        with tempfile.TemporaryDirectory(prefix="totalfast-benchmark-") as scratch:
            new = benchmark(name, weights, options, Path(scratch))
        key = ("client", "nnunetv2")
        kept = [old for old in result["clients"] if any(old[k] != new[k] for k in key)]
        result["clients"] = [*kept, new]
        options.json.write_text(json.dumps(result, indent=1) + "\n")
        failed |= bool(new["differing_voxels"] or new["other_differences"])
    if options.readme:
        write_table(Path(__file__).name, table(result))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
