"""Time nnU-Net's predict command against ``totalfast nnunet`` on a folder of cases.

    python scripts/benchmark_nnunet.py HOME --json FILE [--shape 300 512 512] [--cases 10]

The model is the stand-in for TotalSegmentator's 3 mm model in HOME (118 classes, made by
scripts/make_standin_weights.py; with --tiny the network is small, so that the rest is seen), which
is a plain nnU-Net model folder. The cases are one made CT with noise of its own each; shapes are
(z, y, x). Both commands run on the same folder, as whole processes, all of which are watched alike;
as nnU-Net takes long, it gets the first case only, totalfast that one and all.

The label maps of both are compared. nnU-Net keeps all classes at the scan's resolution in float16,
and dies where the machine has not as much: 18.6 GB for 118 classes of 300x512x512 voxels. So a copy
of the model whose plans name nnU-Net's torch resampling, which takes more, gets a case of
--torch-shape, as the default plans do once more. FILE is written after each run.
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
from compare_resampling import TORCH_OPTIONS, TORCH_RESAMPLING
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
    for configuration in plans["configurations"].values():
        for kind in ("data", "seg", "probabilities"):
            configuration[f"resampling_fn_{kind}"] = TORCH_RESAMPLING
            configuration[f"resampling_fn_{kind}_kwargs"] = TORCH_OPTIONS | {
                "is_seg": kind == "seg"
            }
    (copy / "plans.json").write_text(json.dumps(plans, indent=4))
    return copy


def measure(name: str, model: Path, images: Path, scratch: Path) -> dict[str, Any]:
    """Run nnU-Net or totalfast, whichever the name begins with."""
    figures: dict[str, Any] = {"cases": len(list(images.iterdir()))}
    try:
        figures |= run(
            command(name.partition(",")[0], model, images, scratch / name),
            {**os.environ, "TOTALFAST_BACKEND": "torch"},
            timed=True,
            watched=True,
        )
    except RuntimeError as error:
        return figures | {"failed": str(error)[-500:]}
    return figures | {"seconds_a_case": figures["wall_s"] / figures["cases"]}


def benchmark(options: argparse.Namespace, scratch: Path) -> None:
    """Run both commands; what they took is in the file as soon as it is known."""
    (model,) = options.home.glob("nnunet/results/Dataset297_*/*__nnUNetPlans__3d_fullres")
    torch_model = with_torch_resampling(model, scratch / "torch")
    images, first, small = (scratch / name for name in ("images", "first", "small"))
    shutil.copytree(write_cases(images, tuple(options.shape), options.cases)[0].parent, first)
    for path in sorted(first.iterdir())[1:]:
        path.unlink()
    write_cases(small, tuple(options.torch_shape), 1)
    result: dict[str, Any] = {
        "shape_zyx": options.shape,
        "torch_shape_zyx": options.torch_shape,
        "classes": len(json.loads((model / "dataset.json").read_text())["labels"]),
        "weights": "stand-in weights (scripts/make_standin_weights.py), tiny network",
        "machine": machine(),
        "runs": {},
        "compared": {},
    }
    for name, where in {
        "totalfast": (model, first),
        "totalfast, all cases": (model, images),
        "nnU-Net, default plans": (model, small),
        "totalfast, default plans": (model, small),
        "nnU-Net, torch plans": (torch_model, small),
        "totalfast, torch plans": (torch_model, small),
        "nnU-Net": (model, first),
    }.items():
        figures = result["runs"][name] = measure(name, *where, scratch)
        print(name, figures, flush=True)
        for ours, theirs in COMPARED.items():
            left = [result["runs"].get(one, {"failed": "not run"}) for one in (ours, theirs)]
            if not any("failed" in one for one in left):
                result["compared"][ours] = compare(scratch / theirs, scratch / ours)
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")


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
    for name, theirs in ORDER.items():
        figures, base = runs[name], runs[theirs]
        shape = result["torch_shape_zyx" if "plans" in name else "shape_zyx"]
        cells = [name, "x".join(map(str, shape)), str(figures["cases"])]
        if "failed" in figures:
            cells += ["failed", "", "", ""]
        else:
            faster = "" if "failed" in base else base["seconds_a_case"] / figures["seconds_a_case"]
            cells += [f"{figures['seconds_a_case']:.0f} s", f"{faster:.0f}" if faster else ""]
            cells += [f"{figures['peak_bytes'] / 1e9:.1f} GB"]
            cells += [str(result["compared"].get(name, {}).get("differing_voxels", ""))]
        lines.append(f"| {' | '.join(cells)} |")
    where = result["machine"]
    facts = next(iter(result["compared"].values()))
    text = (
        f"{result['classes']} classes, tiny stand-in network (3 mm, tiles that overlap by half); "
        f"the label maps have {facts['classes_present']} classes and {facts['boundary_cells']:.0%} "
        f"of their cells at boundaries. {where['cores']} cores of {where['processor']}, "
        f"{where['memory_gb']} GB. One run each, watched."
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
    parser.add_argument("--torch-shape", type=int, nargs=3, default=(80, 512, 512), metavar="N")
    parser.add_argument("--readme", action="store_true", help="also write README's table")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="totalfast-benchmark-") as scratch:
        benchmark(options, Path(scratch))
    result = json.loads(options.json.read_text())
    if options.readme:
        write_table(Path(__file__).name, table(result))
    return int(any(found["differing_voxels"] for found in result["compared"].values()))


if __name__ == "__main__":
    sys.exit(main())
