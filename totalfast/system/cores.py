"""Number of usable CPU cores."""

from __future__ import annotations

import os

NNUNET_THREADS = 8
"""nnU-Net caps torch's threads at its ``default_num_processes``, which is 8."""


def usable_cores() -> int:
    """Number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def network_threads() -> int:
    """Number of threads of a network on a CPU: all cores, at most eight, as in nnU-Net."""
    return min(os.cpu_count() or 1, NNUNET_THREADS)
