"""Time the TotalSegmentator command and totalfast on one input, as whole processes.

    python scripts/benchmark_command.py HOME SCAN --json FILE [--repeats N]
        [--backends torch openvino winograd] [--device gpu] [-- FLAGS ...]

Both commands, totalfast with each backend, run in turn on the same scan with the same weights
(HOME: stand-in weights from scripts/make_standin_weights.py). SCAN may be
"phantom:NXxNYxNZ:SXxSYxSZ": a synthetic CT with NX x NY x NZ voxels and a spacing of SX, SY and SZ
mm. For each program the results are:

- wall and CPU seconds;
- seconds in the network's forward pass, from hooks on the architecture's class, on convolutions
  outside of it, and on the calls of the other backends; sitecustomize loads the hooks into both
  programs;
- peak memory of the process tree: the sum of the PSS, which counts shared pages once, sampled five
  times per second. Sampling slows a process down, so memory has its own run unless --watch-timed is
  given;
- the number of differing voxels.

In the first run of totalfast with each backend, the caches of numba and of converted networks are
empty. On a GPU upstream runs without cucim (scripts/gpu/upstream.py), and the hooks wait for the
device after each call.
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
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.parity.matrix import compare_folders, voxels_of

SAMPLE_S = 0.2
"""Minimum pause between two readings of the PSS."""

WATCHED_SHARE = 0.05
"""Maximum share of a timed run for reading the PSS, which blocks the process's allocations."""

SETTLE_S = 20.0
"""Pause before each run. The system needs some seconds to free the memory of the previous program,
which would slow down the next one."""

PROGRAMS = {"upstream": "totalsegmentator.bin.TotalSegmentator", "totalfast": "totalfast"}

UPSTREAM_ON_GPU = Path(__file__).parent / "gpu" / "upstream.py"

BACKENDS = ("torch", "openvino", "winograd")
"""Backends that the hook can time. ``compile`` is not one: torch would compile the hook too."""

WEIGHTS = "stand-in weights, not TotalSegmentator's (scripts/make_standin_weights.py)"

LARGE = 100
"""Minimum voxels of a large structure; one voxel changes its Dice by less than 1 %."""

FORWARD_HOOK = """
import atexit, os, sys, threading, time

spent, here = [], threading.local()

def timed(function, *, begins):
    # A nested call is part of the outer call. Calls while a network is converted do not count.
    def call(*arguments, **keywords):
        if getattr(here, "busy", False) or not (begins or spent):
            return function(*arguments, **keywords)
        here.busy = True
        began = time.perf_counter()
        try:
            return function(*arguments, **keywords)
        finally:
            here.busy = False
            torch = sys.modules.get("torch")
            if torch is not None and torch.cuda.is_initialized():
                torch.cuda.synchronize()
            seconds = time.perf_counter() - began
            if begins:
                spent.append(seconds)
            else:
                spent[-1] += seconds
    return call

def untimed(function):
    def call(*arguments, **keywords):
        here.busy = True
        try:
            return function(*arguments, **keywords)
        finally:
            here.busy = False
    return call

def time_openvino(module):
    module.Compiled.__call__ = timed(module.Compiled.__call__, begins=True)
    module.convert_network = untimed(module.convert_network)

def time_winograd(module):
    module.Program.__call__ = timed(module.Program.__call__, begins=True)

def time_last_layer(module):
    module.LastLayer.forward = timed(module.LastLayer.forward, begins=False)

def time_adding_layer(module):
    # Adds its logits to the window's sums, too.
    module.AddingLastLayer.add_to = timed(module.AddingLastLayer.add_to, begins=False)

def time_forward(module):
    import torch

    module.PlainConvUNet.forward = timed(module.PlainConvUNet.forward, begins=True)
    # totalfast calls the last layer separately.
    torch.nn.Conv3d.forward = timed(torch.nn.Conv3d.forward, begins=False)

def report():
    if spent and "TOTALFAST_FORWARD_LOG" in os.environ:
        with open(os.environ["TOTALFAST_FORWARD_LOG"], "a") as log:
            log.write(f"{sum(spent)} {len(spent)}\\n")

HOOKS = {
    "dynamic_network_architectures.architectures.unet": time_forward,
    "totalfast.backends.openvino": time_openvino,
    "totalfast.backends.last_layer": time_last_layer,
    "totalfast.backends.winograd.head": time_adding_layer,
    "totalfast.backends.winograd.program": time_winograd,
}

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name not in HOOKS:
            return None
        specs = (f.find_spec(name, path, target) for f in sys.meta_path if f is not self)
        spec = next(candidate for candidate in specs if candidate is not None)
        execute = spec.loader.exec_module
        def exec_module(module):
            execute(module)
            HOOKS[name](module)
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Finder())
atexit.register(report)
"""
"""sitecustomize of both programs; sums the seconds of the network's forward passes."""


