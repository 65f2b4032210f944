"""Run one model on a model image: labels on the model grid.

Knows models and label maps; knows nothing of files or scanner grids.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from totalfast.sliding_window import inference_settings, predict_labels, predict_logits
from totalfast.stages.normalise import to_network_image

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from totalfast.stages.normalise import NetworkImage
    from totalfast.weights import Model


def predict_part(
    voxels: NDArray[np.float32],
    *,
    spacing_mm: Sequence[float],
    model: Model,
    step: float,
    on_tile: Callable[[], None],
) -> NDArray[np.unsignedinteger]:
    """Label every voxel of a model image with one model.

    Parameters
    ----------
    voxels
        float32, (z, y, x), model grid, not normalised.
    spacing_mm
        Spacing along (z, y, x).
    model
        A loaded model.
    step
        Tile step as a share of the tile size.
    on_tile
        Called after each tile.

    Returns
    -------
        uint8 (uint16 from 255 labels on), (z, y, x), the model's own labels.
    """
    import torch

    image = to_network_image(voxels, spacing_mm=spacing_mm, model=model)
    tensor = torch.from_numpy(image.voxels)
    if image.was_resampled:
        return _resampled_labels(image, tensor, model, step, on_tile)
    found = predict_labels(model, tensor, step=step, on_tile=on_tile).numpy()
    labels = np.zeros(image.full_shape, dtype=found.dtype)
    labels[image.box] = found
    restored: NDArray[np.unsignedinteger] = labels.transpose(model.plans.transpose_backward)
    return restored


def _resampled_labels(
    image: NetworkImage,
    tensor: object,
    model: Model,
    step: float,
    on_tile: Callable[[], None],
) -> NDArray[np.unsignedinteger]:
    """Where the plans' spacing gives another grid: nnU-Net's own export, on all logits."""
    from nnunetv2.inference.export_prediction import (
        convert_predicted_logits_to_segmentation_with_correct_shape as export,
    )

    logits = predict_logits(model, tensor, step=step, on_tile=on_tile)  # type: ignore[arg-type]
    spacing = [0.0, 0.0, 0.0]
    for position, axis in enumerate(model.plans.transpose_forward):
        spacing[axis] = image.spacing_mm[position]
    properties = {
        "spacing": spacing,
        "shape_before_cropping": image.full_shape,
        "shape_after_cropping_and_before_resampling": image.cropped_shape,
        "bbox_used_for_cropping": [[part.start, part.stop] for part in image.box],
    }
    with inference_settings(model.device):
        labels: NDArray[np.unsignedinteger] = export(
            logits, model.plans, model.configuration, model.labels, properties
        )
    return labels
