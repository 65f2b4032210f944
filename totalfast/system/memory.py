"""Free memory of the machine, of the container and of a CUDA device."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import psutil

from totalfast.system.cgroups import MEMBERSHIP, MOUNTED, own_cgroups, read_words

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import torch


GB = 1e9

FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}
"""By version of cgroups: file of the limit, file of the use, field of the freeable file cache."""


def free_host_bytes() -> float:
    """Free memory for this process in bytes: the machine's, or less if a cgroup limits it.

    Reads the limits of cgroups (version 1 or 2) on Linux only.
    """
    limits = _cgroup_bytes(MEMBERSHIP, MOUNTED)
    return float(min([psutil.virtual_memory().available, *limits]))


def total_host_bytes() -> float:
    """All memory of the machine in bytes, or less if a cgroup limits it; with the swap."""
    limits = _cgroup_limits(MEMBERSHIP, MOUNTED)
    return float(min([psutil.virtual_memory().total, *limits]) + psutil.swap_memory().total)


def peak_bytes() -> int:
    """Largest resident memory of this process so far, in bytes."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _cgroup_limits(membership: Path, mounted: Path) -> Iterator[float]:
    """Limit in bytes of each cgroup that has one, from the process's own cgroup to the root."""
    for folder, version in own_cgroups("memory", membership, mounted):
        limit = _number(folder / FILES[version][0])
        if limit is not None:
            yield limit


def _cgroup_bytes(membership: Path, mounted: Path) -> Iterator[float]:
    """Free bytes of each cgroup with a limit, from the process's own cgroup to the root."""
    for folder, version in own_cgroups("memory", membership, mounted):
        limit, used, cache = FILES[version]
        limit_bytes = _number(folder / limit)
        if limit_bytes is not None:
            freeable = _number(folder / "memory.stat", field=cache) or 0
            yield limit_bytes - (_number(folder / used) or 0) + freeable


def _number(path: Path, *, field: str = "") -> int | None:
    """The number in a file, or on its line that starts with ``field``; None if there is none."""
    for words in read_words(path):
        if (not field or words[0] == field) and words[-1].isdigit():
            return int(words[-1])
    return None


def free_device_bytes(device: torch.device) -> float:
    """Bytes that torch can still allocate on a CUDA device.

    The driver counts blocks that torch keeps for later as used; they are free for torch. Less may
    be left of what ``torch.cuda.set_per_process_memory_fraction`` allows.
    """
    import torch

    free, total = torch.cuda.mem_get_info(device)
    allocated = torch.cuda.memory_allocated(device)
    kept = torch.cuda.memory_reserved(device) - allocated
    allowed = torch.cuda.get_per_process_memory_fraction(device) * total - allocated
    return float(min(free + kept, allowed))
