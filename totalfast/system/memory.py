"""Free memory: the machine's, the container's, a CUDA device's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from collections.abc import Iterator


GB = 1e9


def free_host_bytes() -> float:
    """Memory that this process can have: the machine's, or less in a container.

    Linux tells what is free, and what cgroups (version 1 or 2) allow; macOS tells what is built in,
    and Windows nothing.
    """
    found = [
        psutil.virtual_memory().available,
        *_cgroup_bytes(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")),
    ]
    return float(min(found))


def _cgroup_bytes(membership: Path, mounted: Path) -> Iterator[float]:
    """What each cgroup that the process is in has left, from its own up to the root."""
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
        # In a container the path is often the host's, and only the root is there to see.
        own = root / path.lstrip("/")
        for folder in (own, *own.parents):
            most = _number(folder / limit)
            if most is not None:
                freed = _number(folder / "memory.stat", field=cache) or 0
                yield most - (_number(folder / used) or 0) + freed
            if folder == root:
                break


def _number(path: Path, *, field: str = "") -> int | None:
    """The number in a file, or on its line that begins with a field; None if there is none."""
    try:
        words = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return None
    for line in words:
        if (not field or line[0] == field) and line[-1].isdigit():
            return int(line[-1])
    return None


def free_device_bytes(device: str) -> float | None:
    """Free memory of the CUDA device that a name means; None if it means another device."""
    if not device.startswith("gpu"):
        return None
    import torch

    index = int(device.partition(":")[2] or 0)
    if not torch.cuda.is_available() or index >= torch.cuda.device_count():
        return None
    free, _ = torch.cuda.mem_get_info(index)
    return float(free)
