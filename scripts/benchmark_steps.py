"""Time single steps in one process: upstream's functions and totalfast's.

    python scripts/benchmark_steps.py HOME --json FILE [--repeats N]

- 117 masks of a 512x512x300 label map: ``write_masks``, and upstream's pool of six processes, each
  of which reads the label map once per mask.
- Statistics of a 488x404x336 scan: ``measure`` and upstream's ``get_basic_statistics``.
- A second call of one session with ``fast``: seconds outside the network, only totalfast. Only this
  step uses --device.

The label maps are resampled from the demonstration's phantom. HOME: stand-in weights of official
size from scripts/make_standin_weights.py. The files and statistics of both programs must be equal.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from benchmark_command import FORWARD_HOOK, add_device, compare_folders, machine, make_scan
from readme import write_table

MASKS_SHAPE, STATISTICS_SHAPE = (512, 512, 300), (488, 404, 336)
SPACING_MM = (0.75, 0.75, 1.0)
PROGRAMS = ("upstream", "totalfast")
UPSTREAM_THREADS = 6
"""Upstream's default for --nr_thr_saving."""


def size_text(shape: tuple[int, ...]) -> str:
    """Return a shape as text for tables."""
    return "x".join(map(str, shape))


def label_map(shape: tuple[int, int, int]) -> np.ndarray:
    """Return the phantom's labels, nearest neighbour, (x, y, z), Fortran order as in files."""
    from totalfast.demo.phantom import make_phantom

    labels = make_phantom(3).labels
    picks = [np.arange(n) * have // n for n, have in zip(shape, labels.shape, strict=True)]
    return np.asfortranarray(labels[np.ix_(*picks)])


def upstream_masks(labels: np.ndarray, folder: Path, scratch: Path) -> float:
    """Save masks as upstream's command does; return seconds."""
    from totalsegmentator.map_to_binary import class_map
    from totalsegmentator.nnunet import save_segmentation_nifti

    image = nib.Nifti1Image(labels, np.diag([*SPACING_MM, 1.0]))
    folder.mkdir()
    began = time.perf_counter()
    nib.save(image, scratch / "s01.nii.gz")
    rest = (scratch, folder, "None", image.header, "total", True)
    with get_context("fork").Pool(UPSTREAM_THREADS) as pool:
        results = [
            pool.starmap_async(save_segmentation_nifti, [(item, *rest)])
            for item in class_map["total"].items()
        ]
        for result in results:
            result.get()
    return time.perf_counter() - began


def our_masks(labels: np.ndarray, folder: Path) -> float:
    """Save masks as totalfast does; return seconds."""
    from totalfast.files.write import label_image, write_masks
    from totalfast.system.cores import usable_cores
    from totalfast.system.pending_files import PendingFiles
    from totalfast.upstream import CLASS_MAPS

    affine, names = np.diag([*SPACING_MM, 1.0]), CLASS_MAPS["total"]
    header = nib.Nifti1Image(labels, affine).header
    image = label_image(labels, affine=affine, header=header, names=names)
    began = time.perf_counter()
    with PendingFiles() as files:
        write_masks(image, names, folder=folder, files=files, threads=usable_cores())
        files.commit()
    return time.perf_counter() - began


def masks(repeats: int, scratch: Path) -> dict[str, Any]:
    """Time saving 117 masks with both programs."""
    labels = label_map(MASKS_SHAPE)
    seconds: dict[str, list[float]] = {"upstream": [], "totalfast": []}
    our_masks(labels, scratch / "warm")
    for repeat in range(repeats):
        ours, theirs = scratch / f"ours{repeat}", scratch / f"theirs{repeat}"
        seconds["totalfast"].append(our_masks(labels, ours))
        if repeat == 0:  # slow
            seconds["upstream"].append(upstream_masks(labels, theirs, scratch))
    compared = compare_folders("masks", scratch / "theirs0", scratch / "ours0")
    return {
        "what": f"117 masks of {size_text(MASKS_SHAPE)}",
        "seconds": seconds,
        "differing_voxels": compared.differing_voxels,
        "other_differences": compared.problems,
    }


def statistics_of_both(repeats: int, scratch: Path) -> dict[str, Any]:
    """Time measuring volumes and intensities with both programs."""
    from totalsegmentator.statistics import get_basic_statistics

    from totalfast.files.read import read_image
    from totalfast.labels.statistics import Wanted, measure
    from totalfast.upstream import CLASS_MAPS

    labels = label_map(STATISTICS_SHAPE)
    size = size_text(STATISTICS_SHAPE)
    scan = nib.load(make_scan(f"phantom:{size}:{'x'.join(map(str, SPACING_MM))}", scratch))
    image = read_image(scan)
    scan.get_fdata()  # upstream's command has read and cached the scan at this point too
    voxel_mm3 = np.prod(scan.header.get_zooms())
    seconds: dict[str, list[float]] = {"upstream": [], "totalfast": []}
    ours: Any = None
    for _ in range(repeats):
        began = time.perf_counter()
        ours = measure(labels, image, CLASS_MAPS["total"], voxel_mm3=voxel_mm3, wanted=Wanted())
        seconds["totalfast"].append(time.perf_counter() - began)
    began = time.perf_counter()
    expected = get_basic_statistics(labels, scan, quiet=True)
    seconds["upstream"].append(time.perf_counter() - began)
    count = len(np.unique(labels)) - 1
    return {
        "what": f"statistics of {count} structures in {size_text(STATISTICS_SHAPE)}",
        "seconds": seconds,
        "equal": json.dumps(ours) == json.dumps(expected),
    }


def second_call(repeats: int, scratch: Path, device: str = "cpu") -> dict[str, Any]:
    """Time the calls of a session, in total and outside the network."""
    import totalfast

    hook: dict[str, Any] = {}
    exec(FORWARD_HOOK, hook)  # noqa: S102 - our own code
    size = size_text(STATISTICS_SHAPE)
    scan = make_scan(f"phantom:{size}:{'x'.join(map(str, SPACING_MM))}", scratch)
    session = totalfast.Session(device=device)
    rows = []
    for repeat in range(1 + repeats):
        hook["spent"].clear()
        began = time.perf_counter()
        session.segment(scan, scratch / f"call{repeat}", fast=True, quiet=True)
        wall, network = time.perf_counter() - began, sum(hook["spent"])
        rows.append({"wall_s": wall, "network_s": network, "outside_s": wall - network})
    return {
        "what": f"`--fast`, one mask per class, {size_text(STATISTICS_SHAPE)}",
        "calls": rows,
    }


def table(steps: dict[str, Any]) -> str:
    """Return the medians of all steps as Markdown."""
    lines = ["| step | upstream | totalfast | speed-up |", "|---|---|---|---|"]
    for name in ("masks", "statistics"):
        step = steps[name]
        theirs, ours = (statistics.median(step["seconds"][program]) for program in PROGRAMS)
        lines.append(f"| {step['what']} | {theirs:.1f} s | {ours:.2f} s | {theirs / ours:.0f}x |")
    calls = steps["second call"]["calls"]
    for title, title_calls in (("first call", calls[:1]), ("later call", calls[1:])):
        wall, outside = (
            statistics.median(call[key] for call in title_calls) for key in ("wall_s", "outside_s")
        )
        lines.append(
            f"| {title} of a session, {steps['second call']['what']} | "
            f"| {wall:.1f} s, of which {outside:.1f} s outside the network | |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("home", type=Path, help="TOTALSEG_HOME_DIR with stand-in 297")
    parser.add_argument("--json", type=Path, required=True, help="write the results to this file")
    parser.add_argument("--repeats", type=int, default=3)
    add_device(parser)
    parser.add_argument(
        "--readme", action="store_true", help="also write the table in scripts/results"
    )
    options = parser.parse_args()
    os.environ["TOTALSEG_HOME_DIR"] = str(options.home.absolute())
    os.environ["TOTALFAST_BACKEND"] = "torch"
    result: dict[str, Any] = {"machine": machine(options.device), "steps": {}}
    for name, step in (
        ("masks", masks),
        ("statistics", statistics_of_both),
        ("second call", functools.partial(second_call, device=options.device)),
    ):
        with tempfile.TemporaryDirectory(prefix="totalfast-steps-") as scratch:
            step_result = result["steps"][name] = step(options.repeats, Path(scratch))
        if "seconds" in step_result:
            theirs, ours = (statistics.median(step_result["seconds"][who]) for who in PROGRAMS)
            step_result["times_faster"] = theirs / ours
        print(json.dumps(step_result, indent=1), flush=True)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    steps = result["steps"]
    if options.readme:
        write_table(Path(__file__).name, table(steps))
    return int(steps["masks"]["differing_voxels"] > 0 or not steps["statistics"]["equal"])


if __name__ == "__main__":
    sys.exit(main())
