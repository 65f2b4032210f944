"""Free memory of the machine, of the container and of a CUDA device."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from collections.abc import Iterator


GB = 1e9


def free_host_bytes() -> float:
    """Free memory for this process in bytes: the machine's, or less if a cgroup limits it.

    Reads the limits of cgroups (version 1 or 2) on Linux only.
    """
    limits = _cgroup_bytes(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    return float(min([psutil.virtual_memory().available, *limits]))


def _cgroup_bytes(membership: Path, mounted: Path) -> Iterator[float]:
    """Free bytes of each cgroup with a limit, from the process's own cgroup to the root."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, limit, used, cache = mounted, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, limit, used = mounted / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        # In a container the path is often the host's, and only the root folder is visible.
        own = root / path.lstrip("/")
        for folder in (own, *own.parents):
            limit_bytes = _number(folder / limit)
            if limit_bytes is not None:
                freeable = _number(folder / "memory.stat", field=cache) or 0
                yield limit_bytes - (_number(folder / used) or 0) + freeable
            if folder == root:
                break


def _number(path: Path, *, field: str = "") -> int | None:
    """The number in a file, or on its line that starts with ``field``; None if there is none."""
    try:
        words = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return None
    for line in words:
        if (not field or line[0] == field) and line[-1].isdigit():
            return int(line[-1])
    return None


def free_device_bytes(device: str) -> float | None:
    """Free bytes of the CUDA device with this name; None for other devices."""
    if not device.startswith("gpu"):
        return None
    import torch

    index = int(device.partition(":")[2] or 0)
    if not torch.cuda.is_available() or index >= torch.cuda.device_count():
        return None
    free, _ = torch.cuda.mem_get_info(index)
    return float(free)
