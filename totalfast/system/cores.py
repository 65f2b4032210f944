"""Number of threads: what the machine, its container and its user allow."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from totalfast.system.cgroups import MEMBERSHIP, MOUNTED, own_cgroups, read_words

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NNUNET_THREADS = 8
"""nnU-Net caps torch's threads at its ``default_num_processes``, which is 8."""

THREADS_VARIABLE = "OMP_NUM_THREADS"
"""Environment variable with which people and batch systems limit a program's threads."""


def usable_cores() -> int:
    """Number of cores that this process may use, at least one. All its thread pools have this size.

    The smallest of: the cores that the process may run on (its affinity), the CPU time of its
    cgroups (``docker --cpus``, SLURM, Kubernetes), and ``OMP_NUM_THREADS``. A quota of 2.5 cores
    allows two threads.
    """
    limits = [*_environment_limit(), *_cgroup_cores(MEMBERSHIP, MOUNTED)]
    return max(1, int(min([_affinity(), *limits])))


def network_threads() -> int:
    """Number of threads of a network on a CPU: the usable cores, at most eight, as in nnU-Net.

    nnU-Net takes all cores of the machine, whatever the limits of the process are. With two threads
    or more the network's output is the same, whatever their number. With one thread oneDNN computes
    the last layer (1x1x1 convolution) with other last bits.
    """
    return min(usable_cores(), NNUNET_THREADS)


def limit_libraries() -> None:
    """Limit the thread pools of libraries that know the affinity but not the CPU time of cgroups.

    Sets ``OMP_NUM_THREADS``, only where a cgroup allows fewer cores. For a process of our own,
    before numpy and torch are imported.
    """
    if min(_cgroup_cores(MEMBERSHIP, MOUNTED), default=_affinity()) < _affinity():
        os.environ[THREADS_VARIABLE] = str(usable_cores())


def _affinity() -> int:
    """Number of cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    if sys.platform == "win32":
        import psutil

        return len(psutil.Process().cpu_affinity() or [])
    return os.cpu_count() or 1


def _environment_limit() -> Iterator[float]:
    """``OMP_NUM_THREADS``, if it is a positive number or a list that begins with one."""
    first = os.environ.get(THREADS_VARIABLE, "").partition(",")[0].strip()
    if first.isdecimal() and int(first) > 0:
        yield int(first)


def _cgroup_cores(membership: Path, mounted: Path) -> Iterator[float]:
    """CPU time per time of each cgroup with a quota, from the process's own cgroup to the root."""
    for folder, version in own_cgroups("cpu", membership, mounted):
        if version == 2:
            words = [word for line in read_words(folder / "cpu.max") for word in line]
        else:
            files = (folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us")
            words = [word for file in files for line in read_words(file) for word in line]
        # Without a quota the first word is "max" (version 2) or -1 (version 1).
        if len(words) == 2 and all(word.isdecimal() and int(word) > 0 for word in words):
            yield int(words[0]) / int(words[1])
