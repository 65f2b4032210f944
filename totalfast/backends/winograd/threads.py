"""Threads that share the work of a compiled layer."""

from __future__ import annotations

import functools
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from totalfast.backends.winograd.layers import Work
from totalfast.system.cores import usable_cores

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

LINE = 64
"""Bytes of a cache line."""

MOST_THREADS = 32
"""More share the memory's bandwidth, and wait for each other after each layer."""


def layer_threads() -> int:
    """Number of threads of a network: the usable cores. nnU-Net's limit of eight is not needed."""
    return min(usable_cores(), MOST_THREADS)


_kept = threading.local()


def run_in_threads(call: Callable[[Work], None], threads: int, floats: int) -> None:
    """Call a compiled layer in several threads.

    Parameters
    ----------
    call
        Does a thread's share; the counter starts at zero.
    threads
        Number of threads.
    floats
        Number of float32 of each thread's scratch memory.
    """
    counter = np.zeros(1, dtype=np.int64)

    def share(_: int) -> None:
        scratch = -(-_scratch(floats + LINE // 4).ctypes.data // LINE) * LINE
        call(Work(counter=counter.ctypes.data, scratch=scratch))

    list(_pool(threads).map(share, range(threads)))


def _scratch(floats: int) -> NDArray[np.float32]:
    """Memory of this thread, which is kept."""
    kept: NDArray[np.float32] | None = getattr(_kept, "scratch", None)
    if kept is None or kept.size < floats:
        kept = _kept.scratch = np.empty(floats, dtype=np.float32)
    return kept


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="totalfast-network")
