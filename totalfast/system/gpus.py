"""Whether there may be a CUDA device, without importing torch, which takes seconds."""

from __future__ import annotations

import os
import sys
from pathlib import Path

DRIVER_FILES = ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
"""Files on Linux of NVIDIA's driver, of Windows' in WSL, and of AMD's."""


def may_have_gpu(device: str) -> bool:
    """Whether networks probably run on a CUDA device.

    For estimates only; torch decides. False if a GPU was not asked for, if it is hidden, or if no
    driver is installed.

    Parameters
    ----------
    device
        One of upstream's names, such as "gpu" or "gpu:1".
    """
    if not device.startswith("gpu"):
        return False
    torch = sys.modules.get("torch")
    if torch is not None and not getattr(torch.__spec__, "_initializing", False):
        return bool(torch.cuda.is_available())
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    if sys.platform == "win32":
        windows = Path(os.environ.get("SYSTEMROOT", "C:/Windows"))
        return (windows / "System32" / "nvcuda.dll").exists()
    return any(Path(name).exists() for name in DRIVER_FILES)
