r"""What ``--guided`` costs and saves, on phantoms of which the truth is known.

    body="--patch 64 64 64 --field-mm 1050 500 500 --drawn-mm 3"
    python scripts/train_demo_model.py W6 --output GUIDE --seed 7 $body --padded 176 84 84 \
        --spacing-mm 6 --steps-quarter 600 --steps-half 1300 --steps-full 3600
    python scripts/train_demo_model.py W3 --output TILES --seed 3 $body --padded 350 168 168 \
        --phantoms 100 --steps-quarter 1500 --steps-half 3000 --steps-full 3000
    python scripts/measure_guided.py GUIDE TILES --json scripts/results/guided.json

The first two take an hour.
TotalSegmentator's networks can't be used here, so everything is half as large as in reality: a
network of 6 mm voxels guides in place of the 3 mm model, and one of 3 mm voxels, whose tiles are
192 mm long as those of the 1.5 mm models, takes their place. Both were trained on other phantoms,
separately. The scans say that they are half as large, so that the command resamples them to these
voxels; the margin is halved, too. All five models have the same network, which knows all classes;
the labels of other models' classes are dropped, as always.

Each phantom is segmented in full and guided; Dice is that with the true labels, and that of both
runs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import nibabel as nib
import numpy as np
from readme import write_table

if TYPE_CHECKING:
    from totalfast.demo.phantom import Phantom
    from totalfast.tasks import Part, Task

SHAPES = {
    "375 x 300 x 375 mm": (250, 200, 250),
    "500 x 500 x 530 mm": (334, 334, 354),
    "500 x 500 x 1050 mm": (334, 334, 700),
}
"""Field of view to voxels (x, y, z) of 1.5 mm: a trunk that fills it, one that does not, and a
whole body. The phantom has no structures in legs and head, only soft tissue."""
SCALE = 0.5
DRAWN_MM = 1.5
RUNS: dict[str, dict[str, Any]] = {"full": {}, "guided": {"guided": True}}


def install(source: Path, home: Path, task: Task, part: Part) -> None:
    """Install a trained network as one of TotalSegmentator's models, on voxels half as large.

    Its classes are put in the model's order; the other classes follow.
    """
    import torch

    from totalfast.upstream import TASK_ID_WEIGHTS_CONFIGS

    folder = next(source.rglob("plans.json")).parent
    plans = json.loads((folder / "plans.json").read_text())
    configuration = plans["configurations"][task.configuration]
    configuration["spacing"] = [mm * SCALE for mm in configuration["spacing"]]
    dataset = json.loads((folder / "dataset.json").read_text())
    names = {label: name for name, label in dataset["labels"].items()}
    own = list(names) if part.labels is None else [0, *map(part.labels.get, sorted(part.labels))]
    order = own + [label for label in names if label not in own]
    dataset["labels"] = {names[label]: index for index, label in enumerate(order)}
    checkpoint = torch.load(folder / "fold_0" / "checkpoint_final.pth", weights_only=False)
    checkpoint["trainer_name"] = task.trainer
    weights = checkpoint["network_weights"]
    for key in [key for key in weights if "seg_layers" in key and len(weights[key]) == len(names)]:
        weights[key] = weights[key][order].clone()
    name = TASK_ID_WEIGHTS_CONFIGS[part.model_id]["foldername"]
    target = home / "nnunet" / "results" / name
    target /= f"{task.trainer}__{task.plans}__{task.configuration}"
    (target / "fold_0").mkdir(parents=True)
    (target / "plans.json").write_text(json.dumps(plans))
    (target / "dataset.json").write_text(json.dumps(dataset))
    torch.save(checkpoint, target / "fold_0" / "checkpoint_final.pth")


def segmented(phantom: Phantom, backend: str, **options: Any) -> dict[str, Any]:
    """Segment a phantom; return its labels (x, y, z), the seconds, and each model's window."""
    import totalfast
    from totalfast.run import prediction

    affine = phantom.affine.copy()
    affine[:3] *= SCALE
    scan = nib.Nifti1Image(phantom.ct, affine)
    seen: list[Any] = []
    original = prediction._windows

    def windows(*arguments: Any) -> Any:
        seen.append(original(*arguments))
        return seen[-1]

    began = time.perf_counter()
    with mock.patch.object(prediction, "_windows", windows):
        labels = totalfast.segment(scan, device="cpu", backend=backend, quiet=True, **options)
    return {
        "labels": np.asarray(labels.dataobj),
        "seconds": time.perf_counter() - began,
        "windows": seen[-1],
    }


def outside(phantom: Phantom, task: Task, windows: Any) -> dict[str, float]:
    """Return the share of each structure's true voxels of which a tile was not run."""
    from totalfast.engine.tiles import plan_tiles
    from totalfast.models.model_summary import ModelSummary

    shares: dict[str, float] = {}
    for part, own in zip(task.parts, windows, strict=True):
        patch = ModelSummary.of(task, part).patch
        for label in (part.labels or {}).values():
            places = np.argwhere(phantom.labels == label)[:, ::-1]
            if not len(places):
                continue
            complete = np.zeros(len(places), dtype=bool)
            for window in own:  # one at most: these scans are not split
                shape = np.array(window.source.shape)
                scale = (shape - 1) / (np.array(phantom.labels.shape[::-1]) - 1)
                tiles = plan_tiles(tuple(shape), patch, task.tile_step).that_touch(window.box)
                slices, cells = tiles.cells()
                found = [
                    np.searchsorted([cell.start for cell in axis], line, side="right") - 1
                    for axis, line in zip(
                        slices, np.rint(places * scale).astype(int).T, strict=True
                    )
                ]
                complete = cells[tuple(found)]
            shares[task.classes[label]] = float(1 - complete.mean())
    return shares


