"""A GPU's first tile, which takes longer than the later ones, while the scan is read."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from totalfast.engine.torch_settings import inference_settings

if TYPE_CHECKING:
    from concurrent.futures import Future

    from totalfast.models.model import Model
    from totalfast.run.context import RunContext

logger = logging.getLogger(__name__)

_warm: set[tuple[str, tuple[int, ...]]] = set()
"""Devices, and sizes of tiles that they have computed."""


def warm_up(context: RunContext, loading: Future[Model]) -> None:
    """Run the first model of a run on a tile of zeros, if its device has not had one of that size.

    CUDA loads its code and cuDNN chooses its algorithms at the first tile; what they have loaded
    and chosen serves all threads. Does nothing if the prediction has already begun. An error is
    left to the prediction, which will meet it, too.

    Parameters
    ----------
    context
        Of the run.
    loading
        The first model.
    """
    if loading.exception() is not None or loading.result().device.type != "cuda":
        return
    if not context.store.predicting.take_if_free():
        return
    # A rough pass comes first, and is always deterministic.
    task = context.options.resolved_task()
    has_rough_pass = task.crop is not None or task.guide is not None
    try:
        _run_tile(loading.result(), deterministic=context.options.deterministic or has_rough_pass)
    except RuntimeError as error:  # torch's and CUDA's
        logger.debug("the first tile failed: %s", error)
    finally:
        context.store.predicting.give_back()


def _run_tile(model: Model, *, deterministic: bool) -> None:
    import torch

    key = (str(model.device), (*model.patch_size, model.heads, deterministic))
    if key in _warm:
        return
    channels = len(model.configuration.normalization_schemes)
    with inference_settings(model.device, deterministic=deterministic):
        tile = torch.zeros((1, channels, *model.patch_size), device=model.device)
        model.forwards[0](tile)
    model.forwards[0].release()
    _warm.add(key)
