"""What runs a model's networks: torch as it is, torch's compiler, or OpenVINO.

Chooses by name and device, and knows nothing of images or of how tiles are laid. A backend turns a
network into a ``Forward``; whoever calls that need not know which backend it came from.
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

    from totalfast.engine.backends.forward import Forward

    Backend: TypeAlias = Callable[[nn.Module, tuple[int, ...]], Forward]
    """From a network, in eval mode and on its device, and the shape of its tiles, (1, channels, z,
    y, x) or of a 2-D model (1, channels, y, x)."""

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "torch", "compile", "openvino")
"""OpenVINO on CPUs if it is installed, else torch; torch as it is, the only one that gives
TotalSegmentator's voxels to the last; torch's compiler; OpenVINO."""

DEFAULT_VARIABLE = "TOTALFAST_BACKEND"
"""Environment variable with the backend that "auto" stands for."""


def openvino_is_installed() -> bool:
    """Whether there is an OpenVINO to import."""
    return importlib.util.find_spec("openvino") is not None


def resolve_backend(name: str) -> str:
    """Return the backend that a name stands for, the environment being asked for "auto".

    Raises
    ------
    OptionError
        If there is no such backend, or it is not installed.
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


def choose_backend(name: str, device: torch.device) -> Backend:
    """Return the backend of that name for a device; says so if "auto" is not torch.

    Raises
    ------
    OptionError
        If it is unknown, not installed, or does not run on the device.
    """
    name, asked = resolve_backend(name), name
    if name == "auto":
        name = "openvino" if device.type == "cpu" and openvino_is_installed() else "torch"
    if name == "openvino":
        if device.type != "cpu":
            raise OptionError(f"backend 'openvino' runs on device 'cpu' only, not {device.type}.")
        if asked == "auto":
            logger.info(
                "Backend OpenVINO %s, as it is installed: faster, but single voxels may differ "
                "from TotalSegmentator's; --backend torch gives the same ones.",
                importlib.metadata.version("openvino"),
            )
        from totalfast.engine.backends.openvino import run_by_openvino

        return run_by_openvino
    if name == "compile":
        if device.type == "mps":
            raise OptionError("backend 'compile' runs on devices 'cpu' and 'gpu' only, not mps.")
        from totalfast.engine.backends.compiled import run_compiled

        return run_compiled
    from totalfast.engine.backends.forward import run_by_torch

    return run_by_torch
