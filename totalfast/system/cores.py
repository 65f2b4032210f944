"""How many cores there are to use. Knows the operating system and nothing else."""

from __future__ import annotations

import os

NNUNET_THREADS = 8
"""nnU-Net caps torch's threads at its ``default_num_processes``, which is 8."""


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def network_threads() -> int:
    """Threads that a network runs on, on a CPU: as nnU-Net has it, all cores up to eight."""
    return min(os.cpu_count() or 1, NNUNET_THREADS)
