"""What memory a run may take: what is free, or what the user allows.

Knows the operating system, its containers and CUDA; knows nothing of scans or models.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from totalfast.options import Options

GB = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Memory that a run may take, in bytes.

    Parameters
    ----------
    host
        None if the system does not tell.
    device
        Free on the CUDA device that networks run on; None: they run on the CPU.
    is_limit
        Whether the user has set ``host``, so that needing more is an error.
    """

    host: float | None
    device: float | None
    is_limit: bool

    @classmethod
    def of(cls, options: Options) -> Budget:
        """Take the user's limit, or else what is free now."""
        limit = options.max_memory_gb
        return cls(
            host=free_host_bytes() if limit is None else limit * GB,
            device=_free_device_bytes(options.device),
            is_limit=limit is not None,
        )


def free_host_bytes() -> float | None:
    """Memory that this process can have: the machine's, or less in a container.

    Linux tells what is free, and what cgroups (version 1 or 2) allow; macOS tells what is built in,
    and Windows nothing.
    """
    found = [_machine_bytes(), *_cgroup_bytes(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))]
    known = [bytes_ for bytes_ in found if bytes_ is not None]
    return min(known, default=None)


def _machine_bytes() -> float | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
            return None
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    fields = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
    return 1024.0 * int(fields["MemAvailable"][0]) if "MemAvailable" in fields else None


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


def _free_device_bytes(device: str) -> float | None:
    """Free memory of the CUDA device that a name means; None if it means another device."""
    if not device.startswith("gpu"):
        return None
    import torch

    index = int(device.partition(":")[2] or 0)
    if not torch.cuda.is_available() or index >= torch.cuda.device_count():
        return None
    free, _ = torch.cuda.mem_get_info(index)
    return float(free)
