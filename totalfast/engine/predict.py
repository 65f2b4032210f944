"""Run one model on a model image; label the model grid, or directly a finer grid."""

from __future__ import annotations

import itertools
import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from totalfast.engine.sliding_window import (
    final_logits,
    inference_settings,
    predict_labels,
    predict_logits,
    queue_labels,
    summing_device,
)
from totalfast.export import (
    choose_method,
    export_labels,
    label_dtype,
    resampling_axes,
    separate_axis,
)
from totalfast.export.host_labels import empty_labels
from totalfast.export.nearest import gather
from totalfast.geometry import (
    CENTERS,
    interpolation_weights,
    nearest_indices,
    sample_positions,
    shifted,
)
from totalfast.system.cores import usable_cores

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch
    from numpy.typing import NDArray

    from totalfast.engine.normalise import NetworkImage
    from totalfast.engine.sliding_window import WindowMemory
    from totalfast.engine.source_image import SourceImage
    from totalfast.engine.tiles import Tiles, Tiling
    from totalfast.geometry import Box, LinearWeights
    from totalfast.models.model import Model

logger = logging.getLogger(__name__)


def queue_part(
    source: SourceImage,
    *,
    model: Model,
    tiling: Tiling,
    memory: WindowMemory | None,
    on_tile: Callable[[], None],
    box: Box | None = None,
    linear_to: tuple[int, int, int] | None = None,
) -> Callable[[], NDArray[np.unsignedinteger]]:
    """Start to label every voxel of a model image with one model.

    Parameters
    ----------
    source
        The model image, of one channel.
    model
        A loaded model.
    tiling
        How tiles are placed, mirrored and weighted.
    memory
        Memory for the sums of logits on the CPU; None allocates it.
    on_tile
        Called after each tile.
    box
        Slices along (z, y, x) of the model image, perhaps beyond it. Only tiles that have a voxel
        of it are run. Voxels of which a tile was not run get 0; all others, and so all in the box,
        get the labels of a run of all tiles. None runs all.
    linear_to
        Shape (z, y, x) of a grid with the same field of view and the same corner voxels. The
        logits are interpolated to this grid and then turned into labels. None returns labels on
        the model grid, equal to nnU-Net's.

    Returns
    -------
        Function that waits for the labels: uint8 (uint16 for 255 or more labels), (z, y, x), with
        the model's label numbers. On a CUDA device, all work is then in its queue; elsewhere it is
        done.
    """
    image = _prepared(source, model, tiling)
    if box is not None and not image.was_resampled:
        z, y, x = model.plans.transpose_forward
        tiling = replace(tiling, box=shifted((box[z], box[y], box[x]), image.box))
    return _queue_network_image(
        image, model, tiling, memory=memory, on_tile=on_tile, linear_to=linear_to
    )


def predict_network_image(
    image: NetworkImage,
    model: Model,
    tiling: Tiling,
    *,
    on_tile: Callable[[], None],
    method: str = "auto",
) -> NDArray[np.unsignedinteger]:
    """Label every voxel of the image before cropping and before nnU-Net's resampling.

    Parameters
    ----------
    image
        Prepared for the model.
    model, tiling, on_tile
        As for ``queue_part``.
    method
        How logits on another grid become labels, as in ``export_labels``.

    Returns
    -------
        uint8 (uint16 for 255 or more labels), (z, y, x), with the model's label numbers.
    """
    return _queue_network_image(image, model, tiling, on_tile=on_tile, method=method)()


def _prepared(source: SourceImage, model: Model, tiling: Tiling) -> NetworkImage:
    """Prepare the image where its tiles are cut."""
    import torch

    place = summing_device(model, tiling)
    if not tiling.image_on_device:
        source.leave_device()
        place = torch.device("cpu")
    return source.prepared(model, device=place)


