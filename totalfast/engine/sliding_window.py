"""nnU-Net's sliding window, with the argmax computed as slices leave a rolling window.

Tile positions, the Gaussian and the order of every float16 operation are nnU-Net's (2.8.1,
inference/predict_from_raw_data.py), so that the labels are identical. The difference: a slice's
logits are dropped as soon as no later tile overlaps it.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import numpy as np

from totalfast.engine.device_queue import HostCopy, TileQueue
from totalfast.engine.fold_networks import FoldNetworks
from totalfast.engine.rolling_window import RollingWindow, WindowMemory
from totalfast.engine.tiles import Tiling, gaussian_weights
from totalfast.engine.torch_settings import inference_settings
from totalfast.export.nearest import first_maximum, label_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

    from totalfast.engine.device_queue import FiniteCheck
    from totalfast.models.model import Model

__all__ = [
    "WindowMemory",
    "final_logits",
    "inference_settings",
    "predict_labels",
    "predict_logits",
    "prepare_tiles",
    "queue_labels",
]


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
        A loaded model. A 2-D model runs slice by slice.
    image
        float32, (channels, z, y, x), normalised; on the CPU, or on the model's device.
    tiling
        How tiles are placed, mirrored and weighted.
    memory
        Memory for the sums of logits on the CPU; None allocates it.
    on_tile
        Called after each tile.

    Returns
    -------
        uint8 (uint16 from 255 labels on), (z, y, x), on the CPU.

    Raises
    ------
    PredictionError
        If a logit is NaN or overflows float16.
    """
    return queue_labels(model, image, tiling, memory=memory, on_tile=on_tile)()


def queue_labels(
    model: Model,
    image: torch.Tensor,
    tiling: Tiling,
    *,
    memory: WindowMemory | None = None,
    on_tile: Callable[[], None] = lambda: None,
) -> Callable[[], torch.Tensor]:
    """Start ``predict_labels``; return a function that waits for the labels.

    On a CUDA device all work is then in its queue, or done, and other work can be queued behind it.
    The host waits for nothing on the way, and copies the labels once. The parameters are those of
    ``predict_labels``; the returned function raises its error.
    """
    import torch

    dtype = getattr(torch, np.dtype(label_dtype(len(model.labels.foreground_labels))).name)
    place = summing_device(model, tiling)
    labels = torch.empty(tuple(image.shape[1:]), dtype=dtype, device=place)
    finite: list[FiniteCheck] = []
    for start, logits in _logits(model, image, tiling, finite, memory=memory, on_tile=on_tile):
        if model.labels.has_regions:
            slab = torch.as_tensor(model.labels.convert_logits_to_segmentation(logits))
        else:
            slab = first_maximum(logits)
        labels[start : start + slab.shape[0]] = slab.to(place, dtype)
    copy, sums = HostCopy(labels), finite[0].on_the_way()

    def wait() -> torch.Tensor:
        finite[0].end(sums)
        return copy.wait()

    return wait


def predict_logits(
    model: Model,
    image: torch.Tensor,
    tiling: Tiling,
    *,
    memory: WindowMemory | None = None,
    on_tile: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """Predict all logits, float16, (classes, z, y, x), on the CPU: the input of nnU-Net's export.

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
    """Yield (first slice, logits of some slices) along z as they become final.

    The logits are float16, (classes, slices, y, x), on the device where they were summed up, and
    valid until the next ones are taken. The parameters and errors are those of ``predict_labels``.
    """
    finite: list[FiniteCheck] = []
    yield from _logits(model, image, tiling, finite, memory=memory, on_tile=on_tile)
    finite[0].end(finite[0].on_the_way())


def _logits(
    model: Model,
    image: torch.Tensor,
    tiling: Tiling,
    finite: list[FiniteCheck],
    *,
    memory: WindowMemory | None,
    on_tile: Callable[[], None],
) -> Iterator[tuple[int, torch.Tensor]]:
    """``final_logits``; its caller must end the check that is put into ``finite``."""
    import torch

    tiles = tiling.tiles(tuple(image.shape[1:]), model.patch_size)
    device = summing_device(model, tiling)
    padding = [n for pair in zip(tiles.below[::-1], tiles.above[::-1], strict=True) for n in pair]
    if any(padding):
        image = torch.nn.functional.pad(image, padding)
    if device.type == "cpu" or tiling.image_on_device:
        image = image.to(device)
    networks = FoldNetworks(model, tiles, tiling, device)
    finite.append(networks.finite)
    settings = inference_settings(model.device, deterministic=tiling.deterministic)
    with settings, contextlib.ExitStack() as cleanup:
        cleanup.callback(networks.release)  # also if a tile fails
        one = tiles.count == 1 and tiles.skipped is None
        if one and networks.count == 1 and model.device.type == "cpu":
            yield from networks.logits_of_one_tile(image, tiles)
            on_tile()
            return
        window = RollingWindow(networks, tiles, memory or WindowMemory(), device)
        queue = TileQueue(model.device, on_tile)
        for first, boxes in tiles.rows():
            yield from window.advance(first)
            for z, y, x in boxes:
                window.add(image[:, z, y, x], (y, x))
                queue.add()
        networks.release()
        yield from window.advance(tiles.padded_shape[0])
        queue.end()


def summing_device(model: Model, tiling: Tiling) -> torch.device:
    """Where logits are summed up. As in nnU-Net, they stay on the device only for CUDA."""
    import torch

    stay = tiling.on_device and model.device.type == "cuda"
    return model.device if stay else torch.device("cpu")


def prepare_tiles(patch: tuple[int, ...]) -> None:
    """Compute the Gaussian of a tile size ahead, for logits that are summed up on the CPU."""
    import torch

    gaussian_weights(patch, torch.device("cpu"))
