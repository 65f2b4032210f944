"""nnU-Net's sliding window, with the argmax taken as tiles leave a rolling window.

Knows tensors and a loaded model; knows nothing of files or scanner grids. Tile positions, the
Gaussian and the order of every float16 operation are nnU-Net's (2.8.1,
inference/predict_from_raw_data.py), so that the labels are its labels; what differs is that the
logits of a slice are dropped as soon as no later tile touches it.
"""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING

import numpy as np

from totalfast.engine.tiles import Tiles, Tiling, mirrorings, plan_tiles
from totalfast.errors import PredictionError
from totalfast.export.nearest import first_maximum, label_dtype
from totalfast.system.cores import network_threads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    import torch
    from numpy.typing import NDArray
    from torch import nn

    from totalfast.engine.model import Model

ONEDNN_SIZE = 20480
"""Up to this product of its first four sizes torch convolves a batch of one without oneDNN, and
with other last bits (2.14, Convolution.cpp, use_mkldnn)."""

ONEDNN_FEATURES = 32
"""Up to so many features oneDNN sums a 1x1x1 convolution in one go, so that an answer's last bits
do not depend on how many voxels are asked for at a time. nnU-Net's last layer takes 32."""

SLICES_PER_ARGMAX = 2
"""Slices that are divided and reduced at a time: some megabytes for 118 classes."""


class WindowMemory:
    """Memory on the CPU for sums, which the windows of one model after another use again.

    Systems hand out fresh memory slowly: sums of 300 MB took half a second to be touched.
    """

    def __init__(self) -> None:
        self._kept: NDArray[np.float16] = np.empty(0, dtype=np.float16)

    def zeros(self, shape: tuple[int, ...]) -> NDArray[np.float16]:
        """Zeros that are valid until the next call."""
        size = math.prod(shape)
        if size <= self._kept.size:
            self._kept[:size] = 0
        else:
            self._kept = np.empty(0, dtype=np.float16)  # before more is asked for
            self._kept = np.zeros(size, dtype=np.float16)
        return self._kept[:size].reshape(shape)


