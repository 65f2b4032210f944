"""Time the TotalSegmentator command against totalfast on one input, as whole processes.

    python scripts/benchmark_command.py HOME SCAN --json FILE [--repeats N]
        [--backends torch openvino] [-- FLAGS ...]

Both commands, totalfast with each backend, run in turn on the same scan with the same weights
(HOME: stand-ins made by scripts/make_standin_weights.py). Recorded for each: wall and CPU seconds;
in one run more, because sampling slows a process down, the peak memory of the whole process tree
(sum of PSS, so that shared pages count once, sampled five times a second); seconds inside the
network's forward pass (hooks on the architecture's class, on convolutions outside of it and on
OpenVINO's call, loaded into both programs through sitecustomize); and the voxels that differ.
The first run of each begins with empty caches of numba and of converted networks. SCAN may be
"phantom:NXxNYxNZ:SXxSYxSZ": a made CT of that many voxels and that spacing in mm.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.parity.matrix import compare_folders, voxels_of
from totalfast.backends import BACKENDS

SAMPLE_S = 0.2
"""Reading the PSS stops the process for a moment, so not more often than needed."""

SETTLE_S = 20.0
"""Pause before each run: a machine is busy for some seconds with taking back a program's gigabytes,
which would be counted as the next program's time."""

PROGRAMS = {"upstream": "totalsegmentator.bin.TotalSegmentator", "totalfast": "totalfast"}

LARGE = 100
"""Voxels of a structure that one voxel does not change by a percent."""

FORWARD_HOOK = """
import atexit, os, sys, time

spent = []

def time_openvino(module):
    infer, calls = module._infer, []
    def timed(*arguments):
        if not calls:
            spent.clear()  # passes for the conversion
        began = time.perf_counter()
        y = infer(*arguments)
        spent.append(time.perf_counter() - began)
        calls.append(True)
        return y
    module._infer = timed

def time_forward(module):
    import torch

    forward, convolve, inside = module.PlainConvUNet.forward, torch.nn.Conv3d.forward, []
    def timed(self, x):
        began = time.perf_counter()
        inside.append(True)
        y = forward(self, x)
        inside.pop()
        spent.append(time.perf_counter() - began)
        return y
    def timed_layer(self, x):  # totalfast calls the last layer by itself
        if inside or not spent:  # another backend ran the rest
            return convolve(self, x)
        began = time.perf_counter()
        y = convolve(self, x)
        spent[-1] += time.perf_counter() - began
        return y
    module.PlainConvUNet.forward = timed
    torch.nn.Conv3d.forward = timed_layer

def report():
    if spent:
        with open(os.environ["TOTALFAST_FORWARD_LOG"], "a") as log:
            log.write(f"{sum(spent)} {len(spent)}\\n")

HOOKS = {
    "dynamic_network_architectures.architectures.unet": time_forward,
    "totalfast.backends.openvino": time_openvino,
}

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name not in HOOKS:
            return None
        specs = (f.find_spec(name, path, target) for f in sys.meta_path if f is not self)
        spec = next(found for found in specs if found is not None)
        execute = spec.loader.exec_module
        def exec_module(module):
            execute(module)
            HOOKS[name](module)
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Finder())
atexit.register(report)
"""
"""sitecustomize of both programs: adds up the seconds of the network's forward passes."""


def make_scan(description: str, folder: Path) -> Path:
    """Write the made CT that ``phantom:NXxNYxNZ:SXxSYxSZ`` describes, or return the file."""
    if not description.startswith("phantom:"):
        return Path(description).absolute()
    from scipy import ndimage

    from totalfast.demo.phantom import make_phantom

    _, shape_text, spacing_text = description.split(":")
    shape = tuple(int(n) for n in shape_text.split("x"))
    spacing = np.array([float(mm) for mm in spacing_text.split("x")])
    coarse_mm = 2.0
    coarse = tuple(
        max(int(round(n * mm / coarse_mm)), 8) for n, mm in zip(shape, spacing, strict=True)
    )
    made = make_phantom(3, shape_xyz=coarse, spacing_mm=coarse_mm)
    image = np.empty(shape, dtype=np.int16, order="F")
    ndimage.zoom(
        made.ct.astype(np.float32),
        [n / c for n, c in zip(shape, coarse, strict=True)],
        order=1,
        output=image,
        mode="nearest",
        grid_mode=True,
    )
    noise = np.random.default_rng(0).normal(0, 10, (shape[0], shape[1], 16)).astype(np.int16)
    for z in range(shape[2]):
        image[:, :, z] += noise[:, :, z % 16]
    path = folder / "ct.nii.gz"
    nib.save(nib.Nifti1Image(image, np.diag([*spacing, 1.0])), path)
    return path