def make_scan(description: str, folder: Path) -> Path:
    """Write the synthetic CT of ``phantom:NXxNYxNZ:SXxSYxSZ``, or return the path of a file."""
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
    phantom = make_phantom(3, shape_xyz=coarse, spacing_mm=coarse_mm)
    image = np.empty(shape, dtype=np.int16, order="F")
    ndimage.zoom(
        phantom.ct.astype(np.float32),
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
    """Samples a process and its descendants in a thread; keeps peaks of PSS and their number.

    Uses at most ``share`` of the time.
    """

    def __init__(self, process: subprocess.Popen[bytes], *, share: float = 1.0) -> None:
        self.process = process
        self.share = share
        self.peak_bytes = self.processes = 0
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        root = psutil.Process(self.process.pid)
        while self.process.poll() is None:
            total, began = 0, time.perf_counter()
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
            self.processes = max(self.processes, len(family))
            time.sleep(max(SAMPLE_S, (time.perf_counter() - began) / self.share))


def command(
    program: str, scan: Path, target: Path, flags: list[str], *, device: str = "cpu"
) -> list[str | Path]:
    """Return the command line of one of ``PROGRAMS``."""
    start: list[str | Path] = ["-m", PROGRAMS[program]]
    if program == "upstream" and device != "cpu":
        start = [UPSTREAM_ON_GPU]
    return [sys.executable, *start, "-i", scan, "-o", target, "-d", device, *flags]


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add --device, in totalfast's words."""
    parser.add_argument("--device", default="cpu", help="cpu, gpu or gpu:X; default: %(default)s")


def parse_with_flags(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the arguments; words after ``--`` become ``flags``, the flags of the commands."""
    arguments = sys.argv[1:]
    split = arguments.index("--") if "--" in arguments else len(arguments)
    options = parser.parse_args(arguments[:split])
    options.flags = arguments[split + 1 :]
    return options


def target_name(flags: list[str]) -> str:
    """Return the name for -o: a file or a folder."""
    return "seg.nii.gz" if {"-ml", "--ml"} & set(flags) else "seg"


def run(
    command: list[str | Path],
    environment: dict[str, str],
    *,
    timed: bool,
    watched: bool,
    settle_s: float = SETTLE_S,
    folder: Path | None = None,
) -> dict[str, float]:
    """Run one command in a folder; return wall and CPU seconds, and what ``Watch`` measured.

    Sampling the memory slows down short commands.
    """
    if hasattr(os, "sync"):
        os.sync()  # this program must not wait for files of the previous one
    time.sleep(settle_s)
    before = os.times()
    began = time.perf_counter()
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=folder
    )
    watch = Watch(process, share=WATCHED_SHARE if timed else 1.0) if watched else None
    _, errors = process.communicate()
    wall = time.perf_counter() - began
    after = os.times()
    if process.returncode:
        raise RuntimeError(f"{command} failed: {errors.decode()[-2000:]}")
    cpu = (
        after.children_user + after.children_system - before.children_user - before.children_system
    )
    measured: dict[str, float] = {}
    if timed:
        measured |= {"wall_s": wall, "cpu_s": cpu}
    if watch is not None:
        measured |= {"peak_bytes": watch.peak_bytes, "processes": watch.processes}
    return measured


def forward_seconds(log: Path) -> dict[str, float]:
    """Read the log of the hook: seconds and tiles."""
    lines = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
    if not lines:
        raise RuntimeError("The hook recorded no forward pass.")
    return {
        "network_s": sum(float(seconds) for seconds, _ in lines),
        "tiles": sum(int(count) for _, count in lines),
    }


def machine(device: str = "cpu") -> dict[str, Any]:
    """Return the hardware and the versions; the card too, unless the device is the CPU."""
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        processor = names[0].partition(":")[2].strip() if names else processor
    packages = ("totalfast", "TotalSegmentator", "nnunetv2", "torch", "numpy", "nibabel")
    card = {}
    if device != "cpu":
        import torch

        card = {"gpu": torch.cuda.get_device_name()}
    return card | {
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
    """Return differing voxels and files, and the lowest Dice of a class."""
    compared = compare_folders(name, expected, actual)
    return {
        "voxels": compared.voxels,
        "differing_voxels": compared.differing_voxels,
        **lowest_dice(pairs_of_masks(expected, actual)),
        "other_differences": compared.problems,
        "classes_present": compared.classes,
        "boundary_cells": compared.boundary,
    }


def lowest_dice(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    """Return the lowest Dice of all classes, and of classes with at least ``LARGE`` voxels."""
    return lowest_of(dice_and_sizes(pairs))


def lowest_of(rows: Iterable[tuple[float, int, int]]) -> dict[str, float]:
    """``lowest_dice`` of the rows of ``dice_and_sizes``."""
    every, large = [1.0], [1.0]
    for dice, *sizes in rows:
        every.append(dice)
        large += every[-1:] if max(sizes) >= LARGE else []
    return {"lowest_dice": min(every), "lowest_dice_of_large": min(large)}


def dice_and_sizes(
    pairs: Iterable[tuple[np.ndarray, np.ndarray]],
) -> Iterator[tuple[float, int, int]]:
    """Yield the Dice of pairs of masks, and their numbers of voxels, unless both are empty."""
    for one, two in pairs:
        sizes = int(np.count_nonzero(one)), int(np.count_nonzero(two))
        if any(sizes):
            yield 2 * int(np.count_nonzero(one & two)) / sum(sizes), *sizes


def pairs_of_masks(expected: Path, actual: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield pairs of masks per class from files that differ: label maps or one mask per class."""
    for path in sorted(expected.rglob("*.nii.gz")):
        other = actual / path.relative_to(expected)
        if not other.exists():
            continue
        one, two = voxels_of(nib.load(path)), voxels_of(nib.load(other))
        if one.shape != two.shape or np.array_equal(one, two):
            continue
        if one.max() <= 1 and two.max() <= 1:
            yield one.view(np.bool_), two.view(np.bool_)
        else:
            yield from pairs_of_labels(one, two)


def pairs_of_labels(one: np.ndarray, two: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield pairs of masks for each label that one of the maps has."""
    present = np.bincount(one.ravel(order="K"), minlength=256)
    present += np.bincount(two.ravel(order="K"), minlength=256)
    for label in np.flatnonzero(present[1:]) + 1:
        yield one == label, two == label


def benchmark(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Run both programs in turn and compare their files."""
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
    name = target_name(options.flags)
    result: dict[str, Any] = {
        "case": options.name or f"{options.scan} {' '.join(options.flags)}",
        "flags": options.flags,
        "scan": {
            "source": options.scan if options.scan.startswith("phantom:") else scan.name,
            "shape": list(image.shape),
            "spacing_mm": [round(float(mm), 4) for mm in image.header.get_zooms()[:3]],
        },
        "weights": WEIGHTS,
        "machine": machine(options.device),
        "runs": {label: [] for label in runs},
        "watched_while_timed": options.watch_timed,
        "peak_bytes": dict.fromkeys(runs, 0),
        "compared": {},
    }
    for repeat in range(options.repeats):
        for label, environment in runs.items():
            log.unlink(missing_ok=True)
            target = scratch / label / str(repeat) / name
            target.parent.mkdir(parents=True)  # upstream does not create it with --fast -s
            words = command(label.split()[0], scan, target, options.flags, device=options.device)
            measured = run(words, environment, timed=True, watched=options.watch_timed)
            measured |= forward_seconds(log)
            if options.watch_timed:
                del measured["processes"]
                peak = max(result["peak_bytes"][label], measured.pop("peak_bytes"))
                result["peak_bytes"][label] = peak
            measured["outside_network_s"] = measured["wall_s"] - measured["network_s"]
            result["runs"][label].append(measured)
            print(label, {key: round(value, 2) for key, value in measured.items()}, flush=True)
    for label, environment in runs.items():
        if not options.watch_timed:
            target = scratch / label / "watched" / name
            target.parent.mkdir(parents=True)
            words = command(label.split()[0], scan, target, options.flags, device=options.device)
            watched = run(words, environment, timed=False, watched=True)
            result["peak_bytes"][label] = watched["peak_bytes"]
        if label != "upstream":
            result["compared"][label] = differences(
                result["case"], scratch / "upstream" / "0", scratch / label / "0"
            )
    result["median"] = {
        label: {key: statistics.median(run[key] for run in label_runs) for key in label_runs[0]}
        for label, label_runs in result["runs"].items()
    }
    result["ratios"] = {label: ratios(result, label) for label in runs if label != "upstream"}
    return result


def ratios(result: dict[str, Any], label: str) -> dict[str, float]:
    """Return the ratios of upstream's to totalfast's time, and totalfast's share of the memory."""
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
    parser.add_argument("home", type=Path, help="TOTALSEG_HOME_DIR with stand-in weights")
    parser.add_argument("scan", help="a NIfTI file, or phantom:NXxNYxNZ:SXxSYxSZ")
    parser.add_argument("--json", type=Path, required=True, help="write the results to this file")
    parser.add_argument("--name", help="name of the case in the table")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument(
        "--watch-timed",
        action="store_true",
        help="measure memory in the timed runs; only for long runs",
    )
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=["torch"])
    add_device(parser)
    options = parse_with_flags(parser)
    with tempfile.TemporaryDirectory(prefix="totalfast-benchmark-") as scratch:
        result = benchmark(options, Path(scratch))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    for label, compared in result["compared"].items():
        ratio = result["ratios"][label]
        print(
            f"{result['case']}, {label}: {ratio['wall']:.1f} times faster, "
            f"{ratio['outside_network']:.1f} times outside the network, "
            f"{ratio['peak_memory_share']:.0%} of the memory, "
            f"{compared['differing_voxels']} of {compared['voxels']} voxels differ, lowest Dice "
            f"of {LARGE} voxels or more {compared['lowest_dice_of_large']:.4f}, "
            f"{compared['classes_present']} classes, {compared['boundary_cells']:.1%} boundary"
        )
    exact = result["compared"].get("totalfast torch")
    return int(bool(exact and (exact["differing_voxels"] or exact["other_differences"])))


if __name__ == "__main__":
    sys.exit(main())
