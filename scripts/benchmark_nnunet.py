"""Time nnU-Net's predict command and ``totalfast nnunet`` on a folder of cases.

    python scripts/benchmark_nnunet.py HOME --json FILE --shape 160 512 512 [--cases 10]
        [--programs nnU-Net totalfast] [--torch-plans] [--readme]

The model is the stand-in for TotalSegmentator's 3 mm model in HOME, a plain nnU-Net model folder
with 118 classes from scripts/make_standin_weights.py. With --tiny weights, the time outside the
network is visible. With --torch-plans, a copy of the model is used whose plans name nnU-Net's torch
resampling. The cases are one synthetic CT with different noise; shapes are (z, y, x). Both commands
run on the same folder as whole processes. nnU-Net runs on the first case only, because it is slow.
totalfast runs on the first case and on all cases. The label maps are compared.

nnU-Net keeps about two copies of all classes at the scan's resolution in float16. Its peaks at 80
and 160 slices predict 37 GB for 118 classes of 300x512x512 voxels. Therefore the results of several
calls are merged into FILE, and --programs selects the programs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from benchmark_command import WEIGHTS, add_device, machine, make_scan, run
from compare_resampling import TORCH_OPTIONS, TORCH_RESAMPLING
from label_map_facts import label_map_facts
from readme import write_table

SPACING_MM = (0.78, 0.78, 1.0)
NNUNET = "from nnunetv2.inference.predict_from_raw_data import predict_entry_point_modelfolder as f"
PROGRAMS = {"nnU-Net": ["-c", f"{NNUNET}; f()"], "totalfast": ["-m", "totalfast", "nnunet"]}
FOLDS = ["-f", "0"]


def write_cases(folder: Path, shape_zyx: tuple[int, int, int], count: int) -> list[Path]:
    """Write ``case0_0000.nii.gz``, ``case1_0000.nii.gz``, ...; return the paths."""
    folder.mkdir()
    size = "x".join(str(n) for n in shape_zyx[::-1])
    phantom = make_scan(f"phantom:{size}:{'x'.join(str(mm) for mm in SPACING_MM)}", folder)
    image = nib.load(phantom)
    voxels = np.asanyarray(image.dataobj)
    paths = []
    for case in range(count):
        noise = np.random.default_rng(case).normal(0, 10, voxels.shape[:2]).astype(np.int16)
        paths.append(folder / f"case{case}_0000.nii.gz")
        nib.save(nib.Nifti1Image(voxels + noise[:, :, None], image.affine), paths[-1])
    phantom.unlink()
    return paths


def command(program: str, model: Path, images: Path, target: Path, device: str) -> list[str | Path]:
    """Return the command line of one of ``PROGRAMS`` for a folder."""
    # nnU-Net's word for a GPU is "cuda".
    flags = ["-i", images, "-o", target, "-m", model, *FOLDS]
    flags += ["-device", "cuda" if device.startswith("gpu") else device]
    return [sys.executable, *PROGRAMS[program], *flags]


def compare(theirs: Path, ours: Path) -> dict[str, Any]:
    """Return differing voxels of all label maps, and classes and boundary of the first one."""
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
        raise RuntimeError("nnU-Net wrote no label map")
    return {
        "voxels": voxels,
        "differing_voxels": differing,
        "classes_present": facts[0],
        "boundary_cells": facts[1],
    }


def with_torch_resampling(model: Path, folder: Path) -> Path:
    """Copy a model folder, and write nnU-Net's torch resampling into the plans of the copy."""
    copy = folder / model.parent.name / model.name
    shutil.copytree(model, copy)
    plans = json.loads((copy / "plans.json").read_text())
    for configuration in plans["configurations"].values():
        for kind in ("data", "seg", "probabilities"):
            configuration[f"resampling_fn_{kind}"] = TORCH_RESAMPLING
            configuration[f"resampling_fn_{kind}_kwargs"] = TORCH_OPTIONS | {
                "is_seg": kind == "seg"
            }
    (copy / "plans.json").write_text(json.dumps(plans, indent=4))
    return copy


def measure(program: str, model: Path, images: Path, target: Path, device: str) -> dict[str, Any]:
    """Run a program on a folder; return seconds and peak bytes, or the error."""
    count = len(list(images.iterdir()))
    try:
        seconds: dict[str, Any] = run(
            command(program, model, images, target, device),
            {**os.environ, "TOTALFAST_BACKEND": "torch"},
            timed=True,
            watched=True,
        )
    except RuntimeError as error:
        return {"cases": count, "failed": str(error)[-500:]}
    return {"cases": count, "seconds_a_case": seconds["wall_s"] / count, **seconds}


