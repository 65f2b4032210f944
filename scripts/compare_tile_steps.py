"""Compare values of --tile_step_size in time and accuracy.

    python scripts/compare_tile_steps.py --json scripts/results/tile_steps.json [--readme]

The demonstration model segments synthetic phantoms at 3 mm with several steps. The phantoms are two
to three tiles long. The results are the Dice with the true labels and with the labels of the
default step, over structures of 1 ml or more, and the seconds of the network's forward passes. The
model was trained on phantoms that fit into one tile and has learned positions in it. It finds less
in other fields of view, and its labels depend more on the tiles than those of a model that was
trained on random patches.
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
"""Chosen so that each step has another total number of tiles, which have 128 slices of 3 mm."""
LEAST_ML = 1.0


class Clock:
    """Counts and times the forward passes of a network, whose last layer runs separately."""

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
        """Return tiles and seconds since the last call."""
        reading = {"tiles": self.tiles, "network_s": self.seconds}
        self.tiles, self.seconds = 0, 0.0
        return reading


@functools.cache
def clock() -> Clock:
    """Return the clock of the demonstration model in the session of ``totalfast.segment``."""
    from totalfast.options import Options
    from totalfast.session import default_session

    task = Options(fast=True).resolved_task()
    loaded = default_session().models.load(task, task.parts[0], device="cpu", backend="torch")
    return Clock(loaded.result().forwards[0])


def dice(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return the Dice of each of 256 labels; NaN if neither label map has the label."""
    size_one, size_other, both = (
        np.bincount(labels.ravel(), minlength=256) for labels in (one, other, one[one == other])
    )
    with np.errstate(invalid="ignore"):
        dice_by_label: NDArray[np.float64] = 2 * both / (size_one + size_other)
    return dice_by_label


def compare_seed(seed: int) -> list[dict[str, Any]]:
    """Return one row per step and length."""
    return [row for slices in SLICES for row in compare(seed, slices)]


def compare(seed: int, slices: int) -> list[dict[str, Any]]:
    """Return one row per step."""
    from totalfast.demo.phantom import make_phantom

    shape = (WIDTH, DEPTH, slices)
    phantom = make_phantom(seed, shape_xyz=shape, spacing_mm=SPACING_MM)
    truth = np.asarray(phantom.labels, dtype=np.uint8)
    sizes_ml = np.bincount(truth.ravel(), minlength=256) * SPACING_MM**3 / 1000
    counted = np.flatnonzero(sizes_ml[1:] >= LEAST_ML) + 1
    labels_by_step, readings = {}, {}
    for step in STEPS:
        clock().read()
        labels_by_step[step] = segmented(phantom, tile_step_size=step, backend="torch")
        readings[step] = clock().read()
    rows = []
    for step, labels in labels_by_step.items():
        default = labels_by_step[DEFAULT]
        same, true = (dice(labels, other)[counted] for other in (default, truth))
        row = {
            "seed": seed,
            "slices": slices,
            "step": step,
            **readings[step],
            "structures": len(counted),
            "dice_truth": float(np.mean(true)),
            "dice_default": float(np.nanmean(same)),
            "lowest_dice_default": float(np.nanmin(same)),
        }
        print({key: round(value, 4) for key, value in row.items()}, flush=True)
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Return the means over the phantoms of all lengths as Markdown."""
    lines = [
        "| step | tiles | time in the network | Dice, truth | Dice, labels of the default "
        "| lowest Dice, labels of the default |",
        "|---|---|---|---|---|---|",
    ]
    for step in STEPS:
        step_rows = [row for row in rows if row["step"] == step]
        mean = {key: statistics.mean(row[key] for row in step_rows) for key in step_rows[0]}
        lowest = min(row["lowest_dice_default"] for row in step_rows)
        lines.append(
            f"| {step}{' (default)' if step == DEFAULT else ''} | {mean['tiles']:.2f} "
            f"| {mean['network_s']:.1f} s | {mean['dice_truth']:.3f} "
            f"| {mean['dice_default']:.3f} | {lowest:.3f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(__file__, __doc__ or "", seeds=SEEDS, measure=compare_seed, table=table))
