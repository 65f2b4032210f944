"""Backends that run a model's networks: plain torch, torch's compiler, or OpenVINO.

A backend turns a network into a ``Forward``. All backends are called the same way.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import os
from typing import TYPE_CHECKING

from totalfast.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeAlias

    import torch
    from torch import nn

    from totalfast.backends.forward import Forward

    Backend: TypeAlias = Callable[[nn.Module, tuple[int, ...]], Forward]
    """A function of a network, in eval mode and on its device, and of the shape of its tiles:
    (1, channels, z, y, x), or (1, channels, y, x) for a 2-D model."""

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "torch", "compile", "openvino")
"""- auto: OpenVINO on CPUs if it is installed, else torch
- torch: plain torch, the only backend with exactly TotalSegmentator's voxels
- compile: torch's compiler
- openvino: OpenVINO
"""

DEFAULT_VARIABLE = "TOTALFAST_BACKEND"
"""Environment variable with the backend that "auto" means."""


def openvino_is_installed() -> bool:
    """Whether OpenVINO can be imported."""
    return importlib.util.find_spec("openvino") is not None


def resolve_backend(name: str) -> str:
    """Check a backend's name; replace "auto" by the environment variable's value, if it is set.

    Raises
    ------
    OptionError
        If the backend does not exist or is not installed.
    """
    if name == "auto":
        name = os.environ.get(DEFAULT_VARIABLE) or name
    if name not in BACKENDS:
        raise OptionError(f"backend must be one of {', '.join(BACKENDS)}, not '{name}'.")
    if name == "openvino" and not openvino_is_installed():
        raise OptionError(
            "backend 'openvino' needs OpenVINO, which is not installed: "
            "pip install 'totalfast[cpu]', or use backend 'torch'."
        )
    return name


def keeps_weights(backend: Backend) -> bool:
    """Whether a backend computes with a network's own tensors. OpenVINO has copies of them."""
    return backend.__module__ != f"{__name__}.openvino"


def choose_backend(name: str, device: torch.device) -> Backend:
    """Return the backend for a device; log a message if "auto" selects OpenVINO.

    Raises
    ------
    OptionError
        If the backend is unknown, not installed, or does not run on the device.
    """
    is_auto = name == "auto"
    name = resolve_backend(name)
    if name == "auto":
        name = "openvino" if device.type == "cpu" and openvino_is_installed() else "torch"
    if name == "openvino":
        if device.type != "cpu":
            raise OptionError(f"backend 'openvino' runs on device 'cpu' only, not {device.type}.")
        if is_auto:
            logger.info(
                "Using OpenVINO %s because it is installed: it is faster, but single voxels may "
                "differ from TotalSegmentator's. --backend torch gives identical voxels.",
                importlib.metadata.version("openvino"),
            )
        from totalfast.backends.openvino import run_by_openvino

        return run_by_openvino
    if name == "compile":
        if device.type == "mps":
            raise OptionError("backend 'compile' runs on devices 'cpu' and 'gpu' only, not mps.")
        from totalfast.backends.compiled import run_compiled

        return run_compiled
    from totalfast.backends.forward import run_by_torch

    return run_by_torch
