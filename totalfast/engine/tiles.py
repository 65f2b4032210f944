"""Positions of nnU-Net's tiles on an image, and the weights of their voxels."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from totalfast.geometry import Box


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiling:
    """How an image is predicted tile by tile; equal to nnU-Net's options.

    Parameters
    ----------
    step
        Tile step as a fraction of the tile size.
    gaussian
        Whether the centre of a tile has more weight than its border.
    mirror_axes
        Spatial axes for test-time mirroring: each tile is also predicted mirrored, in every
        combination of these axes, and averaged. TotalSegmentator uses none.
    on_device
        Whether logits are summed up on the network's CUDA device; else on the CPU.
    image_on_device
        Whether the whole image is on that device, too; else tile by tile. An image is with the sums
        if those are on the CPU.
    deterministic
        Whether a CUDA device must give the same bits in every run.
    starts
        Start positions of tiles along z, y and x, for a part of an image; None places nnU-Net's.
    """

    step: float
    gaussian: bool = True
    mirror_axes: tuple[int, ...] = ()
    on_device: bool = True
    image_on_device: bool = True
    deterministic: bool = False
    starts: tuple[tuple[int, ...], ...] | None = None

    def tiles(self, shape: tuple[int, ...], patch: tuple[int, ...]) -> Tiles:
        """Place the tiles on an image of ``shape`` (z, y, x)."""
        tiles = plan_tiles(shape, patch, self.step)
        return tiles if self.starts is None else replace(tiles, starts=self.starts)

    def smaller(self) -> Tiling | None:
        """Return the next way that takes less of a CUDA device's memory; None if there is none."""
        if self.on_device and self.image_on_device:
            return replace(self, image_on_device=False)
        if self.on_device:
            return replace(self, on_device=False)
        return None

    def __str__(self) -> str:
        """Where the large arrays are."""
        if not self.on_device:
            return "logits are summed up on the CPU"
        if not self.image_on_device:
            return "logits are summed up on the GPU, which gets the image tile by tile"
        return "the image and the sums of logits are on the GPU"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """Start positions of one image's tiles, per axis, and the image's padding.

    Parameters
    ----------
    patch
        Tile size (z, y, x).
    starts
        Start positions of the tiles along z, y and x, in the padded image.
    shape
        Shape (z, y, x) of the image, before padding.
    below, above
        Number of zeros that are added before and after the image, per axis.
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
        """The image's box in the padded image: z, and (y, x)."""
        z, y, x = (slice(b, b + n) for b, n in zip(self.below, self.shape, strict=True))
        return z, (y, x)


def plan_tiles(shape: tuple[int, ...], patch: tuple[int, ...], step: float) -> Tiles:
    """Place nnU-Net's tiles on an image of ``shape`` (z, y, x).

    A 2-D ``patch`` (y, x) is placed on every slice.
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


def tiles_that_touch(tiles: Tiles, box: Box) -> tuple[Box, tuple[tuple[int, ...], ...]]:
    """Return the part of an image whose tiles have a voxel of a box.

    Parameters
    ----------
    tiles
        Of the image.
    box
        Of the image, (z, y, x); at least one voxel.

    Returns
    -------
        The part, and the start positions of its tiles in it (in its padding, where the image is
        smaller than a tile). All tiles of the image that have a voxel of the box are among them.
    """
    parts, starts = [], []
    for axis, part in enumerate(box):
        size, below = tiles.patch[axis], tiles.below[axis]
        first, stop = part.start + below, part.stop + below
        own = [start for start in tiles.starts[axis] if start < stop and start + size > first]
        if below or tiles.above[axis]:
            parts.append(slice(0, tiles.shape[axis]))
        else:
            parts.append(slice(own[0], own[-1] + size))
        starts.append(tuple(start - own[0] for start in own))
    return (parts[0], parts[1], parts[2]), tuple(starts)


def gaussian_weights(patch: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Weights of a tile's voxels, float16, of shape ``patch``; nnU-Net caches the last ones."""
    from nnunetv2.inference.sliding_window_prediction import compute_gaussian

    weights: torch.Tensor = compute_gaussian(
        patch, sigma_scale=1.0 / 8, value_scaling_factor=10, device=device
    )
    return weights


def mirrorings(axes: Sequence[int]) -> list[tuple[int, ...]]:
    """All combinations of spatial axes, as axes of (1, channels, z, y, x), in nnU-Net's order."""
    shifted = [axis + 2 for axis in axes]
    return [
        some
        for count in range(1, len(shifted) + 1)
        for some in itertools.combinations(shifted, count)
    ]
