"""Backends that run a model's networks: torch, torch's compiler, OpenVINO, or loops of our own.

A backend turns a network into a ``Forward``. All backends are called the same way.
"""

from __future__ import annotations

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

BACKENDS = ("auto", "torch", "compile", "openvino", "winograd")
"""- auto: on CPUs winograd, for networks that it can't run OpenVINO if it is installed, else torch
- torch: plain torch, the only backend with exactly TotalSegmentator's voxels
- compile: torch's compiler
- openvino: OpenVINO
- winograd: compiled loops of our own
"""

PRECISIONS = ("f32", "bf16")
"""Numbers that networks compute with; bfloat16 is OpenVINO's only."""

BFLOAT16 = "openvino in bfloat16"
"""Stands for a backend's name where the precision is "bf16"."""

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
        if name == BFLOAT16:  # not a name for users
            name = f"{DEFAULT_VARIABLE}={name}"
    if name not in (*BACKENDS, BFLOAT16):
        raise OptionError(f"backend must be one of {', '.join(BACKENDS)}, not '{name}'.")
    if name in ("openvino", BFLOAT16) and not openvino_is_installed():
        what = "backend 'openvino'" if name == "openvino" else "precision bf16"
        raise OptionError(
            f"{what} needs OpenVINO, which is not installed: pip install 'totalfast[cpu]', or use "
            "backend 'torch'."
        )
    return name


def keeps_weights(backend: Backend) -> bool:
    """Whether a backend computes with a network's own tensors. Others have copies of them."""
    copying = ("fastest", "openvino", "winograd")
    return backend.__module__ not in {f"{__name__}.{name}" for name in copying}


def choose_backend(name: str, device: torch.device) -> Backend:
    """Return the backend for a device; log a message if "auto" selects one with other last bits.

    Raises
    ------
    OptionError
        If the backend is unknown, not installed, or does not run on the device.
    """
    is_auto = name == "auto"
    name = resolve_backend(name)
    if name in ("openvino", "winograd", BFLOAT16) and device.type != "cpu":
        what = "precision bf16" if name == BFLOAT16 else f"backend '{name}'"
        raise OptionError(f"{what} runs on device 'cpu' only, not {device.type}.")
    if name == "compile" and device.type == "mps":
        raise OptionError("backend 'compile' runs on devices 'cpu' and 'gpu' only, not mps.")
    if name == "auto" and device.type == "cpu":
        name = _fastest_on_cpu()
    if is_auto and name in _OTHER_BITS:
        logger.info(
            "Using %s: it is faster, but single voxels may differ from TotalSegmentator's. "
            "--backend torch gives identical voxels.",
            _OTHER_BITS[name],
        )
    return _BACKENDS[name]()


def _fastest_on_cpu() -> str:
    from totalfast.backends.winograd import is_fast_here

    if is_fast_here():
        return "fastest"
    return "openvino" if openvino_is_installed() else "torch"


def _torch() -> Backend:
    from totalfast.backends.forward import run_by_torch

    return run_by_torch


def _compiled() -> Backend:
    from totalfast.backends.compiled import run_compiled

    return run_compiled


def _openvino() -> Backend:
    from totalfast.backends.openvino import run_by_openvino

    return run_by_openvino


def _bfloat16() -> Backend:
    from totalfast.backends.openvino import has_bfloat16, run_in_bfloat16

    if has_bfloat16():
        logger.info("Networks compute in bfloat16 (OpenVINO): many voxels change.")
    else:
        logger.warning(
            "WARNING: this processor has no bfloat16, so OpenVINO computes in float32 in spite of "
            "precision bf16."
        )
    return run_in_bfloat16


def _winograd() -> Backend:
    from totalfast.backends.winograd import run_by_winograd

    return run_by_winograd


def _fastest() -> Backend:
    from totalfast.backends.fastest import run_fastest

    return run_fastest


_OTHER_BITS = {
    "fastest": "Winograd's convolutions, or OpenVINO for networks that they can't run",
    "openvino": "OpenVINO",
}
"""Backends that "auto" selects and that give other last bits, with their names in messages."""

_BACKENDS: dict[str, Callable[[], Backend]] = {
    "auto": _torch,
    "torch": _torch,
    "compile": _compiled,
    "openvino": _openvino,
    BFLOAT16: _bfloat16,
    "winograd": _winograd,
    "fastest": _fastest,
}
"""Name to a function that imports and returns a backend; "auto" is that of devices."""
