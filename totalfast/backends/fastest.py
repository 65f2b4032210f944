"""The backend that is the fastest one on CPUs, for each network."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from totalfast.backends import openvino_is_installed
from totalfast.backends.forward import Forward, run_by_torch
from totalfast.backends.openvino import run_by_openvino
from totalfast.backends.winograd import prepare
from totalfast.backends.winograd.network import UnknownLayerError
from totalfast.system.forks import threads_started

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger(__name__)

FEWEST_FEATURES = 8
"""Features at full resolution. Networks with fewer are faster in other backends, because Winograd's
convolutions compute blocks of 16 (8 with AVX2)."""


def run_fastest(network: nn.Module, shape: tuple[int, ...]) -> Forward:
    """Run a network by Winograd's convolutions; if it does not gain, by OpenVINO, or by torch."""
    threads_started()
    try:
        return prepare(network, shape, fewest_features=FEWEST_FEATURES)
    except UnknownLayerError as error:
        logger.debug("backend winograd does not run this network: %s", error)
    other = run_by_openvino if openvino_is_installed() else run_by_torch
    return other(network, shape)
