"""Join the labels of several models, and of the thirds of a split image, into one label map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from numpy.typing import NDArray

SPLIT_VOXELS = 512 * 512 * 900
"""Model images larger than this are predicted in three pieces (TotalSegmentator 2.18.0)."""

SPLIT_MINIMUM_SLICES = 200
"""Images of fewer slices are split only on request."""

SPLIT_MARGIN = 20
"""Slices of a piece beyond those that are kept of it."""


def merge_part(
    labels: NDArray[np.uint8], part: NDArray[np.unsignedinteger], mapping: Mapping[int, int]
) -> None:
    """Write one model's labels into the task's label map, in place; later models overwrite.

    Parameters
    ----------
    labels
        uint8, the task's labels; changed.
    part
        The same shape, the model's own labels.
    mapping
        Model label to task label; other labels become background.
    """
    table = np.zeros(int(np.iinfo(part.dtype).max) + 1, dtype=np.uint8)
    for own, label in mapping.items():
        table[own] = label
    for plane, own_plane in zip(labels, part, strict=True):
        mapped = table[own_plane]
        np.copyto(plane, mapped, where=mapped != 0)


def keep_labels(labels: NDArray[np.uint8], kept: Collection[int]) -> NDArray[np.uint8]:
    """Return labels with all but some set to 0."""
    table = np.zeros(256, dtype=np.uint8)
    table[list(kept)] = list(kept)
    return table[labels]


def renumbered(
    labels: NDArray[np.uint8], classes: Mapping[int, str], wanted: Mapping[int, str]
) -> NDArray[np.uint8]:
    """Return labels with other numbers for the same classes; a class without one becomes 0.

    Parameters
    ----------
    labels
        uint8, any axis order.
    classes, wanted
        Label to class name, before and after.
    """
    label_of = {name: label for label, name in wanted.items()}
    table = np.zeros(256, dtype=np.uint8)
    for label, name in classes.items():
        table[label] = label_of.get(name, 0)
    return table[labels]


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A range of slices that is predicted separately, and the part of it that is kept."""

    predicted: slice
    kept: slice

    @property
    def inside(self) -> slice:
        """The kept slices, counted from the first predicted one."""
        return slice(self.kept.start - self.predicted.start, self.kept.stop - self.predicted.start)


def whole(slices: int, *, labelled: int) -> tuple[Piece, ...]:
    """Return the one piece of an image that is not split; its labels may have more slices."""
    return (Piece(predicted=slice(0, slices), kept=slice(0, labelled)),)


def thirds(slices: int) -> tuple[Piece, ...]:
    """Cut an image into upstream's three overlapping pieces.

    Notes
    -----
    ``[:t + 20]``, ``[t - 19:2 t + 20]``, ``[2 t - 19:]`` with t a third of the slices
    (TotalSegmentator 2.18.0, nnunet.py). Below 57 slices upstream's second start is negative and
    takes slices from the end. Here it is 0.
    """
    third = slices // 3
    bounds = ((0, third), (third, 2 * third), (2 * third, slices))
    return tuple(
        Piece(
            predicted=slice(
                max(start + 1 - SPLIT_MARGIN, 0) if start else 0,
                min(stop + SPLIT_MARGIN, slices),
            ),
            kept=slice(start, stop),
        )
        for start, stop in bounds
        if stop > start
    )


def wants_split(shape: tuple[int, int, int], *, several_models: bool) -> bool:
    """Whether upstream splits an image of ``shape`` (x, y, z) without a request."""
    voxels = shape[0] * shape[1] * shape[2]
    return voxels > SPLIT_VOXELS and shape[2] > SPLIT_MINIMUM_SLICES and several_models