def _queue_network_image(
    image: NetworkImage,
    model: Model,
    tiling: Tiling,
    *,
    memory: WindowMemory | None = None,
    on_tile: Callable[[], None],
    method: str = "auto",
    linear_to: tuple[int, int, int] | None = None,
) -> Callable[[], NDArray[np.unsignedinteger]]:
    """``predict_network_image``, or with ``linear_to``; returns a function as ``queue_part``."""
    cropped: NDArray[np.unsignedinteger] | None = None
    shape, box = image.full_shape, image.box
    axes: list[LinearWeights] | None = None
    if linear_to is not None:
        z, y, x = (linear_to[axis] for axis in model.plans.transpose_forward)
        shape = (z, y, x)
        box, axes = _axes_to(shape, image)
        cropped = _linear(model, image.voxels, axes, tiling=tiling, memory=memory, on_tile=on_tile)
    elif image.was_resampled:
        cropped = _resampled(image, model, method, tiling=tiling, memory=memory, on_tile=on_tile)
    else:
        wait = queue_labels(model, image.voxels, tiling, memory=memory, on_tile=on_tile)
    backward = model.plans.transpose_backward  # the model may be freed before the labels are there
    tiles = tiling.tiles(tuple(image.voxels.shape[1:]), model.patch_size)

    def finish() -> NDArray[np.unsignedinteger]:
        inner = wait().numpy() if cropped is None else cropped
        if tiles.skipped is not None:
            _erase_unfinished(inner, tiles, axes)
        labels = np.zeros(shape, dtype=inner.dtype)
        labels[box] = inner
        restored: NDArray[np.unsignedinteger] = labels.transpose(backward)
        return restored

    return finish


def _erase_unfinished(
    labels: NDArray[np.unsignedinteger], tiles: Tiles, axes: Sequence[LinearWeights] | None
) -> None:
    """Set labels to 0 where tiles were skipped, in place.

    ``labels`` are those of the tiles' image, or interpolated from it along ``axes``.
    """
    slices, complete = tiles.cells()
    blocks = [
        list(_blocks(cells, None if axes is None else axes[axis]))
        for axis, cells in enumerate(slices)
    ]
    for block in itertools.product(*blocks):
        if not all(complete[cell] for cell in itertools.product(*(used for _, used in block))):
            labels[tuple(part for part, _ in block)] = 0


def _blocks(cells: list[slice], axis: LinearWeights | None) -> Iterator[tuple[slice, set[int]]]:
    """Yield each run of labels along an axis that are made of the same cells, and the cells."""
    cell_of = np.repeat(np.arange(len(cells)), [cell.stop - cell.start for cell in cells])
    lower = upper = cell_of
    if axis is not None:
        used = np.where(axis.upper_weight == 0, axis.lower, axis.upper)
        lower, upper = cell_of[axis.lower], cell_of[used]
    changes = np.flatnonzero((np.diff(lower) != 0) | (np.diff(upper) != 0)) + 1
    for first, stop in itertools.pairwise([0, *changes.tolist(), len(lower)]):
        if first < stop:
            yield slice(first, stop), {int(lower[first]), int(upper[first])}


@dataclass(frozen=True, slots=True, kw_only=True)
class Probabilities:
    """nnU-Net's result for ``save_probabilities``.

    Parameters
    ----------
    values
        float32, (classes, z, y, x), model grid. The probabilities of a region-based model are
        independent of each other.
    cropping
        nnU-Net's properties of the box that the network was run on.
    """

    values: NDArray[np.float32]
    cropping: dict[str, Any]


def predict_probabilities(
    source: SourceImage,
    *,
    model: Model,
    tiling: Tiling,
    memory: WindowMemory | None,
    on_tile: Callable[[], None],
) -> tuple[NDArray[np.unsignedinteger], Probabilities]:
    """Label a model image by the probabilities of all classes, with nnU-Net's own export.

    The labels are the argmax of the probabilities, which have other ties than the logits. Needs as
    much memory as nnU-Net: several float32 copies of all classes on the model grid.

    The parameters are those of ``queue_part``.
    """
    from nnunetv2.inference.export_prediction import (
        convert_predicted_logits_to_segmentation_with_correct_shape,
    )

    image = _prepared(source, model, tiling)
    logits = predict_logits(model, image.voxels, tiling, memory=memory, on_tile=on_tile)
    backward = model.plans.transpose_backward
    cropping = {
        "shape_before_cropping": image.full_shape,
        "bbox_used_for_cropping": [[part.start, part.stop] for part in image.box],
        "shape_after_cropping_and_before_resampling": image.cropped_shape,
    }
    properties = {"spacing": [image.spacing_mm[axis] for axis in backward]} | cropping
    with inference_settings(model.device):
        # With nnU-Net's number of threads, because the last bits of a softmax depend on it.
        labels, values = convert_predicted_logits_to_segmentation_with_correct_shape(
            logits,
            model.plans,
            model.configuration,
            model.labels,
            properties,
            return_probabilities=True,
        )
    return labels, Probabilities(values=values, cropping=cropping)