def predict_labels(
    model: Model,
    image: torch.Tensor,
    tiling: Tiling,
    *,
    memory: WindowMemory | None = None,
    on_tile: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """Predict the label of every voxel, at network resolution.

    Parameters
    ----------
    model
        A loaded model. One of 2-D images is run slice by slice.
    image
        float32, (channels, z, y, x), normalised, on the CPU.
    tiling
        How tiles are laid, mirrored and weighted.
    memory
        Where logits are summed up on the CPU; None allocates it.
    on_tile
        Called after each tile.

    Returns
    -------
        uint8 (uint16 from 255 labels on), (z, y, x), on the CPU.

    Raises
    ------
    PredictionError
        If a logit overflows float16.
    """
    import torch

    dtype = label_dtype(len(model.labels.foreground_labels))
    labels = torch.from_numpy(np.empty(tuple(image.shape[1:]), dtype=dtype))
    for start, logits in final_logits(model, image, tiling, memory=memory, on_tile=on_tile):
        if model.labels.has_regions:
            found = torch.as_tensor(model.labels.convert_logits_to_segmentation(logits))
        else:
            found = first_maximum(logits)
        labels[start : start + found.shape[0]] = found.to("cpu", labels.dtype)
    return labels


def predict_logits(
    model: Model,
    image: torch.Tensor,
    tiling: Tiling,
    *,
    memory: WindowMemory | None = None,
    on_tile: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """Predict all logits, float16, (classes, z, y, x), on the CPU: what nnU-Net's export takes.

    The parameters and errors are those of ``predict_labels``.
    """
    import torch

    logits = torch.empty((model.heads, *image.shape[1:]), dtype=torch.half)
    for start, slab in final_logits(model, image, tiling, memory=memory, on_tile=on_tile):
        logits[:, start : start + slab.shape[1]] = slab.to("cpu")
    return logits


def final_logits(
    model: Model,
    image: torch.Tensor,
    tiling: Tiling,
    *,
    memory: WindowMemory | None = None,
    on_tile: Callable[[], None] = lambda: None,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (first slice, logits of a few slices) along z as they become final.

    The logits are float16, (classes, slices, y, x), on the device that they were summed up on.
    The parameters and errors are those of ``predict_labels``.
    """
    import torch

    tiles = plan_tiles(tuple(image.shape[1:]), model.patch_size, tiling.step)
    # As in nnU-Net, results stay on CUDA devices and nowhere else.
    stay = tiling.on_device and model.device.type == "cuda"
    device = model.device if stay else torch.device("cpu")
    padding = [n for pair in zip(tiles.below[::-1], tiles.above[::-1], strict=True) for n in pair]
    if any(padding):
        image = torch.nn.functional.pad(image, padding)
    image = image.to(device)
    networks = _Networks(model, tiles, tiling, device)
    with inference_settings(model.device), contextlib.ExitStack() as at_last:
        at_last.callback(networks.release)  # also if a tile fails
        if tiles.count == 1 and networks.count == 1 and model.device.type == "cpu":
            yield from networks.logits_of_one_tile(image, tiles)
            on_tile()
            return
        window = _RollingWindow(networks, tiles, memory or WindowMemory(), device)
        starts_z, starts_y, starts_x = tiles.starts
        for z in starts_z:
            yield from window.advance(z)
            for y in starts_y:
                for x in starts_x:
                    corner = zip((z, y, x), tiles.patch, strict=True)
                    box = (slice(None), *(slice(start, start + size) for start, size in corner))
                    window.add(image[box], box)
                    on_tile()
        networks.release()
        yield from window.advance(tiles.padded_shape[0])


def prepare_tiles(patch: tuple[int, ...]) -> None:
    """Make what is needed for tiles of a size, where logits are summed up on the CPU, ahead."""
    import torch

    _gaussian(patch, torch.device("cpu"))


def _gaussian(patch: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Weights of a tile's voxels, float16; nnU-Net keeps those that it made last."""
    from nnunetv2.inference.sliding_window_prediction import compute_gaussian

    weights: torch.Tensor = compute_gaussian(
        patch, sigma_scale=1.0 / 8, value_scaling_factor=10, device=device
    )
    return weights


def _logits(head: nn.Module | None, features: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Apply the last layer to features (1, features, z, y, x), a slice or a few at a time.

    Yields (slices along z, logits (classes, slices, y, x)) with the bits of the whole; few enough
    that they stay in the cache, and that their memory is used again instead of asked for.
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


class _Networks:
    """The networks of a model, all folds, and what their answers to a tile count."""

    def __init__(self, model: Model, tiles: Tiles, tiling: Tiling, device: torch.device) -> None:
        import torch

        self.model = model
        self.count = len(model.forwards)
        plain = model.device.type == "cpu" and not tiling.mirror_axes and len(model.patch_size) == 3
        self._networks = [
            (forward.body, forward.head) if plain else (forward, None) for forward in model.forwards
        ]
        self._mirrorings = mirrorings(tiling.mirror_axes)
        self.weights = torch.ones(tiles.patch, dtype=torch.half, device=device)
        if tiling.gaussian:
            self.weights = _gaussian(model.patch_size, device).reshape(tiles.patch)

    def answers(self, tile: torch.Tensor) -> Iterator[Iterator[tuple[slice, torch.Tensor]]]:
        """Run one network after another on a tile (channels, z, y, x).

        Yields of each its logits, float32, as ``_logits`` does.
        """
        import torch

        batch = torch.clone(tile[None], memory_format=torch.contiguous_format).to(self.model.device)
        for network, head in self._networks:
            yield _logits(head, self._answer(network, batch))

    def logits_of_one_tile(
        self, image: torch.Tensor, tiles: Tiles
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield what a window of one network and one tile would leave behind, without its sums."""
        rows, inside = tiles.inside
        answer = next(self.answers(image))
        self.release()
        for slices, logits in answer:
            for row in range(max(rows.start, slices.start), min(rows.stop, slices.stop)):
                own, other = row - slices.start, (slice(row, row + 1), *inside)
                place = (slice(None), slice(own, own + 1), *inside)
                total = (logits[place] * self.weights[other]).half()
                yield row - rows.start, self.mean([total], self.weights[other])

    def release(self) -> None:
        """Give back what is only kept from one tile to the next."""
        for forward in self.model.forwards:
            forward.release()

    def mean(self, sums: Iterable[torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
        """Divide each fold's sums by the weights, and average the folds: all in float16."""
        import torch

        folds = []
        for total in sums:
            logits = torch.div(total, weight)
            # A finite sum tells that all are finite, at a tenth of the price.
            finite = torch.isfinite(logits.sum(dtype=torch.float32))
            if not finite and torch.any(torch.isinf(logits)):
                raise PredictionError(
                    f"a logit of {self.model.folder.parent.name} overflowed float16. "
                    "The image's intensities may be far outside of what the model was trained on."
                )
            folds.append(logits)
        mean = folds[0]
        for logits in folds[1:]:
            mean += logits
        if len(folds) > 1:
            mean /= len(folds)
        return mean

    def _answer(self, network: Callable[..., torch.Tensor], batch: torch.Tensor) -> torch.Tensor:
        """The network's answer to (1, channels, z, y, x), averaged over its mirror images.

        A network of 2-D images gets the one slice that its tiles have.
        """
        import torch

        slices = len(self.model.patch_size) == 2
        tile = batch[:, :, 0] if slices else batch
        answer: torch.Tensor = network(tile)
        for axes in self._mirrorings:
            answer += torch.flip(network(torch.flip(tile, axes)), axes)
        if self._mirrorings:
            answer /= len(self._mirrorings) + 1
        return answer[:, :, None] if slices else answer


class _RollingWindow:
    """Accumulators as deep as one tile, moved along z; slices that leave it are final."""

    def __init__(
        self, networks: _Networks, tiles: Tiles, memory: WindowMemory, device: torch.device
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

    def add(self, tile: torch.Tensor, box: tuple[slice, ...]) -> None:
        """Add the weighted logits of a tile (channels, z, y, x), of every fold's network."""
        # The tile fills the whole depth of the window, which begins where the tile does.
        place = (slice(None), slice(None), *box[2:])
        weights = self.networks.weights
        for answer, total in zip(self.networks.answers(tile), self.sums, strict=True):
            for slices, logits in answer:
                if logits.device.type == "cpu":
                    self._add_up(total[place][:, slices], logits, weights[slices])
                    continue
                logits = logits.to(total.device)
                total[place][:, slices].add_(logits.mul_(weights[slices]))
        self.weight[place[1:]] += weights

    def _add_up(self, total: torch.Tensor, logits: torch.Tensor, weight: torch.Tensor) -> None:
        """``total += logits * weight``, slice by slice, in memory that is used again.

        Two dtypes are added in float32 and rounded once; said so, it is much faster.
        """
        for z in range(total.shape[1]):
            both = self._slice.copy_(total[:, z])
            total[:, z] = both.add_(logits[:, z].mul_(weight[z]))

    def advance(self, start: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Move the window to begin at padded slice ``start``; yield what it leaves behind."""
        done = min(start - self.first, self.tiles.patch[0])
        if done <= 0:
            return
        rows, inside = self.tiles.inside
        start_row, stop_row = max(rows.start - self.first, 0), min(rows.stop - self.first, done)
        for row in range(start_row, stop_row, SLICES_PER_ARGMAX):
            some = slice(row, min(row + SLICES_PER_ARGMAX, stop_row))
            part, place = (some, *inside), (slice(None), slice(None), some, *inside)
            mean = self.networks.mean(self.sums[place], self.weight[part])
            yield self.first + row - rows.start, mean
        self.first = start
        if start >= self.tiles.padded_shape[0]:
            return
        for array in (*self.sums, self.weight):
            depth = array.shape[-3]
            # As many slices at a time as they move by do not overlap: no copy of all is needed.
            for row in range(done, depth, done):
                moved = array[..., row : row + done, :, :]
                array[..., row - done : row - done + moved.shape[-3], :, :] = moved
            array[..., depth - done :, :, :] = 0


@contextlib.contextmanager
def inference_settings(device: torch.device) -> Iterator[None]:
    """Torch as nnU-Net sets it for prediction; restored on every exit.

    All cores up to eight on the CPU, one thread beside a GPU; autocast on CUDA only.
    """
    import torch

    threads = torch.get_num_threads()
    benchmark = torch.backends.cudnn.benchmark
    cuda = device.type == "cuda"
    torch.set_num_threads(network_threads() if device.type == "cpu" else 1)
    torch.backends.cudnn.benchmark = cuda or benchmark
    try:
        with (
            torch.inference_mode(),
            torch.autocast("cuda") if cuda else contextlib.nullcontext(),
        ):
            yield
    finally:
        torch.set_num_threads(threads)
        torch.backends.cudnn.benchmark = benchmark
