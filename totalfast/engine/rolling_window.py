"""Sums of logits in a window that is one tile deep and moves along z."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from numpy.typing import NDArray

    from totalfast.engine.fold_networks import FoldNetworks
    from totalfast.engine.tiles import Tiles

SLICES_PER_MEAN = 2
"""Number of slices that the CPU averages at a time: some megabytes for 118 classes. A device
averages all slices that leave the window at a time."""


class WindowMemory:
    """Memory on the CPU for sums of logits, reused by the windows of several models.

    Systems hand out fresh memory slowly: the first access to sums of 300 MB took half a second.
    """

    def __init__(self) -> None:
        self._kept: NDArray[np.float16] = np.empty(0, dtype=np.float16)

    def zeros(self, shape: tuple[int, ...]) -> NDArray[np.float16]:
        """Return zeros, which are valid until the next call."""
        size = math.prod(shape)
        if size <= self._kept.size:
            self._kept[:size] = 0
        else:
            self._kept = np.empty(0, dtype=np.float16)  # free it before the larger allocation
            self._kept = np.zeros(size, dtype=np.float16)
        return self._kept[:size].reshape(shape)


class RollingWindow:
    """Sums of weighted logits, as deep as one tile; slices that leave the window are final.

    Parameters
    ----------
    networks
        The model's networks.
    tiles
        Where the image's tiles lie.
    memory
        Provides the sums on the CPU.
    device
        Where logits are summed up.
    """

    def __init__(
        self, networks: FoldNetworks, tiles: Tiles, memory: WindowMemory, device: torch.device
    ) -> None:
        import torch

        self.networks = networks
        self.tiles = tiles
        self.first = 0
        area = (tiles.patch[0], *tiles.padded_shape[1:])
        shape = (networks.count, networks.model.heads, *area)
        if device.type == "cpu":
            self.sums = torch.from_numpy(memory.zeros(shape))
        else:
            self.sums = torch.zeros(shape, dtype=torch.half, device=device)
        self.weight = torch.zeros(area, dtype=torch.half, device=device)
        self._slice = torch.empty(networks.model.heads, *tiles.patch[1:], device=device)

    def add(self, tile: torch.Tensor, box: tuple[slice, slice]) -> None:
        """Run all networks on a tile (channels, z, y, x) and add their weighted logits.

        The window starts at the tile's first slice and is as deep as the tile; ``box`` is its place
        along (y, x).
        """
        place = (slice(None), slice(None), *box)
        weights = self.networks.weights
        for output, total in zip(self.networks.run(tile), self.sums, strict=True):
            if output.add_to(total[place], weights):
                continue
            for slices, logits in output.by_slices():
                logits = logits.to(total.device)
                if total.device.type == "cpu":
                    self._add_up(total[place][:, slices], logits, weights[slices])
                else:
                    total[place][:, slices].add_(logits.mul_(weights[slices]))
        self.weight[place[1:]] += weights

    def _add_up(self, total: torch.Tensor, logits: torch.Tensor, weight: torch.Tensor) -> None:
        """``total += logits * weight``, slice by slice, in reused memory.

        Torch adds tensors of two dtypes in float32 and rounds once. Explicit float32 gives the same
        bits and is much faster.
        """
        for z in range(total.shape[1]):
            both = self._slice.copy_(total[:, z])
            total[:, z] = both.add_(logits[:, z].mul_(weight[z]))

    def advance(self, start: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Move the window to padded slice ``start``; yield the slices that it leaves.

        Yields (first slice, float16 logits (classes, slices, y, x)), which are valid until the next
        slices are taken.
        """
        done = min(start - self.first, self.tiles.patch[0])
        if done <= 0:
            return
        rows, inside = self.tiles.inside
        start_row, stop_row = max(rows.start - self.first, 0), min(rows.stop - self.first, done)
        step = SLICES_PER_MEAN if self.weight.device.type == "cpu" else self.tiles.patch[0]
        for row in range(start_row, stop_row, step):
            some = slice(row, min(row + step, stop_row))
            part, place = (some, *inside), (slice(None), slice(None), some, *inside)
            weight = self.weight[part]
            if self.tiles.skipped is not None:
                weight = weight.masked_fill(weight == 0, 1)  # where no tile was run, logits are 0
            mean = self.networks.mean(self.sums[place], weight)
            yield self.first + row - rows.start, mean
        self.first = start
        if start >= self.tiles.padded_shape[0]:
            return
        for array in (*self.sums, self.weight):
            depth = array.shape[-3]
            # Blocks as deep as the step do not overlap, so no copy of the whole array is needed.
            for row in range(done, depth, done):
                moved = array[..., row : row + done, :, :]
                array[..., row - done : row - done + moved.shape[-3], :, :] = moved
            array[..., depth - done :, :, :] = 0
