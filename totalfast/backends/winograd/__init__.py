"""Networks run by compiled loops of our own, on CPUs: Winograd's convolutions, in float32."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from totalfast.backends.forward import Forward, run_by_torch, split_head
from totalfast.system.forks import threads_started

if TYPE_CHECKING:
    from torch import nn

    from totalfast.backends.winograd.network import Layers

logger = logging.getLogger(__name__)

FEWEST_LANES = 8
"""Numbers in a register. With fewer, the loops were not timed."""


def is_fast_here() -> bool:
    """Whether this processor has the registers for which the loops are made: AVX2 or AVX-512."""
    import numba

    from totalfast.backends.winograd.vectors import LANES

    return LANES >= FEWEST_LANES and not numba.config.DISABLE_JIT


def run_by_winograd(network: nn.Module, shape: tuple[int, ...]) -> Forward:
    """Prepare a network for tiles of one shape. Torch runs the last layer.

    Torch also runs networks with unknown layers; a warning is logged.
    """
    from totalfast.backends.winograd.network import UnknownLayerError

    threads_started()
    try:
        return prepare(network, shape)
    except UnknownLayerError as error:
        logger.warning("Backend winograd can't run %s, so torch does.", error)
        return run_by_torch(network, shape)


def prepare(network: nn.Module, shape: tuple[int, ...], *, fewest_features: int = 1) -> Forward:
    """``run_by_winograd`` without torch.

    Raises
    ------
    UnknownLayerError
        If the network has unknown layers, or fewer features at full resolution.
    """
    import numba

    from totalfast.backends.winograd.head import last_layer
    from totalfast.backends.winograd.network import UnknownLayerError, read_layers
    from totalfast.backends.winograd.program import Program
    from totalfast.backends.winograd.threads import layer_threads

    if numba.config.DISABLE_JIT:
        raise UnknownLayerError("networks while NUMBA_DISABLE_JIT is set")
    body, head = split_head(network)
    if head is None:
        raise UnknownLayerError(f"{type(network).__name__} with this last layer")
    layers = read_layers(body)
    if _features(layers) < fewest_features:
        raise UnknownLayerError(f"a network with {_features(layers)} features")
    program = Program(layers, shape, threads=layer_threads())
    return Forward(body=program, head=last_layer(head), release=program.release)


def _features(layers: Layers) -> int:
    _, convolutions = layers.decoder[-1]
    return len(convolutions[-1].weight)
