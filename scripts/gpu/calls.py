"""Steps that measure inside a process: sessions, memory, tiles of the network, the export."""

from __future__ import annotations

from typing import Any

from .labels import differing
from .programs import in_turn, measured
from .record import DEVICE, OUT, SCAN, SCRIPTS, WORK, record

SETTINGS = (
    "default", "search", "deterministic", "batch 2", "batch 2, search", "CUDA graph",
    "channels last", "compile",
)  # fmt: skip
"""Of ``measure_network.py``; the first is compared with the others."""

SEARCHED = {"default": "search", "batch 2": "batch 2, search"}
"""Settings without cuDNN's search for algorithms, and the same with it."""

LIMITS_GB = (0, 4, 3, 6, 8, 16)
"""Limits of torch's memory; 0 is none."""


def step_machine() -> None:
    """Card, processor and versions."""
    record.keep("machine", measured("measure_parts.py", "machine", DEVICE))


def step_session() -> None:
    """Calls in one process, one after the other, with torch's peak of memory."""
    record.keep("session", measured("measure_calls.py", "session", DEVICE, SCAN))


def step_export() -> None:
    """118 classes, 100x134x134 to 300x512x512, logits on the device."""
    record.keep("export", measured("measure_parts.py", "export", DEVICE))


def step_profile() -> None:
    """Functions of later calls and kernels of --fast, in $OUT/where.txt."""
    words = [DEVICE, SCAN, WORK / "profile.nii.gz", OUT / "where.txt"]
    record.keep("profile", measured("measure_calls.py", "profile", *words, limit_s=120.0))


def step_network() -> None:
    """Tiles of the official networks: each setting in a process of its own."""
    folder = WORK / "tiles"
    folder.mkdir(exist_ok=True)
    for path in folder.glob("*.npy"):
        path.unlink()
    script = SCRIPTS / "gpu/measure_network.py"
    children = {setting: [script, setting, DEVICE, folder] for setting in SETTINGS}
    rows: dict[str, Any] = {}
    for setting, row in in_turn(children, limit_s=60.0):
        rows[setting] = row
        record.keep("network", rows)
    record.keep("network", rows | {"break_even_tiles": break_even(rows)})


def break_even(rows: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Per model, the tiles from which on cuDNN's search takes less time than it costs.

    None means never: the tiles are not faster.
    """
    found: dict[str, dict[str, Any]] = {}
    for without, searched in SEARCHED.items():
        for model in rows.get(without, {}).keys() & rows.get(searched, {}).keys():
            slow, fast = rows[without][model], rows[searched][model]
            if not (isinstance(slow, dict) and isinstance(fast, dict)):
                continue
            gain_s = (slow["ms_per_tile"] - fast["ms_per_tile"]) / 1e3
            cost_s = fast["first_tile_s"] - slow["first_tile_s"]
            tiles = None if gain_s <= 0 else round(max(cost_s, 0.0) / gain_s, 1)
            found.setdefault(without, {})[model] = tiles
    return found


def step_memory() -> None:
    """One call of 1.5 mm and one of --fast within limits of torch's memory."""
    folder = WORK / "memory"
    folder.mkdir(exist_ok=True)
    script = SCRIPTS / "gpu/measure_calls.py"
    children = {}
    for limit in LIMITS_GB:
        for mode in ("total", "fast"):
            target = folder / f"{mode}-{limit}.nii.gz"
            target.unlink(missing_ok=True)
            words = [script, "memory", DEVICE, SCAN, limit, mode, target]
            children[f"{mode}-{limit}"] = words
    rows: dict[str, Any] = {}
    for name, row in in_turn(children, limit_s=60.0):
        mode, _, limit = name.partition("-")
        if limit != "0" and "s" in row:
            row["vs_unlimited"] = differing(folder / f"{mode}-0.nii.gz", folder / f"{name}.nii.gz")
        rows[name] = row
        record.keep("memory", rows)
