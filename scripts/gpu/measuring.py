"""What the measuring scripts share: their turn, their answer, the device and the clock.

The scripts ``measure_*.py`` run in processes of their own (``programs.in_turn``).
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SCRIPTS = Path(__file__).resolve().parents[1]


def my_turn() -> None:
    """Wait until no other script measures. CUDA must not be used before."""
    sys.stdin.readline()


def answer(result: dict[str, Any]) -> None:
    """Give the result to the benchmark; a later answer replaces it."""
    print("\n" + json.dumps(result, default=str), flush=True)


def torch_device(name: str) -> torch.device:
    """The device that totalfast means with ``gpu`` or ``cpu``."""
    import torch

    return torch.device("cuda" if name.startswith("gpu") else name)


def synchronised() -> float:
    """Seconds of the clock when the device has finished its work."""
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_mb(*, reserved: bool = False) -> int:
    """Peak of the memory that torch has allocated or reserved on the device since the start."""
    import torch

    if not torch.cuda.is_initialized():
        return 0
    peak = torch.cuda.max_memory_reserved if reserved else torch.cuda.max_memory_allocated
    return int(peak()) >> 20
