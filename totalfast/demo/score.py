"""How well labels agree with the truth, structure by structure.

Knows label maps; knows nothing of files or models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

SMALLEST_ML = 1.0
"""Structures of which less is in view are not scored: a slice of a rib at the edge is no rib."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One structure's result: class name, volumes in ml, and Dice (0 to 1)."""

    name: str
    true_ml: float
    found_ml: float
    dice: float


def score(
    found: NDArray[np.uint8],
    truth: NDArray[np.uint8],
    names: Mapping[int, str],
    *,
    voxel_ml: float,
) -> list[Score]:
    """Compare two label maps of one shape; structures of ``SMALLEST_ML`` or more, by label.

    Dice is 2 |A and B| / (|A| + |B|) of the voxels with the label.
    """
    size = max(max(names), int(found.max()), int(truth.max())) + 1
    of_found = np.bincount(found.ravel(order="K"), minlength=size)
    of_truth = np.bincount(truth.ravel(order="K"), minlength=size)
    both = np.bincount(truth[found == truth], minlength=size)
    return [
        Score(
            name=names[label],
            true_ml=float(of_truth[label] * voxel_ml),
            found_ml=float(of_found[label] * voxel_ml),
            dice=float(2 * both[label] / (of_found[label] + of_truth[label])),
        )
        for label in sorted(names)
        if of_truth[label] * voxel_ml >= SMALLEST_ML
    ]