def _axes_to(
    shape: tuple[int, int, int], image: NetworkImage
) -> tuple[tuple[slice, slice, slice], list[LinearWeights]]:
    """The image's box in a grid of ``shape``, and the interpolation weights per axis.

    The coordinates change from the network grid (half-pixel centres) to the box in the model grid
    to the target (corners). All these changes are linear, so they are one interpolation.
    """
    box, axes = [], []
    for axis, part in enumerate(image.box):
        positions = sample_positions(image.full_shape[axis], shape[axis]) - part.start
        size = part.stop - part.start
        inside = np.flatnonzero((positions >= -0.5) & (positions < size - 0.5))
        first, last = (int(inside[0]), int(inside[-1]) + 1) if inside.size else (0, 0)
        positions = positions[first:last]
        own = image.voxels.shape[axis + 1]
        if own != size:
            positions = (positions + 0.5) * (own / size) - 0.5
        box.append(slice(first, last))
        axes.append(interpolation_weights(positions, own))
    return (box[0], box[1], box[2]), axes


def _linear(
    model: Model,
    tensor: torch.Tensor,
    axes: Sequence[LinearWeights],
    *,
    tiling: Tiling,
    memory: WindowMemory | None,
    on_tile: Callable[[], None],
) -> NDArray[np.unsignedinteger]:
    """Interpolate logits slice by slice, as they leave the sliding window."""
    from totalfast.export.linear import linear_export

    device = summing_device(model, tiling)
    shape = tuple(len(axis.lower) for axis in axes)
    out = empty_labels(shape, label_dtype(len(model.labels.foreground_labels)), device)
    with linear_export(
        axes,
        out,
        rounded_to="float16",
        regions=model.regions,
        device=device,
        threads=usable_cores(),
    ) as export:
        for start, slab in final_logits(model, tensor, tiling, memory=memory, on_tile=on_tile):
            export.add(start, slab)
    return out


def _resampled(
    image: NetworkImage,
    model: Model,
    method: str,
    *,
    tiling: Tiling,
    memory: WindowMemory | None,
    on_tile: Callable[[], None],
) -> NDArray[np.unsignedinteger]:
    """nnU-Net's export for plans with another spacing than the image, in less memory."""
    resampling = model.configuration.resampling_fn_probabilities
    if method == "auto":
        method = choose_method(resampling, coordinates=CENTERS)
        logger.debug("  logits are resampled by the plans' rule: export '%s'", method)
    if method == "nearest":
        labels = predict_labels(model, image.voxels, tiling, memory=memory, on_tile=on_tile).numpy()
        indices = [
            nearest_indices(n, m, CENTERS)
            for n, m in zip(labels.shape, image.cropped_shape, strict=True)
        ]
        return gather(labels, indices, threads=usable_cores())
    if method == "linear":
        separate = separate_axis(image.network_spacing_mm, image.spacing_mm, resampling=resampling)
        axes = resampling_axes(image.voxels.shape[1:], image.cropped_shape, CENTERS, separate)
        return _linear(model, image.voxels, axes, tiling=tiling, memory=memory, on_tile=on_tile)
    logits = predict_logits(model, image.voxels, tiling, memory=memory, on_tile=on_tile)
    with inference_settings(model.device):
        return export_labels(
            logits,
            image.cropped_shape,
            method="plans",
            resampling=resampling,
            spacing=image.network_spacing_mm,
            new_spacing=image.spacing_mm,
            regions=model.regions,
            labels=len(model.labels.foreground_labels),
        )
