"""Devices by their TotalSegmentator names."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING

from totalfast.errors import OptionError

if TYPE_CHECKING:
    from typing import TypeAlias

    import torch

    ModelKey: TypeAlias = tuple[Path, tuple[int, ...] | None, str, str]
    """Folder, folds, and the names of device and backend."""

logger = logging.getLogger(__name__)

DEVICE_PATTERN = re.compile(r"^(gpu|cpu|mps|gpu:\d+)$")


def select_device(name: str) -> torch.device:
    """Turn upstream's device names into torch's; an absent GPU becomes the CPU.

    Raises
    ------
    OptionError
        If "mps" is asked for where there is none.
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


def validate_device(value: str) -> str:
    """Return ``value`` if it names a device as upstream does.

    Raises
    ------
    OptionError
        If it does not.
    """
    if not DEVICE_PATTERN.match(value):
        raise OptionError(
            f"Invalid device type: '{value}'. Must be 'gpu', 'cpu', 'mps', or 'gpu:X' where X is "
            "an integer representing the GPU device ID."
        )
    return value
