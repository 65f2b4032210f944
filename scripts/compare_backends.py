"""Measure what the backends cost and change: seconds for a tile, and labels against torch's.

Takes a model folder of official size, such as scripts/make_standin_weights.py makes, and a phantom
at that model's spacing; writes JSON.

    python scripts/compare_backends.py HOME/nnunet/results/Dataset297*/* --shape 125x100x190
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmark_command import lowest_dice, pairs_of_labels

from totalfast.backends import choose_backend
from totalfast.demo.phantom import make_phantom
from totalfast.sliding_window import Tiling, inference_settings, predict_labels
from totalfast.stages.normalise import to_network_image
from totalfast.weights import Model, load_model

CPU = torch.device("cpu")
SEED = 3


def main() -> None:
    """Run all backends on one image and compare their labels with the first one's."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path, help="folder with plans.json")
    parser.add_argument("--shape", default="125x100x190", help="voxels along x, y and z")
    parser.add_argument("--backends", nargs="+", default=["torch", "compile", "openvino"])
    parser.add_argument("--repeats", type=int, default=3, help="single tiles to time")
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()
    x, y, z = map(int, options.shape.split("x"))
    found = {
        "shape_xyz": [x, y, z],
        "model": options.model.parent.name,
        "cpu": platform.processor() or platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "openvino")},
        "backends": {},
    }
    reference = None
    for backend in options.backends:
        row, labels = measure(options.model, (x, y, z), backend, options.repeats)
        if reference is None:
            reference = labels
        else:
            row |= difference(labels, reference)
        found["backends"][backend] = row
        print(backend, json.dumps(row), flush=True)
    if options.output:
        options.output.write_text(json.dumps(found, indent=2) + "\n")


def measure(
    folder: Path, shape_xyz: tuple[int, int, int], backend: str, repeats: int
) -> tuple[dict[str, Any], np.ndarray]:
    """Seconds of one backend, and its labels (z, y, x)."""
    began = time.perf_counter()
    model = load_model(folder, folds=(0,), device=CPU, backend=choose_backend(backend, CPU))
    row: dict[str, Any] = {"load_s": round(time.perf_counter() - began, 2)}
    image = make_image(model, shape_xyz)
    tile = image[None, :, : model.patch_size[0], : model.patch_size[1], : model.patch_size[2]]
    missing = [n - have for n, have in zip(model.patch_size, tile.shape[2:], strict=True)]
    pads = [n for size in missing[::-1] for n in (0, size)]
    tile = torch.nn.functional.pad(tile, pads).contiguous()
    wall, cpu = [], []
    with inference_settings(CPU):
        for _ in range(1 + repeats):
            began, before = time.perf_counter(), cpu_s()
            model.forwards[0].body(tile)
            wall.append(round(time.perf_counter() - began, 2))
            cpu.append(round(cpu_s() - before, 2))
    row |= {"first_tile_s": wall[0], "tile_s": wall[1:], "tile_cpu_s": cpu[1:]}
    row |= {"median_tile_s": statistics.median(wall[1:])}
    row |= {"median_tile_cpu_s": statistics.median(cpu[1:])}
    return row, predict_labels(model, image, Tiling(step=0.8)).numpy()


def make_image(model: Model, shape_xyz: tuple[int, int, int]) -> torch.Tensor:
    """A phantom at the model's spacing, as its network gets it: (channels, z, y, x)."""
    spacing = [float(mm) for mm in model.configuration.spacing]
    phantom = make_phantom(SEED, shape_xyz=shape_xyz, spacing_mm=spacing[0])
    voxels = np.ascontiguousarray(phantom.ct.transpose(2, 1, 0), np.float32)[None]
    return torch.from_numpy(to_network_image(voxels, spacing_mm=spacing, model=model).voxels)


def cpu_s() -> float:
    """Seconds that this process has computed: on a shared machine more telling than the clock."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def difference(labels: np.ndarray, reference: np.ndarray) -> dict[str, Any]:
    """Differing voxels, and the lowest Dice of a class."""
    return {
        "differing_voxels": int((labels != reference).sum()),
        "differing_share": float((labels != reference).mean()),
        "classes": int(np.count_nonzero(np.unique(reference))),
        **lowest_dice(pairs_of_labels(reference, labels)),
    }


if __name__ == "__main__":
    main()
