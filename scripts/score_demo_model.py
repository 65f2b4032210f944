"""Score the demonstration model on ten phantoms that were not used for training.

    python scripts/score_demo_model.py --json scripts/results/demo_model.json

Each phantom is segmented with ``--fast --export linear``, as in ``totalfast demo``. The result is
the Dice of each structure of 1 ml or more with the true labels. For comparison, it also contains
the Dice of the best interval of HU for each structure in each phantom, chosen with the true labels.
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
    "lung": "lung lobes",
    "vertebrae": "vertebrae",
    "rib": "ribs",
    "kidney": "kidneys",
    "autochthon": "muscles",
    "iliopsoas": "muscles",
    "vena": "vessels",
    "vein": "vessels",
    "artery": "vessels",
    "aorta": "vessels",
}
"""Part of a structure's name to its group in the table."""


def best_intervals(ct: NDArray[np.int16], labels: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return the highest Dice of any interval of HU, for each label.

    If the structure has N voxels, and the interval contains S voxels of the structure and T voxels
    in total, the Dice is 2 S / (N + T).
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
    """Return the Dice of each structure for the model and for the best interval."""
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
    """Return the mean Dice by group of structures as Markdown."""
    lines = ["| structures | model, Dice | best threshold, Dice |", "|---|---|---|"]
    groups: dict[str, list[tuple[float, float]]] = {}
    for result in results:
        for name, dice in result["dice"].items():
            group = next((g for word, g in GROUPS.items() if word in name), "organs and others")
            groups.setdefault(group, []).append((dice, result["threshold"][name]))
    every = [pair for pairs in groups.values() for pair in pairs]
    for group, pairs in [*sorted(groups.items()), ("**all**", every)]:
        model, threshold = (statistics.mean(values) for values in zip(*pairs, strict=True))
        lines.append(f"| {group} | {model:.3f} | {threshold:.3f} |")
    seeds = [result["mean"] for result in results]
    lines += [
        "",
        f"{len(results)} phantoms with new seeds, {len(every) / len(results):.0f} structures "
        f"each; the means of the phantoms range from {min(seeds):.3f} to {max(seeds):.3f}.",
    ]
    return "\n".join(lines) + "\n"


def measure(seed: int) -> list[dict[str, Any]]:
    """Return the result of ``score_seed`` as a list, and print its mean."""
    result = score_seed(seed)
    print(f"mean Dice {result['mean']:.3f}, ", end="")
    return [result]


if __name__ == "__main__":
    sys.exit(main(__file__, __doc__ or "", seeds=SEEDS, measure=measure, table=table))
