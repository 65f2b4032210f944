"""Networks run by compiled loops of our own, on CPUs: Winograd's convolutions, in float32."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from totalfast.backends.forward import Forward, run_by_torch, split_head
from totalfast.system.cores import network_threads
from totalfast.system.forks import threads_started

if TYPE_CHECKING:
    from torch import nn

    from totalfast.backends.winograd.network import Layers

logger = logging.getLogger(__name__)

FEWEST_FEATURES = 16
"""Features at full resolution. Networks with fewer are faster in other backends, because features
are computed in blocks of 32."""

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
        return _prepared(network, shape, fewest_features=1)
    except UnknownLayerError as error:
        logger.warning("Backend winograd can't run %s, so torch does.", error)
        return run_by_torch(network, shape)


def run_fastest(network: nn.Module, shape: tuple[int, ...]) -> Forward:
    """``run_by_winograd`` for the networks that gain from it; else OpenVINO, if it is installed."""
    from totalfast.backends import openvino_is_installed
    from totalfast.backends.openvino import run_by_openvino
    from totalfast.backends.winograd.network import UnknownLayerError

    threads_started()
    try:
        return _prepared(network, shape, fewest_features=FEWEST_FEATURES)
    except UnknownLayerError as error:
        logger.debug("backend winograd does not run this network: %s", error)
    other = run_by_openvino if openvino_is_installed() else run_by_torch
    return other(network, shape)


def _prepared(network: nn.Module, shape: tuple[int, ...], *, fewest_features: int) -> Forward:
    from totalfast.backends.last_layer import LastLayer
    from totalfast.backends.winograd.network import UnknownLayerError, read_layers
    from totalfast.backends.winograd.program import Program

    body, head = split_head(network)
    if head is None:
        raise UnknownLayerError(f"{type(network).__name__} with this last layer")
    layers = read_layers(body)
    if _features(layers) < fewest_features:
        raise UnknownLayerError(f"a network with {_features(layers)} features")
    program = Program(layers, shape, threads=network_threads())
    return Forward(body=program, head=LastLayer(head), release=program.release)


def _features(layers: Layers) -> int:
    return len(layers.encoder[0][0].weight)
