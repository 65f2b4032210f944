"""Where tiles lie on an image: nnU-Net's positions."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiling:
    """How an image is predicted tile by tile: nnU-Net's options of the same meaning.

    Parameters
    ----------
    step
        Tile step as a share of the tile size.
    gaussian
        Whether the middle of a tile counts more than its rim.
    mirror_axes
        Spatial axes along which each tile is also predicted mirrored, in every combination, and
        averaged; TotalSegmentator's tiles are not.
    on_device
        Whether logits are summed up on the CUDA device that the network runs on, or on the CPU.
    """

    step: float
    gaussian: bool = True
    mirror_axes: tuple[int, ...] = ()
    on_device: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """Where the tiles of one image start, axis by axis, and how the image is padded for them.

    Parameters
    ----------
    patch
        Tile size (z, y, x).
    starts
        Start of the tiles along z, y and x, in the padded image.
    shape
        Shape (z, y, x) of the image, before padding.
    below, above
        Zeros added before and after the image, per axis.
    """

    patch: tuple[int, ...]
    starts: tuple[tuple[int, ...], ...]
    shape: tuple[int, ...]
    below: tuple[int, ...]
    above: tuple[int, ...]

    @property
    def count(self) -> int:
        """Number of tiles."""
        z, y, x = self.starts
        return len(z) * len(y) * len(x)

    @property
    def padded_shape(self) -> tuple[int, ...]:
        """Shape (z, y, x) of the padded image."""
        return tuple(n + b + a for n, b, a in zip(self.shape, self.below, self.above, strict=True))

    @property
    def inside(self) -> tuple[slice, tuple[slice, slice]]:
        """Where the image lies in the padded one: its slices, and its rows and columns."""
        z, y, x = (slice(b, b + n) for b, n in zip(self.below, self.shape, strict=True))
        return z, (y, x)


def plan_tiles(shape: tuple[int, ...], patch: tuple[int, ...], step: float) -> Tiles:
    """Lay nnU-Net's tiles over an image of ``shape`` (z, y, x).

    A patch of two axes (y, x) is laid over every slice.
    """
    from nnunetv2.inference.sliding_window_prediction import compute_steps_for_sliding_window

    if len(patch) == 2:
        plane = plan_tiles((patch[0], *shape[1:]), (patch[0], *patch), step)
        return Tiles(
            patch=(1, *patch),
            starts=(tuple(range(shape[0])), *plane.starts[1:]),
            shape=shape,
            below=(0, *plane.below[1:]),
            above=(0, *plane.above[1:]),
        )
    missing = [max(p - n, 0) for n, p in zip(shape, patch, strict=True)]
    below = tuple(m // 2 for m in missing)
    padded = tuple(n + m for n, m in zip(shape, missing, strict=True))
    return Tiles(
        patch=patch,
        starts=tuple(tuple(axis) for axis in compute_steps_for_sliding_window(padded, patch, step)),
        shape=shape,
        below=below,
        above=tuple(m - b for m, b in zip(missing, below, strict=True)),
    )


def mirrorings(axes: Sequence[int]) -> list[tuple[int, ...]]:
    """All combinations of spatial axes, as axes of a batch, in nnU-Net's order."""
    shifted = [axis + 2 for axis in axes]
    return [
        some
        for count in range(1, len(shifted) + 1)
        for some in itertools.combinations(shifted, count)
    ]
