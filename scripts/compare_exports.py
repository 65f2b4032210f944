"""Compare the accuracy of ``nearest`` and ``linear`` exports.

    python scripts/compare_exports.py --json scripts/results/exports.json [--readme]

The demonstration model segments synthetic phantoms at 3 mm, once per export. The true labels are
known at 1.5 mm. The results are the Dice and the mean distance between the two surfaces in mm (mean
of both directions), by size of the structure. Islands that do not touch the true structure count
for the Dice only, because they depend on the model and not on the export.
"""

from __future__ import annotations

import statistics
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
from on_phantoms import main, segmented
from scipy import ndimage

if TYPE_CHECKING:
    from numpy.typing import NDArray

SEEDS = range(1, 6)
SIZES_ML = (1, 10, 30, 100, 10_000)
MARGIN = 12
"""Margin in voxels around both masks for the distances."""
EXPORTS = {"nearest": "auto", "linear": "linear"}


def surface_distance(mask: NDArray[np.bool_], truth: NDArray[np.bool_], spacing_mm: float) -> float:
    """Return the mean distance between the surface voxels of two masks, in mm."""
    surfaces = [m & ~ndimage.binary_erosion(m) for m in (mask, truth)]
    means = []
    for one, other in (surfaces, surfaces[::-1]):
        away = ndimage.distance_transform_edt(~other, sampling=spacing_mm)
        means.append(float(away[one].mean()))
    return statistics.mean(means)


def touching(mask: NDArray[np.bool_], truth: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the connected components that overlap the truth, or all if there are none."""
    components, _ = ndimage.label(mask)
    kept: NDArray[np.bool_] = np.isin(components, components[truth & mask])
    return kept if kept.any() else mask


def compare_seed(seed: int) -> list[dict[str, Any]]:
    """Return one row per structure: name, true_ml, and Dice and surface distance per export."""
    from totalfast.demo.phantom import make_phantom
    from totalfast.demo.score import score
    from totalfast.upstream import CLASS_MAPS

    names = CLASS_MAPS["total"]
    phantom = make_phantom(seed)
    spacing_mm = float(phantom.affine[0, 0])
    rows: dict[int, dict[str, Any]] = {}
    for name, export in EXPORTS.items():
        labels = segmented(phantom, export=export)
        scores = {
            row.name: row
            for row in score(labels, phantom.labels, names, voxel_ml=spacing_mm**3 / 1000)
        }
        for label, structure in names.items():
            row = scores.get(structure)
            if row is None or row.found_ml == 0:
                continue
            both = (labels == label) | (phantom.labels == label)
            (tight,) = ndimage.find_objects(both.view(np.uint8))
            box = tuple(slice(max(s.start - MARGIN, 0), s.stop + MARGIN) for s in tight)
            mask, truth = labels[box] == label, phantom.labels[box] == label
            distance = surface_distance(touching(mask, truth), truth, spacing_mm)
            entry = rows.setdefault(label, {"name": structure, "true_ml": row.true_ml})
            entry[name] = {"dice": row.dice, "surface_mm": distance}
    return [row for row in rows.values() if all(name in row for name in EXPORTS)]


def table(rows: list[dict[str, Any]]) -> str:
    """Return the medians by size of the structure as Markdown."""
    lines = [
        "| true size | structures | Dice: nearest | linear | surface distance: nearest | linear |",
        "|---|---|---|---|---|---|",
    ]
    for low, high in zip(SIZES_ML[:-1], SIZES_ML[1:], strict=True):
        sized = [row for row in rows if low <= row["true_ml"] < high]
        dice, distance = (
            [statistics.median(row[name][what] for row in sized) for name in EXPORTS]
            for what in ("dice", "surface_mm")
        )
        size = f"{low} to {high} ml" if high < SIZES_ML[-1] else f"{low} ml and more"
        lines.append(
            f"| {size} | {len(sized)} | {dice[0]:.3f} | {dice[1]:.3f} "
            f"| {distance[0]:.2f} mm | {distance[1]:.2f} mm |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(__file__, __doc__ or "", seeds=SEEDS, measure=compare_seed, table=table))