class Watch:
    """Sums the PSS of a process and its descendants while it runs; keeps the peak."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.peak_bytes = 0
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        root = psutil.Process(self.process.pid)
        while self.process.poll() is None:
            total = 0
            try:
                family = [root, *root.children(recursive=True)]
            except psutil.Error:
                break
            for member in family:
                try:
                    total += member.memory_full_info().pss
                except psutil.Error:
                    continue
            self.peak_bytes = max(self.peak_bytes, total)
            time.sleep(SAMPLE_S)


def command(program: str, scan: Path, target: Path, flags: list[str]) -> list[str | Path]:
    """Command line of one of ``PROGRAMS``."""
    module = PROGRAMS[program]
    return [sys.executable, "-m", module, "-i", scan, "-o", target, "-d", "cpu", *flags]


def run(
    command: list[str | Path], environment: dict[str, str], *, timed: bool, watched: bool
) -> dict[str, float]:
    """Run one command; return wall and CPU seconds, and peak bytes of its process tree.

    Watching slows a command of a few seconds down.
    """
    if hasattr(os, "sync"):
        os.sync()  # what the last program wrote is not for this one to wait for
    time.sleep(SETTLE_S)
    before = os.times()
    began = time.perf_counter()
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    watch = Watch(process) if watched else None
    _, errors = process.communicate()
    wall = time.perf_counter() - began
    after = os.times()
    if process.returncode:
        raise RuntimeError(f"{command} failed: {errors.decode()[-2000:]}")
    cpu = (
        after.children_user + after.children_system - before.children_user - before.children_system
    )
    figures: dict[str, float] = {}
    if timed:
        figures |= {"wall_s": wall, "cpu_s": cpu}
    if watch is not None:
        figures["peak_bytes"] = watch.peak_bytes
    return figures


def forward_seconds(log: Path) -> dict[str, float]:
    """Read what the hook left."""
    lines = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
    if not lines:
        raise RuntimeError("the hook saw no forward pass")
    return {
        "network_s": sum(float(seconds) for seconds, _ in lines),
        "tiles": sum(int(count) for _, count in lines),
    }


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        processor = names[0].partition(":")[2].strip() if names else processor
    packages = ("totalfast", "TotalSegmentator", "nnunetv2", "torch", "numpy", "nibabel")
    return {
        "processor": processor,
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30),
        "python": platform.python_version(),
        "system": platform.platform(),
        "versions": {name: version(name) for name in packages},
    }


def differences(name: str, expected: Path, actual: Path) -> dict[str, Any]:
    """Differing voxels and files, and the lowest Dice of a class."""
    compared = compare_folders(name, expected, actual)
    worst, worst_large = 1.0, 1.0
    for ours, theirs in pairs_of_masks(expected, actual):
        size = np.count_nonzero(theirs)
        if both := size + np.count_nonzero(ours):
            dice = 2 * np.count_nonzero(ours & theirs) / both
            worst = min(worst, dice)
            worst_large = min(worst_large, dice) if size >= LARGE else worst_large
    return {
        "voxels": compared.voxels,
        "differing_voxels": compared.differing_voxels,
        "lowest_dice": worst,
        "lowest_dice_of_large": worst_large,
        "other_differences": compared.problems,
        "classes_present": compared.classes,
        "boundary_cells": compared.boundary,
    }


def pairs_of_masks(expected: Path, actual: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Each class's mask of totalfast and of upstream, from one file or from a file a class."""
    for path in sorted(expected.rglob("*.nii.gz")):
        theirs = voxels_of(nib.load(path))
        ours = voxels_of(nib.load(actual / path.relative_to(expected)))
        labels = np.flatnonzero(np.bincount(theirs.ravel(order="K")))
        for label in labels[labels > 0]:
            yield ours == label, theirs == label