def measure(seed: int, shape: tuple[int, int, int], backend: str) -> dict[str, Any]:
    """Return tiles, seconds and Dice of one phantom."""
    from totalfast.demo.phantom import make_phantom
    from totalfast.demo.score import score
    from totalfast.tasks import resolve_task

    task = resolve_task("total")
    phantom = make_phantom(seed, shape_xyz=shape)
    row: dict[str, Any] = {"seed": seed, "tiles": {}, "seconds": {}, "dice": {}}
    runs = {name: segmented(phantom, backend, **options) for name, options in RUNS.items()}
    for name, run in runs.items():
        row["tiles"][name] = [sum(window.tile_count for window in own) for own in run["windows"]]
        row["seconds"][name] = round(run["seconds"], 2)
        scores = score(run["labels"], phantom.labels, task.classes, voxel_ml=DRAWN_MM**3 / 1000)
        row["dice"][name] = {each.name: round(each.dice, 4) for each in scores}
    both = score(
        runs["guided"]["labels"], runs["full"]["labels"], task.classes, voxel_ml=DRAWN_MM**3 / 1000
    )
    row["dice"]["with the full run"] = {each.name: round(each.dice, 4) for each in both}
    row["outside"] = {
        name: round(share, 4)
        for name, share in outside(phantom, task, runs["guided"]["windows"]).items()
        if share and name in row["dice"]["full"]
    }
    return row


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what all phantoms of one shape have in common."""
    few, many = (sum(sum(row["tiles"][name]) for row in rows) for name in ("guided", "full"))
    result: dict[str, Any] = {"phantoms": len(rows), "tiles_saved": round(1 - few / many, 3)}
    for name in (*RUNS, "with the full run"):
        key = name.replace(" ", "_")
        result[f"mean_dice_{key}"] = round(
            statistics.mean(dice for row in rows for dice in row["dice"][name].values()), 4
        )
    changes: dict[str, list[float]] = {}
    for row in rows:
        for structure, dice in row["dice"]["guided"].items():
            changes.setdefault(structure, []).append(dice - row["dice"]["full"][structure])
    means = {structure: statistics.mean(values) for structure, values in changes.items()}
    worst = min(means, key=lambda structure: means[structure])
    result["mean_change"] = round(statistics.mean(means.values()), 4)
    result["worst_structure"] = {worst: round(means[worst], 4)}
    result["largest_share_outside"] = max(
        (share for row in rows for share in row["outside"].values()), default=0.0
    )
    result["structures_outside"] = sorted({name for row in rows for name in row["outside"]})
    return result


def table(results: dict[str, Any]) -> str:
    """Return the summaries of a JSON's content as Markdown."""
    lines = [
        "| field of view | tiles saved | Dice with the truth: full | guided | worst structure "
        "| Dice with the full run | largest share of a structure outside |",
        "|---|---|---|---|---|---|---|",
    ]
    for view, one in results["summary"].items():
        ((name, change),) = one["worst_structure"].items()
        lines.append(
            f"| {view} | {one['tiles_saved']:.0%} | {one['mean_dice_full']:.4f} | "
            f"{one['mean_dice_guided']:.4f} | {name} {change:+.4f} | "
            f"{one['mean_dice_with_the_full_run']:.4f} | {one['largest_share_outside']:.2%} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("guide", type=Path, help="folder of the network of 6 mm voxels")
    parser.add_argument("tiles", type=Path, help="folder of the network of 3 mm voxels")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=range(1, 4))
    parser.add_argument("--backend", default="auto")
    parser.add_argument(
        "--readme", action="store_true", help="also write the table in scripts/results"
    )
    options = parser.parse_args()
    from totalfast.run import guide
    from totalfast.tasks import resolve_task

    margin_mm = tuple(mm * SCALE for mm in guide.ROUGH_MARGIN_MM)
    rows: dict[str, list[dict[str, Any]]] = {view: [] for view in SHAPES}
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        for source, task in (
            (options.guide, resolve_task("total", fast=True)),
            (options.tiles, resolve_task("total")),
        ):
            for part in task.parts:
                install(source, home, task, part)
        os.environ["TOTALSEG_HOME_DIR"] = str(home)
        with mock.patch.object(guide, "ROUGH_MARGIN_MM", margin_mm):
            for view, shape in SHAPES.items():
                for seed in options.seeds:
                    rows[view].append(measure(seed, shape, options.backend))
                    print(f"{view}, seed {seed}: {summary(rows[view][-1:])}", flush=True)
    results = {"summary": {view: summary(some) for view, some in rows.items()}, "rows": rows}
    options.json.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))
    if options.readme:
        write_table(Path(__file__).name, table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
