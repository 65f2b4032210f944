"""How a run uses the memory of a CUDA device: the first way that fits."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from totalfast.engine.ladder import Ladder
from totalfast.models.model_summary import ModelSummary
from totalfast.system.memory import GB, free_device_bytes

if TYPE_CHECKING:
    import torch

    from totalfast.engine.tiles import Tiling
    from totalfast.run.context import RunContext
    from totalfast.scan import ModelImage
    from totalfast.tasks import Task

logger = logging.getLogger(__name__)

DEVICE_SHARE = 0.9
"""Share of a device's free memory that a plan may use; the allocator loses the rest."""

LINEAR_BYTES = 520e6
"""Of export "linear" on a device beside the logits, for 118 classes (measured on CPU tensors)."""


def choose_ladder(
    context: RunContext, model_image: ModelImage, task: Task, tiling: Tiling
) -> Ladder:
    """Return the ladder for a task's models, standing on the first rung that fits.

    Models of other tasks, which a session keeps, leave the device first.

    Raises
    ------
    MemoryLimitError
        If the sums of logits must be in main memory, and that is too small.
    """
    device = context.device
    if device.type != "cuda":
        return Ladder(tiling, device)
    free = _free(device)
    if _need(context, model_image, task, tiling) > free:
        context.drop_other_models()
        free = _free(device)
    smaller: Tiling | None = tiling
    while smaller is not None:
        tiling, need = smaller, _need(context, model_image, task, smaller)
        smaller = tiling.smaller() if need > free else None
    logger.info("GPU memory: about %.1f of %.1f GB; %s", need / GB, free / GB, tiling)
    if not tiling.on_device:
        context.plan_memory(model_image.canonical, task, sums_on_host=True).check(context.budget)
    return Ladder(tiling, device)


def _free(device: torch.device) -> float:
    return DEVICE_SHARE * free_device_bytes(device)


def _need(context: RunContext, model_image: ModelImage, task: Task, tiling: Tiling) -> float:
    """Bytes on the device at most, without the task's models that are already there."""
    networks = [ModelSummary.of(task, part) for part in task.parts]
    files = [
        network.weights
        for part, network in zip(task.parts, networks, strict=True)
        if not context.is_loaded(task, part)
    ]
    weights = sum(files) if context.store.keep else sum(sorted(files)[-2:])
    linear = context.options.export == "linear"
    return weights + max(
        _of_network(network, model_image, tiling, linear=linear) for network in networks
    )


def _of_network(
    network: ModelSummary, model_image: ModelImage, tiling: Tiling, *, linear: bool
) -> float:
    """Bytes of a model's tiles, image, sums and labels; autocast computes in float16."""
    image = network.image(model_image.grid)
    total = (network.forward + network.answer) / 2
    if tiling.on_device and tiling.image_on_device:
        total += 2 * image  # before and after its normalisation
    if tiling.on_device:
        total += network.window(model_image.grid) + (LINEAR_BYTES if linear else image / 4)
    return total
