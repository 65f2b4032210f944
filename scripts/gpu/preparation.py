"""The scan and the stand-in weights of the benchmark on a GPU."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time

from .programs import end
from .record import (
    ENVIRONMENT,
    HOME,
    ON_CPU,
    RESULTS,
    SCAN,
    SCRIPTS,
    SHAPE,
    TINY_HOME,
    WORK,
    record,
)

FITTED = ("297", "291")
"""The 3 mm model and the first part of the 1.5 mm model."""

COMPLETE = WORK / "prepared"
WHAT = f"{SHAPE}, {'tiny' if ON_CPU else 'official'} networks"
"""What was prepared, for the next call."""

PART_FOLDERS = {
    292: "part2_vertebrae_1532subj",
    293: "part3_cardiac_1559subj",
    294: "part4_muscles_1559subj",
    295: "part5_ribs_1559subj",
}


def prepare() -> None:
    """Make the scan, the weights, and the tiny weights of the tests, at the same time.

    What an earlier call has made is used again.
    """
    began = time.time()
    if is_prepared():
        record.keep("prepared", {"s": 0, "scan": SHAPE, "again": True})
        return
    makers = [_maker(HOME, [number], tiny=ON_CPU) for number in FITTED]
    tests = _maker(TINY_HOME, _ids_of_tests(), tiny=True)
    try:
        make_scan()
        scan_s = time.time() - began
        codes = [process.wait(max(record.seconds_left, 1.0)) for process in (*makers, tests)]
    finally:
        for process in (*makers, tests):
            end(process)
    copy_part_models()
    record.keep("prepared", {
        "s": round(time.time() - began, 1), "scan_s": round(scan_s, 1), "scan": SHAPE,
        "rc": codes,
    })  # fmt: skip
    if not any(codes):
        COMPLETE.write_text(WHAT)


def is_prepared() -> bool:
    """Whether an earlier call has made all."""
    return COMPLETE.exists() and COMPLETE.read_text() == WHAT


def _maker(home: object, ids: list[str], *, tiny: bool) -> subprocess.Popen[bytes]:
    words = [sys.executable, SCRIPTS / "make_standin_weights.py", home, "--ids", *ids]
    return subprocess.Popen(
        [str(word) for word in (*words, *(["--tiny"] if tiny else []))], env=ENVIRONMENT
    )


def _ids_of_tests() -> list[str]:
    from tests.conftest import TINY_IDS

    return [str(number) for number in TINY_IDS]


def make_scan() -> None:
    """Make or copy the scan."""
    from benchmark_command import make_scan as make

    made = make(SHAPE, WORK)
    if made != SCAN:
        shutil.copy(made, SCAN)


def copy_part_models() -> None:
    """Copy the first part of the 1.5 mm model to the other four, with other last layers."""
    import torch

    from totalfast.upstream import PART_CLASS_MAPS, PART_NAMES

    (first,) = RESULTS.glob("Dataset291_*/*")
    checkpoint = torch.load(first / "fold_0/checkpoint_final.pth", weights_only=False)
    dataset = json.loads((first / "dataset.json").read_text())
    for number, suffix in PART_FOLDERS.items():
        names = list(PART_CLASS_MAPS["total"][PART_NAMES["total"][number]].values())
        labels = {"background": 0} | {name: k + 1 for k, name in enumerate(names)}
        folder = RESULTS / f"Dataset{number}_TotalSegmentator_{suffix}" / first.name
        (folder / "fold_0").mkdir(parents=True, exist_ok=True)
        shutil.copy(first / "plans.json", folder)
        (folder / "dataset.json").write_text(json.dumps(dataset | {"labels": labels}))
        weights = dict(checkpoint["network_weights"])
        for key in [key for key in weights if ".seg_layers." in key]:
            old = weights[key]
            count = old.shape[0]
            rows = [k if k < count else 1 + (k * 7) % (count - 1) for k in range(len(labels))]
            weights[key] = old[torch.tensor(rows)].clone()
        torch.save(
            checkpoint | {"network_weights": weights}, folder / "fold_0/checkpoint_final.pth"
        )
