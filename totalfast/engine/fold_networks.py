"""The networks of a model, one per fold, run on one tile after another.

The order of every float16 operation is nnU-Net's (2.8.1, inference/predict_from_raw_data.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from totalfast.engine.device_queue import FiniteCheck
from totalfast.engine.tiles import Tiles, Tiling, gaussian_weights, mirrorings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import TypeAlias

    import torch
    from torch import nn

    from totalfast.models.model import Model

    Untyped: TypeAlias = Any
    """A module; for mypy all attributes of a module are tensors or modules."""

ONEDNN_SIZE = 20480
"""Torch convolves a batch of one without oneDNN, and with other last bits, if the product of its
first four sizes is at most this (2.14, Convolution.cpp, use_mkldnn)."""

ONEDNN_FEATURES = 32
"""Up to this number of features oneDNN computes a 1x1x1 convolution in one sum, so that the last
bits do not depend on the number of voxels. nnU-Net's last layer has 32 features."""


class FoldNetworks:
    """The networks of a model, and the weights of a tile's voxels in the sum of logits.

    Parameters
    ----------
    model
        A loaded model.
    tiles
        Where the image's tiles lie.
    tiling
        Whether tiles are weighted, and along which axes they are mirrored.
    device
        Where logits are summed up.
    """

    def __init__(self, model: Model, tiles: Tiles, tiling: Tiling, device: torch.device) -> None:
        import torch

        self.model = model
        self.count = len(model.forwards)
        self.finite = FiniteCheck(model.folder.parent.name)
        plain = model.device.type == "cpu" and not tiling.mirror_axes and len(model.patch_size) == 3
        self._networks = [
            (forward.body, forward.head) if plain else (forward, None) for forward in model.forwards
        ]
        self._last: tuple[list[int], torch.Tensor] | None = None
        self._mirrorings = mirrorings(tiling.mirror_axes)
        self.weights = torch.ones(tiles.patch, dtype=torch.half, device=device)
        if tiling.gaussian:
            self.weights = gaussian_weights(model.patch_size, device).reshape(tiles.patch)

    def run(self, tile: torch.Tensor) -> Iterator[TileOutput]:
        """Run one network after another on a tile (channels, z, y, x); yield the outputs.

        A tile of one value, such as padding, is computed only if the one before had another.
        """
        import torch

        value = constant_value(tile) if self._may_repeat else None
        if value is not None and self._last is not None and self._last[0] == value:
            yield TileOutput(head=self._networks[0][1], features=self._last[1])
            return
        self._last = None  # the network needs the memory
        for network, head in self._networks:
            # A copy for each network, as in nnU-Net: a network may change its input.
            batch = torch.clone(tile[None], memory_format=torch.contiguous_format)
            features = self._mirrored_mean(network, batch.to(self.model.device))
            if value is not None:
                self._last = value, features
            yield TileOutput(head=head, features=features)
            del features

    def logits_of_one_tile(
        self, image: torch.Tensor, tiles: Tiles
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield the logits of an image of one tile, for one network, without a rolling window.

        Yields (first slice, float16 logits (classes, slices, y, x)).
        """
        rows, inside = tiles.inside
        output = next(self.run(image))
        self.release()
        for first, weighted in output.weighted(self.weights):
            last = first + weighted.shape[1]
            for row in range(max(rows.start, first), min(rows.stop, last)):
                place = (slice(None), slice(row - first, row - first + 1), *inside)
                weight = self.weights[(slice(row, row + 1), *inside)]
                yield row - rows.start, self.mean([weighted[place]], weight)

    @property
    def _may_repeat(self) -> bool:
        """Whether the features of a tile can be used for the next tile, too.

        They are valid until the network's next call, and a separate last layer does not change
        them. Features of several folds would add to the peak memory.
        """
        return self.count == 1 and self._networks[0][1] is not None

    def release(self) -> None:
        """Free the memory that is kept between tiles."""
        self._last = None
        for forward in self.model.forwards:
            forward.release()

    def mean(self, sums: Iterable[torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
        """Divide each fold's sums by the weights and average the folds, all in float16.

        On a device the sums are overwritten, so that no memory is needed. On the CPU they are few,
        and new memory stays in its cache.

        Raises
        ------
        PredictionError
            If a logit is infinite or NaN, on the CPU; a device is asked at the end (``finite``).
        """
        import torch

        folds = []
        for total in sums:
            on_cpu = total.device.type == "cpu"
            logits = torch.div(total, weight) if on_cpu else total.div_(weight)
            self.finite.add(logits)
            folds.append(logits)
        mean = folds[0]
        for logits in folds[1:]:
            mean += logits
        if len(folds) > 1:
            mean /= len(folds)
        return mean

    def _mirrored_mean(
        self, network: Callable[..., torch.Tensor], batch: torch.Tensor
    ) -> torch.Tensor:
        """The network's output for (1, channels, z, y, x), averaged over mirrored tiles.

        A 2-D network gets the single slice of its tiles.
        """
        import torch

        slices = len(self.model.patch_size) == 2
        tile = batch[:, :, 0] if slices else batch
        output: torch.Tensor = network(tile)
        for axes in self._mirrorings:
            output += torch.flip(network(torch.flip(tile, axes)), axes)
        if self._mirrorings:
            output /= len(self._mirrorings) + 1
        return output[:, :, None] if slices else output


def constant_value(tile: torch.Tensor) -> list[int] | None:
    """Return the bits of each channel's value, if it is the same everywhere; else None.

    ``tile`` is float32, (channels, z, y, x).
    """
    import torch

    bits = tile.view(torch.int32)
    first = bits[:, :1, :1, :1]
    z, y, x = (slice(n // 2, n // 2 + 1) for n in bits.shape[1:])
    if all(torch.equal(first.expand_as(part), part) for part in (bits[:, z, y, x], bits)):
        value: list[int] = first.flatten().tolist()
        return value
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class TileOutput:
    """What a network gives for a tile, before its last layer if that is separate.

    Parameters
    ----------
    head
        The last layer; None if the features are logits.
    features
        (1, features, z, y, x).
    """

    head: Untyped
    features: torch.Tensor

    def by_slices(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield the float32 logits, in the form of ``logits_by_slices``."""
        yield from logits_by_slices(self.head, self.features)

    def add_to(self, sums: torch.Tensor, weights: torch.Tensor) -> bool:
        """Add the weighted logits to sums (classes, z, y, x); False if the last layer can't."""
        add = getattr(self.head, "add_to", None)
        if add is None or sums.device.type != "cpu":
            return False
        add(sums, self.features[0], weights)
        return True

    def weighted(self, weights: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (first slice, float16 weighted logits (classes, slices, y, x)), on the CPU.

        They are valid until the next ones are taken.
        """
        import torch

        add = getattr(self.head, "add_to", None)
        if add is None:
            for slices, logits in self.by_slices():
                yield slices.start, (logits * weights[slices]).half()
            return
        sums = torch.empty((self.head.classes, 1, *weights.shape[1:]), dtype=torch.half)
        for row in range(len(weights)):
            some = slice(row, row + 1)
            add(sums.zero_(), self.features[0, :, some], weights[some])
            yield row, sums


def logits_by_slices(
    head: nn.Module | None, features: torch.Tensor
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Apply the last layer to features (1, features, z, y, x), a few slices at a time.

    Yields (slices along z, logits (classes, slices, y, x)) with the same bits as for the whole
    tile. The slices are few enough to stay in the cache, and their memory is reused.
    """
    _, count, depth, height, width = features.shape
    if head is None or count > ONEDNN_FEATURES or count * depth * height <= ONEDNN_SIZE:
        yield slice(0, depth), (features if head is None else head(features))[0]
        return
    least = ONEDNN_SIZE // (count * height * width) + 1
    bounds = np.linspace(0, depth, max(depth // least, 1) + 1).astype(int)
    for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
        line = features[:, :, start:stop].reshape(1, count, 1, -1, 1)
        yield slice(int(start), int(stop)), head(line).view(-1, stop - start, height, width)