def benchmark(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Run both programs in turn and compare what they leave."""
    scan = make_scan(options.scan, scratch)
    image = nib.load(scan)
    hook = scratch / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(FORWARD_HOOK)
    log = scratch / "forward.log"
    base = {**os.environ, "TOTALSEG_HOME_DIR": str(options.home.absolute())}
    base |= {"PYTHONPATH": str(hook), "TOTALFAST_FORWARD_LOG": str(log)}
    runs = {"upstream": base} | {
        f"totalfast {backend}": base
        | {
            "TOTALFAST_BACKEND": backend,
            "TOTALFAST_CACHE_DIR": str(scratch / f"cache-{backend}"),
            "NUMBA_CACHE_DIR": str(scratch / f"cache-{backend}"),
        }
        for backend in options.backends
    }
    name = "seg.nii.gz" if "-ml" in options.flags or "--ml" in options.flags else "seg"
    result: dict[str, Any] = {
        "case": options.name or f"{options.scan} {' '.join(options.flags)}",
        "flags": options.flags,
        "scan": {
            "source": options.scan if options.scan.startswith("phantom:") else scan.name,
            "shape": list(image.shape),
            "spacing_mm": [round(float(mm), 4) for mm in image.header.get_zooms()[:3]],
        },
        "weights": "stand-in weights, not TotalSegmentator's (scripts/make_standin_weights.py)",
        "machine": machine(),
        "runs": {label: [] for label in runs},
        "peak_bytes": {},
        "compared": {},
    }
    for repeat in range(options.repeats):
        for label, environment in runs.items():
            log.unlink(missing_ok=True)
            target = scratch / label / str(repeat) / name
            words = command(label.split()[0], scan, target, options.flags)
            figures = run(words, environment, timed=True, watched=options.watch_timed)
            figures |= forward_seconds(log)
            if options.watch_timed:
                result["peak_bytes"][label] = figures.pop("peak_bytes")
            figures["outside_network_s"] = figures["wall_s"] - figures["network_s"]
            result["runs"][label].append(figures)
            print(label, {key: round(value, 2) for key, value in figures.items()}, flush=True)
    for label, environment in runs.items():
        target = scratch / label / "watched" / name
        words = command(label.split()[0], scan, target, options.flags)
        if not options.watch_timed:
            watched = run(words, environment, timed=False, watched=True)
            result["peak_bytes"][label] = watched["peak_bytes"]
        if label != "upstream":
            result["compared"][label] = differences(
                result["case"], scratch / "upstream" / "0", scratch / label / "0"
            )
    result["median"] = {
        label: {key: statistics.median(run[key] for run in some) for key in some[0]}
        for label, some in result["runs"].items()
    }
    result["ratios"] = {label: ratios(result, label) for label in runs if label != "upstream"}
    return result


def ratios(result: dict[str, Any], label: str) -> dict[str, float]:
    """How totalfast compares with upstream."""
    theirs, ours = result["median"]["upstream"], result["median"][label]
    peaks = result["peak_bytes"]
    return {
        "wall": theirs["wall_s"] / ours["wall_s"],
        "outside_network": theirs["outside_network_s"] / ours["outside_network_s"],
        "peak_memory_share": peaks[label] / peaks["upstream"],
    }


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("home", type=Path, help="TOTALSEG_HOME_DIR with stand-ins")
    parser.add_argument("scan", help="a NIfTI file, or phantom:NXxNYxNZ:SXxSYxSZ")
    parser.add_argument("--json", type=Path, required=True, help="write the figures here")
    parser.add_argument("--name", help="what the case is called in tables")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument(
        "--watch-timed",
        action="store_true",
        help="measure memory in the timed runs, if they are long",
    )
    parser.add_argument("--backends", nargs="+", choices=BACKENDS[1:], default=["torch"])
    arguments = sys.argv[1:]
    split = arguments.index("--") if "--" in arguments else len(arguments)
    options = parser.parse_args(arguments[:split])
    options.flags = arguments[split + 1 :]  # flags of both commands
    with tempfile.TemporaryDirectory(prefix="totalfast-benchmark-") as scratch:
        result = benchmark(options, Path(scratch))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    for label, compared in result["compared"].items():
        gains = result["ratios"][label]
        print(
            f"{result['case']}, {label}: {gains['wall']:.1f} times faster, "
            f"{gains['outside_network']:.1f} times outside the network, "
            f"{gains['peak_memory_share']:.0%} of the memory, "
            f"{compared['differing_voxels']} of {compared['voxels']} voxels differ, lowest Dice "
            f"of {LARGE} voxels or more {compared['lowest_dice_of_large']:.4f}, "
            f"{compared['classes_present']} classes, {compared['boundary_cells']:.1%} boundary"
        )
    exact = result["compared"].get("totalfast torch", {"differing_voxels": 0})
    return int(exact["differing_voxels"] > 0)


if __name__ == "__main__":
    sys.exit(main())
