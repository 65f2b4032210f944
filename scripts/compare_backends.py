"""Compare the backends: seconds per tile, and the labels with those of torch.

The model folder must have the official size, as from scripts/make_standin_weights.py. The image is
a phantom at the spacing of the model. Classes of stand-in weights are close to each other almost
everywhere, so the labels are also compared for the model of ``totalfast demo``, which was trained.

    python scripts/compare_backends.py HOME/nnunet/results/Dataset297*/* --json FILE [--readme]
        [--device gpu --backends torch compile]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmark_command import (
    LARGE,
    WEIGHTS,
    add_device,
    dice_and_sizes,
    lowest_of,
    machine,
    pairs_of_labels,
)
from readme import write_table

from totalfast.backends import BFLOAT16, choose_backend
from totalfast.backends.devices import select_device
from totalfast.cli.demo import MODEL as DEMO
from totalfast.demo.phantom import make_phantom
from totalfast.engine.normalise import to_network_image
from totalfast.engine.sliding_window import inference_settings, predict_labels
from totalfast.engine.tiles import Tiling
from totalfast.models.loading import load_model
from totalfast.models.model import Model

SEED = 3


def main() -> None:
    """Run all backends on one image, and compare their labels with those of the first."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path, help="folder with plans.json")
    parser.add_argument("--shape", default="125x100x190", help="number of voxels along x, y and z")
    parser.add_argument(
        "--backends",
        nargs="+",
        default=["torch", "compile", "openvino", "winograd", BFLOAT16],
    )
    parser.add_argument("--repeats", type=int, default=3, help="number of timed tiles")
    parser.add_argument("--json", type=Path, required=True, help="write the results to this file")
    parser.add_argument(
        "--readme", action="store_true", help="also write the table in scripts/results"
    )
    add_device(parser)
    options = parser.parse_args()
    device = select_device(options.device)
    x, y, z = map(int, options.shape.split("x"))
    result: dict[str, Any] = {
        "shape_xyz": [x, y, z],
        "model": options.model.parent.name,
        "weights": WEIGHTS,
        "machine": machine(options.device),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "openvino": "not used",
        "backends": {},
    }
    if "openvino" in options.backends:
        result["openvino"] = importlib.metadata.version("openvino")
    trained = next(DEMO.glob("*/*/plans.json")).parent
    references: list[np.ndarray] = []
    with tempfile.TemporaryDirectory(prefix="totalfast-backends-") as caches:
        os.environ["TOTALFAST_CACHE_DIR"] = os.environ["TORCHINDUCTOR_CACHE_DIR"] = caches
        for backend in options.backends:
            row, labels = measure(options.model, (x, y, z), backend, options.repeats, device)
            if not references:
                references = [labels, demo_labels(trained, backend, device)]
            else:
                row |= difference(labels, references[0])
                row["demo"] = difference(demo_labels(trained, backend, device), references[1])
            result["backends"][backend] = row
            print(backend, json.dumps(row), flush=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    if options.readme:
        write_table(Path(__file__).name, table(result))


def table(result: dict[str, Any]) -> str:
    """Return the results of all backends as Markdown."""
    lines = [
        "| backend | load model | first tile | later tiles | differing voxels | lowest Dice "
        "| trained: differing voxels | mean Dice | lowest Dice |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for backend, row in result["backends"].items():
        cells = [f"`{backend}`"]
        cells += [f"{row[key]:.1f} s" for key in ("load_s", "first_tile_s", "median_tile_s")]
        for some, keys in (
            (row, ["lowest_dice"]),
            (row.get("demo", {}), ["mean_dice", "lowest_dice_of_large"]),
        ):
            if "differing_voxels" in some:
                cells.append(f"{some['differing_voxels']} ({some['differing_share']:.1g})")
                cells += [f"{some[key]:.4f}" for key in keys]
            else:
                cells += ["0", *("1" for _ in keys)]
        lines.append(f"| {' | '.join(cells)} |")
    hardware = result["machine"]
    lines += [
        "",
        f"Model of `--fast`, {result['weights']}; {'x'.join(map(str, result['shape_xyz']))} voxels "
        "of a phantom. The caches are empty when the model is loaded and its first tile is run. "
        "Trained: the model of `totalfast demo`, classes of 100 voxels or more. "
        f"{hardware['cores']} cores of {hardware['processor']} "
        f"({result['instructions']}), torch {hardware['versions']['torch']}, OpenVINO "
        f"{result['openvino']}.",
    ]
    return "\n".join(lines) + "\n"


def measure(
    folder: Path,
    shape_xyz: tuple[int, int, int],
    backend: str,
    repeats: int,
    device: torch.device,
) -> tuple[dict[str, Any], np.ndarray]:
    """Return the seconds of one backend, and its labels, (z, y, x)."""
    began = time.perf_counter()
    chosen = choose_backend(backend, device)
    model = load_model(folder, folds=(0,), device=device, backend=chosen)
    row: dict[str, Any] = {"load_s": round(time.perf_counter() - began, 2)}
    image = make_image(model, shape_xyz)
    tile = image[None, :, : model.patch_size[0], : model.patch_size[1], : model.patch_size[2]]
    missing = [n - have for n, have in zip(model.patch_size, tile.shape[2:], strict=True)]
    pads = [n for size in missing[::-1] for n in (0, size)]
    tile = torch.nn.functional.pad(tile, pads).contiguous().to(device)
    wall, cpu = [], []
    digits = 2 if device.type == "cpu" else 4
    with inference_settings(device):
        for _ in range(1 + repeats):
            began, before = time.perf_counter(), cpu_s()
            model.forwards[0].body(tile)
            if device.type == "cuda":
                torch.cuda.synchronize()
            wall.append(round(time.perf_counter() - began, digits))
            cpu.append(round(cpu_s() - before, 2))
    row |= {"first_tile_s": wall[0], "tile_s": wall[1:], "tile_cpu_s": cpu[1:]}
    row |= {"median_tile_s": statistics.median(wall[1:])}
    row |= {"median_tile_cpu_s": statistics.median(cpu[1:])}
    return row, predict_labels(model, image, Tiling(step=0.8)).cpu().numpy()


def demo_labels(folder: Path, backend: str, device: torch.device) -> np.ndarray:
    """Return the labels (z, y, x) of the trained demonstration model, whose phantom is its own."""
    chosen = choose_backend(backend, device)
    model = load_model(folder, folds=(0,), device=device, backend=chosen)
    image = make_image(model, (125, 100, 125))
    return predict_labels(model, image, Tiling(step=0.8)).cpu().numpy()


def make_image(model: Model, shape_xyz: tuple[int, int, int]) -> torch.Tensor:
    """Return a normalised phantom at the model's spacing, (channels, z, y, x)."""
    spacing = [float(mm) for mm in model.configuration.spacing]
    phantom = make_phantom(SEED, shape_xyz=shape_xyz, spacing_mm=spacing[0])
    voxels = np.ascontiguousarray(phantom.ct.transpose(2, 1, 0), np.float32)[None]
    return to_network_image(voxels, spacing_mm=spacing, model=model).voxels


def cpu_s() -> float:
    """Return the CPU seconds of this process; on a shared machine they vary less than wall time."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def difference(labels: np.ndarray, reference: np.ndarray) -> dict[str, Any]:
    """Return the differing voxels, and the Dice of the classes."""
    rows = list(dice_and_sizes(pairs_of_labels(reference, labels)))
    return {
        "mean_dice": statistics.mean(dice for dice, size, _ in rows if size >= LARGE),
        "differing_voxels": int((labels != reference).sum()),
        "differing_share": float((labels != reference).mean()),
        "classes": int(np.count_nonzero(np.unique(reference))),
        **lowest_of(rows),
    }


if __name__ == "__main__":
    main()
