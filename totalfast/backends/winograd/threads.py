"""Threads that share the work of a compiled layer."""

from __future__ import annotations

import functools
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from totalfast.backends.winograd.layers import Work
from totalfast.system.cores import usable_cores
from totalfast.system.forks import check_process

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


NO_MORE = 1 << 40
"""A value of the counter that is beyond all pieces of work; layers multiply it by sizes of pieces,
which must not overflow."""

_kept = threading.local()


def run_in_threads(
    call: Callable[[Work], None], threads: int, floats: int, *, owners: object
) -> None:
    """Call a compiled layer in several threads; when this returns or raises, all have ended.

    Parameters
    ----------
    call
        Does a thread's share; the counter starts at zero.
    threads
        Number of threads.
    floats
        Number of float32 of each thread's scratch memory.
    owners
        What owns the memory that the layer has addresses of. It is kept as long as a thread runs.
    """
    check_process()
    counter = np.zeros(1, dtype=np.int64)
    running: list[threading.Event] = []

    def share(kept: object) -> None:
        ended = threading.Event()
        running.append(ended)  # before it takes a piece of work
        try:
            scratch = -(-_scratch(floats + LINE // 4).ctypes.data // LINE) * LINE
            call(Work(counter=counter.ctypes.data, scratch=scratch))
        finally:
            ended.set()

    try:
        futures = [_pool(threads).submit(share, owners) for _ in range(threads)]
        for future in futures:
            future.result()
    finally:
        # After an error or Ctrl-C: no thread takes another piece, also one that only begins later.
        counter[0] = NO_MORE
        _wait_for(running)


def _wait_for(running: list[threading.Event]) -> None:
    """Wait for threads, for some milliseconds; another Ctrl-C does not cut that short."""
    interruption: KeyboardInterrupt | None = None
    while not all(ended.is_set() for ended in tuple(running)):
        try:
            for ended in tuple(running):
                ended.wait()
        except KeyboardInterrupt as error:  # noqa: PERF203 - rare
            interruption = error
    if interruption is not None:
        raise interruption


def _scratch(floats: int) -> NDArray[np.float32]:
    """Memory of this thread, which is kept."""
    kept: NDArray[np.float32] | None = getattr(_kept, "scratch", None)
    if kept is None or kept.size < floats:
        kept = _kept.scratch = np.empty(floats, dtype=np.float32)
    return kept


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="totalfast-network")
