"""Time the exports from logits to labels at the scan's resolution, on the same logits.

    python scripts/benchmark_export.py --json FILE [--quick] [--classes 118] ...
    python scripts/benchmark_export.py --json FILE --growth PICTURE

The exports are nnU-Net's default resampling (linear, class by class) and, with --quick, its torch
resampler, each with an argmax, and totalfast's ``nearest``, ``linear`` and ``plans``. The logits
are synthetic smooth fields. Their label map has about as many boundary cells as anatomy; the share
is reported. With --quick, nnU-Net's resamplers are timed on a few classes and extrapolated to all
classes, and the labels are compared for those classes only. (nnU-Net's torch resampler would need
37 GB for all 118 classes.)

With --growth, only ``nearest`` and ``linear`` are timed, with different numbers of classes, sizes
of the target, and shares of boundary cells (from noise in the logits).
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import torch
from benchmark_command import machine
from label_map_facts import label_map_facts
from readme import write_table

from totalfast.export import export_labels

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

QUICK_CLASSES = 4
SPACING = (3.0, 3.0, 3.0)
"""Isotropic, so that no axis is resampled separately."""

NOISE = 0.05
"""Standard deviation of the noise of the logits; structures differ by some units."""


def make_logits(
    classes: int, source: tuple[int, ...], seed: int, noise: float = NOISE
) -> torch.Tensor:
    """Return float16 logits (classes, z, y, x); each class is likely around one random point."""
    random = np.random.default_rng(seed)
    torch_random = torch.Generator().manual_seed(seed)
    grid = [
        torch.arange(n, dtype=torch.float32).reshape([-1 if axis == k else 1 for k in range(3)])
        for axis, n in enumerate(source)
    ]
    logits = torch.empty((classes, *source), dtype=torch.half)
    logits[0] = 1.0
    for k in range(1, classes):
        centre, width = random.uniform(0.15, 0.85, 3) * source, random.uniform(6, 22, 3)
        distance = sum(((g - c) / w) ** 2 for g, c, w in zip(grid, centre, width, strict=True))
        logits[k] = (8 - 6 * torch.as_tensor(distance)).clamp_min(-12) + noise * torch.randn(
            source, generator=torch_random
        )
    return logits


def measured(call: Callable[[], Any]) -> tuple[Any, float, float]:
    """Return the result of a call, its seconds, and its peak of additional bytes."""
    process = psutil.Process()
    before = peak = process.memory_info().rss
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    return result, seconds, peak - before


GROWTH: dict[str, tuple[tuple[int, tuple[int, int, int], float], ...]] = {
    "classes": tuple((n, (300, 512, 512), NOISE) for n in (8, 30, 60, 90, 118)),
    "million voxels": tuple(
        (118, shape, NOISE)
        for shape in ((100, 256, 256), (200, 384, 384), (300, 512, 512), (450, 640, 640))
    ),
    "boundary cells, %": tuple((118, (300, 512, 512), noise) for noise in (0.05, 0.3, 0.6, 1.0)),
}
"""Per series, the classes, target shape and noise of each point."""


def growth(source: tuple[int, int, int], repeats: int) -> dict[str, list[dict[str, float]]]:
    """Return median seconds of ``nearest`` and ``linear`` for each point of ``GROWTH``."""
    export_labels(make_logits(4, (4, 8, 8), 0), (8, 16, 16), method="linear")  # compiles
    series: dict[str, list[dict[str, float]]] = {}
    for name, points in GROWTH.items():
        for classes, target, noise in points:
            logits = make_logits(classes, source, seed=0, noise=noise)
            _, boundary = label_map_facts(export_labels(logits, source, method="nearest"))
            point = {
                "classes": classes,
                "million voxels": float(np.prod(target)) / 1e6,
                "boundary cells, %": 100 * boundary,
            }
            for method in ("nearest", "linear"):
                spacings = {"spacing": SPACING, "new_spacing": SPACING}
                call = partial(export_labels, logits, target, method=method, **spacings)
                point[method] = float(np.median([measured(call)[1] for _ in range(repeats)]))
            print(name, {key: round(value, 2) for key, value in point.items()}, flush=True)
            series.setdefault(name, []).append(point)
    return series


def plot_growth(series: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Plot one panel per series."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(series), figsize=(11, 3), layout="constrained")
    for panel, (name, points) in zip(panels, series.items(), strict=True):
        for method, marker in (("nearest", "o"), ("linear", "s")):
            panel.plot(
                [point[name] for point in points],
                [point[method] for point in points],
                marker=marker,
                label=method,
            )
        panel.set(xlabel=name, xlim=(0, None), ylim=(0, None))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("seconds")
    panels[0].legend()
    figure.savefig(path, dpi=110)


NAMES = {
    "nnunet_default": "nnU-Net, default",
    "nnunet_torch": "nnU-Net, torch resampler",
    "nearest": "totalfast, `nearest`",
    "linear": "totalfast, `linear`: equal to the default",
    "plans_torch": "totalfast, `plans` with nnU-Net's torch resampler",
}


def table(result: dict[str, Any]) -> str:
    """Return the result of one run as Markdown."""
    lines = [
        "| export | time | speed-up | memory in addition to the logits |",
        "|---|---|---|---|",
    ]
    faster = result["times_faster_than_nnunet_default"]
    few = result["nnunet_default_extrapolated_from_classes"]
    for name, run in result["runs"].items():
        estimated = name.startswith("nnunet") and few is not None
        memory = "not measured" if estimated else f"{run['peak_bytes'] / 1e9:.2f} GB"
        lines.append(
            f"| {NAMES[name]} | {run['seconds']:.{0 if run['seconds'] > 10 else 1}f} s"
            f"{' (estimated)' if estimated else ''} | {faster[name]:.0f}x | {memory} |"
        )
    text = (
        f"{result['case']} voxels; {result['boundary_cells']:.0%} of the cells lie at boundaries. "
    )
    if few is not None:
        classes = result["case"].split()[0]
        text += f"nnU-Net's times are times of {few} classes, multiplied by {classes}/{few}. "
    hardware = result["machine"]
    text += f"{hardware['cores']} cores of {hardware['processor']}."
    return "\n".join(lines) + f"\n\n{text}\n"


def main() -> int:
    """Command line."""
    from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape
    from nnunetv2.preprocessing.resampling.resample_torch import resample_torch_fornnunet

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument(
        "--quick", action="store_true", help="extrapolate nnU-Net's time from a few classes"
    )
    parser.add_argument("--classes", type=int, default=118)
    parser.add_argument("--source", type=int, nargs=3, default=(100, 134, 134), metavar="N")
    parser.add_argument("--target", type=int, nargs=3, default=(300, 512, 512), metavar="N")
    parser.add_argument("--repeats", type=int, default=3, help="runs of nearest and linear")
    parser.add_argument(
        "--readme", action="store_true", help="also write the table in scripts/results"
    )
    parser.add_argument(
        "--growth",
        type=Path,
        metavar="PICTURE",
        help="time nearest and linear only, and plot to this file",
    )
    options = parser.parse_args()
    source, target = tuple(options.source), tuple(options.target)
    if options.growth:
        series = growth(source, options.repeats)
        plot_growth(series, options.growth)
        content = {"source": source, "machine": machine(), "series": series}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
        return 0
    logits = make_logits(options.classes, source, seed=0)
    default = partial(
        resample_data_or_seg_to_shape, is_seg=False, order=1, order_z=0, force_separate_z=None
    )
    by_torch = partial(
        resample_torch_fornnunet,
        is_seg=False,
        force_separate_z=False,
        memefficient_seg_resampling=False,
        num_threads=torch.get_num_threads(),
    )
    ours = partial(export_labels, logits, target, spacing=SPACING, new_spacing=SPACING)
    compared = logits[: QUICK_CLASSES if options.quick else None]

    def reference(resample: Callable[..., Any]) -> NDArray[Any]:
        resampled = resample(compared, target, SPACING, SPACING)
        return np.asarray(torch.as_tensor(resampled).argmax(0))

    classes, boundary = label_map_facts(export_labels(logits, source, method="nearest"))
    export_labels(logits[:, :2, :8, :8], (4, 16, 16), method="linear")  # compiles
    result: dict[str, Any] = {
        "case": f"{options.classes} classes, {source} to {target}",
        "machine": machine(),
        "boundary_cells": boundary,
        "classes_present": classes,
        "nnunet_default_extrapolated_from_classes": len(compared) if options.quick else None,
        "runs": {},
    }

    def record(name: str, seconds: float, peak: float, **more: Any) -> None:
        result["runs"][name] = {"seconds": seconds, "peak_bytes": peak, **more}
        print(
            name, {key: round(value, 2) for key, value in result["runs"][name].items()}, flush=True
        )

    scale = options.classes / len(compared)
    expected, seconds, peak = measured(partial(reference, default))
    record("nnunet_default", scale * seconds, peak)
    if options.quick:
        _, seconds, peak = measured(partial(reference, by_torch))
        record("nnunet_torch", scale * seconds, peak)
    actual = export_labels(compared, target, method="linear", spacing=SPACING, new_spacing=SPACING)
    result["linear_differing_voxels"] = int(np.count_nonzero(actual != expected))
    result["linear_compared_classes"] = len(compared)
    del expected, actual
    labels_by: dict[str, NDArray[Any]] = {}
    for method in ("nearest", "linear"):
        runs = [measured(partial(ours, method=method)) for _ in range(options.repeats)]
        record(
            method,
            float(np.median([run[1] for run in runs])),
            max(run[2] for run in runs),
        )
        labels_by[method] = runs[-1][0]
    smooth = labels_by["linear"]
    result["nearest_differs_from_linear"] = float(np.mean(labels_by["nearest"] != smooth))
    labels, seconds, peak = measured(partial(ours, method="plans", resampling=by_torch))
    record("plans_torch", seconds, peak, differs_from_linear=float(np.mean(labels != smooth)))
    base = result["runs"]["nnunet_default"]["seconds"]
    result["times_faster_than_nnunet_default"] = {
        name: base / run["seconds"] for name, run in result["runs"].items()
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "machine"}, indent=1))
    if options.readme:
        write_table("benchmark_export.py", table(result))
    return int(result["linear_differing_voxels"] > 0)


if __name__ == "__main__":
    sys.exit(main())
