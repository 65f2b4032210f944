"""How well predicted labels agree with the true labels, per structure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

SMALLEST_ML = 1.0
"""Structures with a smaller true volume are not scored, such as a slice of a rib at the edge."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Result of one structure: class name, true and predicted volume in ml, Dice (0 to 1)."""

    name: str
    true_ml: float
    found_ml: float
    dice: float


def score(
    labels: NDArray[np.uint8],
    truth: NDArray[np.uint8],
    names: Mapping[int, str],
    *,
    voxel_ml: float,
) -> list[Score]:
    """Compare predicted labels with true labels.

    Parameters
    ----------
    labels, truth
        Predicted and true labels, of one shape; 0 is background.
    names
        Label to class name.
    voxel_ml
        Volume of one voxel in ml.

    Returns
    -------
        One score per structure of at least ``SMALLEST_ML``, in order of labels. Dice is
        2 |A and B| / (|A| + |B|), with A and B the voxels of the label in ``labels`` and ``truth``.
    """
    size = max(max(names), int(labels.max()), int(truth.max())) + 1
    predicted_counts = np.bincount(labels.ravel(order="K"), minlength=size)
    true_counts = np.bincount(truth.ravel(order="K"), minlength=size)
    common_counts = np.bincount(truth[labels == truth], minlength=size)
    return [
        Score(
            name=names[label],
            true_ml=float(true_counts[label] * voxel_ml),
            found_ml=float(predicted_counts[label] * voxel_ml),
            dice=float(2 * common_counts[label] / (predicted_counts[label] + true_counts[label])),
        )
        for label in sorted(names)
        if true_counts[label] * voxel_ml >= SMALLEST_ML
    ]
