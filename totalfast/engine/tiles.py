"""Positions of nnU-Net's tiles on an image, and the weights of their voxels."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch
    from numpy.typing import NDArray

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
    box
        Slices along (z, y, x) of the image, perhaps beyond it: only tiles that have a voxel of it
        are run; None runs all.
    """

    step: float
    gaussian: bool = True
    mirror_axes: tuple[int, ...] = ()
    on_device: bool = True
    image_on_device: bool = True
    deterministic: bool = False
    box: Box | None = None

    def tiles(self, shape: tuple[int, ...], patch: tuple[int, ...]) -> Tiles:
        """Place the tiles on an image of ``shape`` (z, y, x)."""
        tiles = plan_tiles(shape, patch, self.step)
        return tiles if self.box is None else tiles.that_touch(self.box)

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
    skipped
        Which tiles are not run: bool, (tiles along z, along y, along x); None if all are.
    """

    patch: tuple[int, ...]
    starts: tuple[tuple[int, ...], ...]
    shape: tuple[int, ...]
    below: tuple[int, ...]
    above: tuple[int, ...]
    skipped: NDArray[np.bool_] | None = None

    @property
    def count(self) -> int:
        """Number of tiles that are run."""
        every = math.prod(len(axis) for axis in self.starts)
        return every if self.skipped is None else every - int(self.skipped.sum())

    def rows(self) -> Iterator[tuple[int, list[tuple[slice, slice, slice]]]]:
        """Yield each start along z, and the boxes of its tiles that are run, in nnU-Net's order."""
        depth, height, width = self.patch
        for row, z in enumerate(self.starts[0]):
            plane = itertools.product(enumerate(self.starts[1]), enumerate(self.starts[2]))
            yield (
                z,
                [
                    (slice(z, z + depth), slice(y, y + height), slice(x, x + width))
                    for (column, y), (place, x) in plane
                    if self.skipped is None or not self.skipped[row, column, place]
                ],
            )

    def that_touch(self, box: Box) -> Tiles:
        """Return these tiles; those without a voxel of a box of the image are skipped."""
        z, y, x = (
            np.array(
                [span.start < part.stop and part.start < span.stop for span in self._spans(axis)]
            )
            for axis, part in enumerate(box)
        )
        skipped = ~(z[:, None, None] & y[:, None] & x)
        return replace(self, skipped=skipped) if skipped.any() else self

    def cells(self) -> tuple[list[list[slice]], NDArray[np.bool_]]:
        """Divide the image at the borders of tiles, and tell in which cells all tiles are run.

        The labels of these cells are those of a run of all tiles.

        Returns
        -------
            The cells' slices of the image, per axis; and bool, (cells along z, along y, along x).
        """
        slices, covered = [], []
        for axis, size in enumerate(self.shape):
            spans = self._spans(axis)
            ends = sorted({0, size} | {end for span in spans for end in (span.start, span.stop)})
            cells = [slice(first, stop) for first, stop in itertools.pairwise(ends)]
            inside = [[t.start <= c.start and c.stop <= t.stop for t in spans] for c in cells]
            slices.append(cells)
            covered.append(np.array(inside, dtype=np.int64))
        if self.skipped is None:
            return slices, np.ones([len(axis) for axis in slices], dtype=bool)
        missing = np.einsum(
            "zyx,cz,dy,ex->cde", self.skipped.astype(np.int64), *covered, optimize=True
        )
        return slices, missing == 0

    def _spans(self, axis: int) -> list[slice]:
        """The tiles' slices of the image, along an axis."""
        below, size = self.below[axis], self.shape[axis]
        return [
            slice(max(start - below, 0), min(start - below + self.patch[axis], size))
            for start in self.starts[axis]
        ]

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