def benchmark(options: argparse.Namespace, scratch: Path) -> Iterator[dict[str, Any]]:
    """Run the selected programs; yield each result when it is complete."""
    (model,) = options.home.glob("nnunet/results/Dataset297_*/*__nnUNetPlans__3d_fullres")
    if options.torch_plans:
        model = with_torch_resampling(model, scratch / "torch")
    images, first = scratch / "images", scratch / "first"
    paths = write_cases(images, tuple(options.shape), options.cases)
    first.mkdir()
    shutil.copy(paths[0], first)
    common = {
        "plans": "torch" if options.torch_plans else "default",
        "shape_zyx": options.shape,
        "classes": len(json.loads((model / "dataset.json").read_text())["labels"]),
    }
    for program in options.programs:
        folders = [first, images] if program == "totalfast" and options.cases > 1 else [first]
        for folder in folders:
            target = scratch / program / folder.name
            target.parent.mkdir(exist_ok=True)
            yield (
                common
                | {"program": program}
                | measure(program, model, folder, target, options.device)
            )
    both = [scratch / program / "first" for program in ("nnU-Net", "totalfast")]
    if all(folder.exists() and any(folder.glob("*.nii.gz")) for folder in both):
        yield common | {"program": "compared", "cases": 1} | compare(*both)


KEYS = ("program", "plans", "shape_zyx", "cases")
"""The keys that identify a run."""


def table(result: dict[str, Any]) -> str:
    """Return all runs as Markdown."""
    runs = [run for run in result["runs"] if run["program"] != "compared"]
    lines = [
        "| plans | shape | command | cases | time per case | speed-up | peak memory "
        "| differing voxels |",
        "|---|---|---|---|---|---|---|---|",
    ]
    facts: dict[str, Any] = {}
    for one in sorted(runs, key=lambda run: (run["plans"], -run["shape_zyx"][0], run["program"])):
        same_case = [r for r in result["runs"] if all(r[key] == one[key] for key in KEYS[1:3])]
        theirs = next((r for r in same_case if r["program"] == "nnU-Net"), one)
        compared = next((r for r in same_case if r["program"] == "compared"), {})
        facts = compared or facts
        faster = theirs["seconds_a_case"] / one["seconds_a_case"]
        cells = [one["plans"], "x".join(map(str, one["shape_zyx"])), one["program"]]
        cells += [str(one["cases"]), f"{one['seconds_a_case']:.0f} s"]
        cells += ["" if theirs is one else f"{faster:.0f}x", f"{one['peak_bytes'] / 1e9:.1f} GB"]
        cells += ["" if theirs is one else str(compared.get("differing_voxels", ""))]
        lines.append(f"| {' | '.join(cells)} |")
    hardware = result["machine"]
    text = (
        f"{facts['classes']} classes, tiny stand-in network (3 mm, tiles overlap by half); the "
        f"label maps contain {facts['classes_present']} classes, and {facts['boundary_cells']:.0%} "
        f"of their cells lie at boundaries. {hardware['cores']} cores of {hardware['processor']}, "
        f"{hardware['memory_gb']} GB. One run each; memory was sampled during the timed run."
    )
    return "\n".join(lines) + f"\n\n{text}\n"


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("home", type=Path, help="TOTALSEG_HOME_DIR with stand-in 297")
    parser.add_argument(
        "--json", type=Path, required=True, help="file to which the results are added"
    )
    parser.add_argument("--shape", type=int, nargs=3, required=True, metavar="N")
    parser.add_argument("--cases", type=int, default=10)
    add_device(parser)
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=list(PROGRAMS))
    parser.add_argument(
        "--torch-plans", action="store_true", help="use plans with nnU-Net's torch resampling"
    )
    parser.add_argument(
        "--readme", action="store_true", help="also write the table in scripts/results"
    )
    options = parser.parse_args()
    result = {"weights": WEIGHTS, "machine": machine(options.device), "runs": []}
    if options.json.exists():
        result["runs"] = json.loads(options.json.read_text())["runs"]
    options.json.parent.mkdir(parents=True, exist_ok=True)
    differing = 0
    with tempfile.TemporaryDirectory(prefix="totalfast-benchmark-") as scratch:
        for new in benchmark(options, Path(scratch)):
            others = [run for run in result["runs"] if any(run[key] != new[key] for key in KEYS)]
            result["runs"] = [*others, new]
            differing += new.get("differing_voxels", 0)
            options.json.write_text(json.dumps(result, indent=1) + "\n")
            print(new, flush=True)
    if options.readme:
        write_table(Path(__file__).name, table(result))
    return int(differing > 0)


if __name__ == "__main__":
    sys.exit(main())
