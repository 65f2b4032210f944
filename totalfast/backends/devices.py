"""TotalSegmentator's names of devices."""

from __future__ import annotations

import logging
import re
import sys
from typing import TYPE_CHECKING

from totalfast.errors import DeviceMemoryError, OptionError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

DEVICE_PATTERN = re.compile(r"^(gpu|cpu|mps|gpu:\d+)$")


def select_device(name: str) -> torch.device:
    """Return torch's device for one of upstream's names; the CPU if a GPU is missing.

    Raises
    ------
    OptionError
        If the name is invalid, or is "mps" and the machine has no MPS device.
    """
    import torch

    validate_device(name)
    if name == "mps":
        if not torch.backends.mps.is_available():
            raise OptionError("this machine has no MPS device; use device 'cpu'.")
        return torch.device("mps")
    if not name.startswith("gpu"):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        logger.info(
            "No GPU detected. Running on CPU. This can be very slow. The '--fast' option can help "
            "to reduce runtime."
        )
        return torch.device("cpu")
    index = int(name.partition(":")[2] or 0)
    if index >= torch.cuda.device_count():
        logger.info("Invalid GPU config, running on the CPU")
        return torch.device("cpu")
    return torch.device("cuda", index)


def start_device(device: torch.device) -> None:
    """Start a CUDA device, which takes a few tenths of a second."""
    import torch

    if device.type == "cuda":
        torch.cuda.mem_get_info(device)


def release_device_memory() -> None:
    """Return the memory that torch keeps for later to the CUDA devices, if it uses any."""
    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    is_initialized = getattr(cuda, "is_initialized", None)  # None while torch is being imported
    if cuda is not None and is_initialized is not None and is_initialized():
        cuda.empty_cache()


def too_small(message: str) -> DeviceMemoryError:
    """Return the error for a CUDA device whose memory is too small; ``message`` is torch's."""
    first = message.partition("\n")[0].partition(". ")[0].rstrip(".")
    return DeviceMemoryError(
        "the GPU's memory is too small for one tile of the network, with everything else on the "
        f"CPU ({first}). Close other programs that use the GPU, choose another one "
        "(--device gpu:1), or use --device cpu."
    )


def validate_device(value: str) -> str:
    """Return ``value`` if it is one of upstream's device names.

    Raises
    ------
    OptionError
        If it is not.
    """
    if not DEVICE_PATTERN.match(value):
        raise OptionError(
            f"Invalid device type: '{value}'. Must be 'gpu', 'cpu', 'mps', or 'gpu:X' where X is "
            "an integer representing the GPU device ID."
        )
    return value
