"""What fewer tiles cost: --tile_step_size against the default, in time and in labels.

    python scripts/compare_tile_steps.py --json scripts/results/tile_steps.json [--readme]

Made phantoms two to three of the demonstration model's tiles long are segmented at 3 mm with
several steps. Compared with the default's labels and with the truth, over the structures of 1 ml or
more: Dice. Seconds are those of the network's forward passes. That model was trained on phantoms
that fit into one tile and knows places in it: it finds less in other fields of view, and its labels
change more with the tiles than those of a model that was trained on random patches.
"""

from __future__ import annotations

import functools
import statistics
import sys
import time
from typing import TYPE_CHECKING, Any

import numpy as np
from on_phantoms import main, segmented

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn

SEEDS = (1, 2)
STEPS = (0.5, 0.8, 0.9, 1.0)
DEFAULT = 0.8
WIDTH, DEPTH, SPACING_MM = 250, 200, 1.5
SLICES = (400, 476, 500)
"""So that over all of them each step takes another number of tiles, of 128 slices at 3 mm."""
LEAST_ML = 1.0


class Clock:
    """Counts and times the forward passes of a network; its last layer is run by itself."""

    def __init__(self, forward: Any) -> None:
        self.tiles, self.seconds, self._began = 0, 0.0, 0.0
        for module in (forward.body, forward.head):
            module.register_forward_pre_hook(self._start)
            module.register_forward_hook(self._stop)

    def _start(self, module: nn.Module, inputs: Any) -> None:
        self._began = time.perf_counter()

    def _stop(self, module: nn.Module, inputs: Any, answer: Any) -> None:
        self.seconds += time.perf_counter() - self._began
        self.tiles += hasattr(module, "decoder")

    def read(self) -> dict[str, float]:
        """Tiles and seconds since the last reading."""
        found = {"tiles": self.tiles, "network_s": self.seconds}
        self.tiles, self.seconds = 0, 0.0
        return found


@functools.cache
def clock() -> Clock:
    """Watch the demonstration model of the session that ``totalfast.segment`` uses."""
    from totalfast.options import Options
    from totalfast.session import default_session

    task = Options(fast=True).resolved_task()
    loaded = default_session().load(task, task.parts[0], device="cpu", backend="torch")
    return Clock(loaded.result().forwards[0])


def dice(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Of each of 256 labels; NaN where neither has it."""
    size_one, size_other, both = (
        np.bincount(labels.ravel(), minlength=256) for labels in (one, other, one[one == other])
    )
    with np.errstate(invalid="ignore"):
        found: NDArray[np.float64] = 2 * both / (size_one + size_other)
    return found


def compare_seed(seed: int) -> list[dict[str, Any]]:
    """One row a step and length."""
    return [row for slices in SLICES for row in compare(seed, slices)]


def compare(seed: int, slices: int) -> list[dict[str, Any]]:
    """One row a step."""
    from totalfast.demo.phantom import make_phantom

    shape = (WIDTH, DEPTH, slices)
    phantom = make_phantom(seed, shape_xyz=shape, spacing_mm=SPACING_MM)
    truth = np.asarray(phantom.labels, dtype=np.uint8)
    sizes_ml = np.bincount(truth.ravel(), minlength=256) * SPACING_MM**3 / 1000
    counted = np.flatnonzero(sizes_ml[1:] >= LEAST_ML) + 1
    found, figures = {}, {}
    for step in STEPS:
        clock().read()
        found[step] = segmented(phantom, tile_step_size=step, backend="torch")
        figures[step] = clock().read()
    rows = []
    for step, labels in found.items():
        same, true = (dice(labels, other)[counted] for other in (found[DEFAULT], truth))
        row = {
            "seed": seed,
            "slices": slices,
            "step": step,
            **figures[step],
            "structures": len(counted),
            "dice_truth": float(np.mean(true)),
            "dice_default": float(np.nanmean(same)),
            "lowest_dice_default": float(np.nanmin(same)),
        }
        print({key: round(value, 4) for key, value in row.items()}, flush=True)
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Means over the phantoms of all lengths."""
    lines = [
        "| step | tiles | time in the network | Dice, truth | Dice, labels of the default "
        "| lowest Dice, labels of the default |",
        "|---|---|---|---|---|---|",
    ]
    for step in STEPS:
        some = [row for row in rows if row["step"] == step]
        mean = {key: statistics.mean(row[key] for row in some) for key in some[0]}
        lowest = min(row["lowest_dice_default"] for row in some)
        lines.append(
            f"| {step}{' (default)' if step == DEFAULT else ''} | {mean['tiles']:.2f} "
            f"| {mean['network_s']:.1f} s | {mean['dice_truth']:.3f} "
            f"| {mean['dice_default']:.3f} | {lowest:.3f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(__file__, __doc__ or "", seeds=SEEDS, measure=compare_seed, table=table))
