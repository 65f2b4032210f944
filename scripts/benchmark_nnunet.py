"""Time nnU-Net's predict command against ``totalfast nnunet`` on a folder of cases.

    python scripts/benchmark_nnunet.py HOME --json FILE [--shape 300 512 512] [--cases 10]

The model is the stand-in for TotalSegmentator's 3 mm model in HOME (118 classes, made by
scripts/make_standin_weights.py; with --tiny the network is small, so that the rest is seen), which
is a plain nnU-Net model folder. The cases are one made CT with noise of its own each; shapes are
(z, y, x). Both commands run on the same folder, as whole processes; as nnU-Net takes a quarter of
an hour a case, it gets the first --nnunet-cases cases only, totalfast is timed on these and on all.
Its memory is measured in runs of its own, as sampling slows it down.

The label maps of both are compared. nnU-Net keeps all classes at the scan's resolution: with 118
classes it needs about 80 bytes a voxel for each, and dies where the machine has not as much. So a
copy of the model whose plans name nnU-Net's torch resampling, which takes more, gets a case of
--torch-shape, as the default plans do once more.
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
    start = {"nnU-Net": ["-c", f"{NNUNET}; f()"], "totalfast": ["-m", "totalfast", "nnunet"]}
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


def with_torch_resampling(model: Path, folder: Path) -> Path:
    """Copy a model folder; its plans then name nnU-Net's torch resampling, as its planners do."""
    copy = folder / model.parent.name / model.name
    shutil.copytree(model, copy)
    plans = json.loads((copy / "plans.json").read_text())
    options = {
        "is_seg": False,
        "force_separate_z": False,
        "memefficient_seg_resampling": False,
    }
    for configuration in plans["configurations"].values():
        for kind in ("data", "seg", "probabilities"):
            configuration[f"resampling_fn_{kind}"] = "resample_torch_fornnunet"
            configuration[f"resampling_fn_{kind}_kwargs"] = options | {"is_seg": kind == "seg"}
    (copy / "plans.json").write_text(json.dumps(plans, indent=4))
    return copy


class Bench:
    """Runs the commands on folders of images, and keeps what they took."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.runs: dict[str, dict[str, Any]] = {}

    def measure(
        self, name: str, model: Path, images: Path, *, timed: bool = True, watched: bool = True
    ) -> None:
        """Run nnU-Net or totalfast, whichever the name begins with."""
        count = len(list(images.iterdir()))
        figures = run(
            command(name.partition(",")[0], model, images, self.scratch / name),
            {**os.environ, "TOTALFAST_BACKEND": "torch"},
            timed=timed,
            watched=watched,
        )
        if timed:
            figures["seconds_a_case"] = figures["wall_s"] / count
        self.runs.setdefault(name, {"cases": count}).update(figures)
        print(name, {key: round(value, 2) for key, value in figures.items()}, flush=True)


def benchmark(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Run both commands."""
    (model,) = options.home.glob("nnunet/results/Dataset297_*/*__nnUNetPlans__3d_fullres")
    images, first, small = (scratch / name for name in ("images", "first", "small"))
    paths = write_cases(images, tuple(options.shape), options.cases)
    first.mkdir()
    for path in paths[: options.nnunet_cases]:
        shutil.copy(path, first)
    bench = Bench(scratch)
    bench.measure("totalfast", model, first, watched=False)
    bench.measure("totalfast, all cases", model, images, watched=False)
    bench.measure("totalfast, all cases", model, images, timed=False)
    bench.measure("nnU-Net", model, first)
    write_cases(small, tuple(options.torch_shape), 1)
    torch_model = with_torch_resampling(model, scratch / "torch")
    bench.measure("nnU-Net, torch plans", torch_model, small)
    bench.measure("totalfast, torch plans", torch_model, small, watched=False)
    bench.measure("totalfast, torch plans", torch_model, small, timed=False)
    bench.measure("nnU-Net, default plans", model, small)
    bench.measure("totalfast, default plans", model, small, watched=False)
    bench.measure("totalfast, default plans", model, small, timed=False)
    return {
        "shape_zyx": options.shape,
        "torch_shape_zyx": options.torch_shape,
        "classes": len(json.loads((model / "dataset.json").read_text())["labels"]),
        "weights": "stand-in weights (scripts/make_standin_weights.py), tiny network",
        "machine": machine(),
        "runs": bench.runs,
        "compared": {
            ours: compare(scratch / theirs, scratch / ours) for ours, theirs in COMPARED.items()
        },
    }


COMPARED = {
    "totalfast": "nnU-Net",
    "totalfast, torch plans": "nnU-Net, torch plans",
    "totalfast, default plans": "nnU-Net, default plans",
}


def table(result: dict[str, Any]) -> str:
    """Markdown of one run."""
    lines = [
        "| command | shape | cases | seconds a case | times faster | peak memory "
        "| differing voxels |",
        "|---|---|---|---|---|---|---|",
    ]
    runs = result["runs"]
    for name in sorted(runs, key=list(ORDER).index):
        figures, base = runs[name], runs[ORDER[name]]
        small = "plans" in name
        shape = "x".join(str(n) for n in result["torch_shape_zyx" if small else "shape_zyx"])
        faster = base["seconds_a_case"] / figures["seconds_a_case"]
        memory = f"{figures['peak_bytes'] / 1e9:.1f} GB" if "peak_bytes" in figures else ""
        differing = result["compared"].get(name, {}).get("differing_voxels", "")
        lines.append(
            f"| {name} | {shape} | {figures['cases']} | {figures['seconds_a_case']:.0f} s "
            f"| {faster:.1f} | {memory} | {differing} |"
        )
    where, first = result["machine"], result["compared"]["totalfast"]
    text = (
        f"{result['classes']} classes, tiny stand-in network (3 mm, tiles that overlap by half); "
        f"the label maps have {first['classes_present']} classes and {first['boundary_cells']:.0%} "
        f"of their cells at boundaries. {where['cores']} cores of {where['processor']}, "
        f"{where['memory_gb']} GB. One run each."
    )
    return "\n".join(lines) + f"\n\n{text}\n"


ORDER = {
    "nnU-Net": "nnU-Net",
    "totalfast": "nnU-Net",
    "totalfast, all cases": "nnU-Net",
    "nnU-Net, default plans": "nnU-Net, default plans",
    "totalfast, default plans": "nnU-Net, default plans",
    "nnU-Net, torch plans": "nnU-Net, torch plans",
    "totalfast, torch plans": "nnU-Net, torch plans",
}
"""Rows of the table, each with the run that it is compared with."""


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("home", type=Path, help="TOTALSEG_HOME_DIR with stand-in 297")
    parser.add_argument("--json", type=Path, required=True, help="write the figures here")
    parser.add_argument("--shape", type=int, nargs=3, default=(300, 512, 512), metavar="N")
    parser.add_argument("--cases", type=int, default=10)
    parser.add_argument("--nnunet-cases", type=int, default=1)
    parser.add_argument("--torch-shape", type=int, nargs=3, default=(80, 512, 512), metavar="N")
    parser.add_argument("--readme", action="store_true", help="also write README's table")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="totalfast-benchmark-") as scratch:
        result = benchmark(options, Path(scratch))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    if options.readme:
        write_table(Path(__file__).name, table(result))
    return int(any(found["differing_voxels"] for found in result["compared"].values()))


if __name__ == "__main__":
    sys.exit(main())
