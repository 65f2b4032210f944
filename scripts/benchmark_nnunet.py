"""Time nnU-Net's predict command against ``totalfast nnunet`` on a folder of cases.

    python scripts/benchmark_nnunet.py HOME --json FILE [--shape 300 512 512] [--cases 10]

The model is the stand-in for TotalSegmentator's 3 mm model in HOME (118 classes, made by
scripts/make_standin_weights.py; with --tiny the network is small, so that the rest is seen), which
is a plain nnU-Net model folder. The cases are one made CT with noise of its own each; shapes are
(z, y, x). Both commands run on the same folder, as whole processes; as nnU-Net takes a quarter of
an hour a case, it gets the first --nnunet-cases cases only, totalfast is timed on these and on all.
Its memory is measured in runs of its own, as sampling slows it down.

The label maps of both are compared. nnU-Net keeps all classes at the scan's resolution: with 118
classes it needs about 80 bytes a voxel for each, and dies where the machine has not as much.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from benchmark_command import machine, make_scan, run
from make_standin_weights import label_map_facts
from readme import write_table

SPACING_MM = (0.78, 0.78, 1.0)
NNUNET = "from nnunetv2.inference.predict_from_raw_data import predict_entry_point_modelfolder as f"
FOLDS = ["-f", "0"]


def write_cases(folder: Path, shape_zyx: tuple[int, int, int], count: int) -> list[Path]:
    """Write ``case0_0000.nii.gz`` and so on."""
    folder.mkdir()
    size = "x".join(str(n) for n in shape_zyx[::-1])
    made = make_scan(f"phantom:{size}:{'x'.join(str(mm) for mm in SPACING_MM)}", folder)
    image = nib.load(made)
    voxels = np.asanyarray(image.dataobj)
    paths = []
    for case in range(count):
        noise = np.random.default_rng(case).normal(0, 10, voxels.shape[:2]).astype(np.int16)
        paths.append(folder / f"case{case}_0000.nii.gz")
        nib.save(nib.Nifti1Image(voxels + noise[:, :, None], image.affine), paths[-1])
    made.unlink()
    return paths


def command(program: str, model: Path, images: Path, target: Path) -> list[str | Path]:
    """Command line of either program on a folder."""
    start = {"nnunet": ["-c", f"{NNUNET}; f()"], "totalfast": ["-m", "totalfast", "nnunet"]}
    flags = ["-i", images, "-o", target, "-m", model, *FOLDS, "-device", "cpu"]
    return [sys.executable, *start[program], *flags]


def compare(theirs: Path, ours: Path) -> dict[str, Any]:
    """Differing voxels of all label maps that both left, and what is in the first one."""
    voxels = differing = 0
    facts: tuple[int, float] | None = None
    for path in sorted(theirs.glob("*.nii.gz")):
        one, two = (
            np.asanyarray(nib.load(folder / path.name).dataobj) for folder in (theirs, ours)
        )
        voxels += one.size
        differing += int(np.count_nonzero(one != two))
        facts = facts or label_map_facts(one)
    if facts is None:
        raise RuntimeError("nnU-Net left no label map")
    return {
        "voxels": voxels,
        "differing_voxels": differing,
        "classes_present": facts[0],
        "boundary_cells": facts[1],
    }


def benchmark(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Run both commands."""
    (model,) = options.home.glob("nnunet/results/Dataset297_*/*__3d_fullres")
    images = write_cases(scratch / "images", tuple(options.shape), options.cases)
    first = scratch / "first"
    first.mkdir()
    for path in images[: options.nnunet_cases]:
        shutil.copy(path, first)
    environment = dict(os.environ)
    counts = {"first": options.nnunet_cases, "images": options.cases}
    result: dict[str, Any] = {
        "shape_zyx": options.shape,
        "classes": len(json.loads((model / "dataset.json").read_text())["labels"]),
        "weights": "stand-in weights (scripts/make_standin_weights.py), tiny network",
        "machine": machine(),
        "runs": {},
    }

    def measure(name: str, program: str, folder: str, *, timed: bool, watched: bool) -> None:
        target = scratch / name
        figures = run(
            command(program, model, scratch / folder, target),
            environment,
            timed=timed,
            watched=watched,
        )
        if timed:
            figures["seconds_a_case"] = figures["wall_s"] / counts[folder]
        result["runs"].setdefault(name, {"cases": counts[folder]}).update(figures)
        print(name, {key: round(value, 2) for key, value in figures.items()}, flush=True)

    measure("totalfast", "totalfast", "first", timed=True, watched=False)
    measure("totalfast, all cases", "totalfast", "images", timed=True, watched=False)
    measure("totalfast, all cases", "totalfast", "images", timed=False, watched=True)
    if options.nnunet_cases:
        measure("nnU-Net", "nnunet", "first", timed=True, watched=True)
        result |= compare(scratch / "nnU-Net", scratch / "totalfast")
        theirs, ours = result["runs"]["nnU-Net"], result["runs"]["totalfast, all cases"]
        result["times_faster"] = {
            name: theirs["seconds_a_case"] / figures["seconds_a_case"]
            for name, figures in result["runs"].items()
        }
        result["peak_memory_share"] = ours["peak_bytes"] / theirs["peak_bytes"]
    return result


def table(result: dict[str, Any]) -> str:
    """Markdown of one run."""
    lines = [
        "| command | cases | seconds a case | times faster | peak memory |",
        "|---|---|---|---|---|",
    ]
    for name in ("nnU-Net", "totalfast", "totalfast, all cases"):
        figures = result["runs"][name]
        memory = f"{figures['peak_bytes'] / 1e9:.1f} GB" if "peak_bytes" in figures else ""
        lines.append(
            f"| {name} | {figures['cases']} | {figures['seconds_a_case']:.0f} s "
            f"| {result['times_faster'][name]:.0f} | {memory} |"
        )
    shape = "x".join(str(n) for n in result["shape_zyx"])
    where = result["machine"]
    text = (
        f"{result['classes']} classes, cases of {shape} voxels, tiny stand-in network; "
        f"{result['differing_voxels']} of {result['voxels'] / 1e6:.0f} million voxels differ, "
        f"{result['boundary_cells']:.0%} of the cells at boundaries. "
        f"{where['cores']} cores of {where['processor']}, {where['memory_gb']} GB."
    )
    return "\n".join(lines) + f"\n\n{text}\n"


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("home", type=Path, help="TOTALSEG_HOME_DIR with stand-in 297")
    parser.add_argument("--json", type=Path, required=True, help="write the figures here")
    parser.add_argument("--shape", type=int, nargs=3, default=(300, 512, 512), metavar="N")
    parser.add_argument("--cases", type=int, default=10)
    parser.add_argument("--nnunet-cases", type=int, default=1)
    parser.add_argument("--readme", action="store_true", help="also write README's table")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="totalfast-benchmark-") as scratch:
        result = benchmark(options, Path(scratch))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    if options.readme:
        write_table(Path(__file__).name, table(result))
    return int(result.get("differing_voxels", 0) > 0)


if __name__ == "__main__":
    sys.exit(main())
