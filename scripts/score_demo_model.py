"""Score the demonstration model on ten phantoms that it has not seen.

    python scripts/score_demo_model.py --json scripts/results/demo_model.json

Each phantom is segmented with ``--fast --export linear``, as ``totalfast demo`` does, and compared
with its truth: Dice of every structure of 1 ml or more. Beside it stands what thresholds can do:
for each structure and each phantom the best interval of HU there is, chosen with the truth at hand.
The table in README is written from the JSON.
"""

from __future__ import annotations

import statistics
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
from on_phantoms import main, segmented

if TYPE_CHECKING:
    from numpy.typing import NDArray

SEEDS = range(1, 11)
BIN_HU = 4
GROUPS = {
    "lung": "lung lobes", "vertebrae": "vertebrae", "rib": "ribs", "kidney": "kidneys",
    "autochthon": "muscles", "iliopsoas": "muscles",
    "vena": "vessels", "vein": "vessels", "artery": "vessels", "aorta": "vessels",
}  # fmt: skip


def best_intervals(ct: NDArray[np.int16], labels: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Highest Dice that any interval of HU reaches, for each label.

    With N voxels of the structure, S of them and T of all voxels in the interval, Dice is
    2 S / (N + T).
    """
    bins = (4096 // BIN_HU) + 1
    place = (
        labels.astype(np.int64) * bins
        + (np.clip(ct, -1024, 3071).astype(np.int64) + 1024) // BIN_HU
    )
    counts = np.bincount(place.ravel(order="K"), minlength=256 * bins).reshape(256, bins)
    every = np.concatenate([[0], np.cumsum(counts.sum(0))])
    best = np.zeros(256)
    for label in np.flatnonzero(counts.any(1)):
        own = np.concatenate([[0], np.cumsum(counts[label])])
        used = np.flatnonzero(np.diff(own))
        part = slice(used[0], used[-1] + 2)
        inside = own[part][None] - own[part][:, None]
        total = own[-1] + every[part][None] - every[part][:, None]
        best[label] = np.max(2 * inside / np.maximum(total, 1))
    return best


def score_seed(seed: int) -> dict[str, Any]:
    """Dice of each structure: the model's, and that of the best threshold."""
    from totalfast.demo.phantom import make_phantom
    from totalfast.demo.score import score
    from totalfast.upstream import CLASS_MAPS

    names = CLASS_MAPS["total"]
    phantom = make_phantom(seed)
    labels = segmented(phantom, export="linear")
    voxel_ml = float(np.prod(np.diag(phantom.affine)[:3])) / 1000
    thresholds = best_intervals(phantom.ct, phantom.labels)
    ids = {name: label for label, name in names.items()}
    rows = score(labels, phantom.labels, names, voxel_ml=voxel_ml)
    return {
        "seed": seed,
        "mean": statistics.mean(row.dice for row in rows),
        "dice": {row.name: round(row.dice, 4) for row in rows},
        "threshold": {row.name: round(float(thresholds[ids[row.name]]), 4) for row in rows},
    }


def table(results: list[dict[str, Any]]) -> str:
    """Mean Dice by kind of structure."""
    lines = ["| structures | model, Dice | best threshold, Dice |", "|---|---|---|"]
    found: dict[str, list[tuple[float, float]]] = {}
    for result in results:
        for name, dice in result["dice"].items():
            kind = next((k for word, k in GROUPS.items() if word in name), "organs and others")
            found.setdefault(kind, []).append((dice, result["threshold"][name]))
    every = [pair for pairs in found.values() for pair in pairs]
    for kind, pairs in [*sorted(found.items()), ("**all**", every)]:
        model, threshold = (statistics.mean(values) for values in zip(*pairs, strict=True))
        lines.append(f"| {kind} | {model:.3f} | {threshold:.3f} |")
    seeds = [result["mean"] for result in results]
    lines += [
        "",
        f"{len(results)} phantoms with new seeds, {len(every) / len(results):.0f} structures "
        f"each; the means of the phantoms range from {min(seeds):.3f} to {max(seeds):.3f}.",
    ]
    return "\n".join(lines) + "\n"


def measure(seed: int) -> list[dict[str, Any]]:
    """``score_seed``, and its mean said at once."""
    result = score_seed(seed)
    print(f"mean Dice {result['mean']:.3f}, ", end="")
    return [result]


if __name__ == "__main__":
    sys.exit(main(__file__, __doc__ or "", seeds=SEEDS, measure=measure, table=table))
