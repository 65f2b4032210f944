"""How this process asks the system for memory, which hands out fresh pages slowly.

Knows the C library and torch's switch for it; knows nothing of what the memory is for. Does nothing
but on Linux, and most of it only where the C library is glibc.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Names of mallopt's options (malloc.h)."""

MADV_PAGEOUT = 21
"""Name of madvise's option (linux/mman.h, 5.4)."""

LARGE_BYTES = 32 << 20
"""From this size on memory comes from the system and goes back to it: the most that glibc takes."""

KEPT_BYTES = 2 * LARGE_BYTES
"""Free memory that is kept for the next who asks. Glibc comes to both by itself, as it sees what is
freed; until then a run clears the same pages again and again."""


def prepare_process() -> None:
    """Set up a process of our own. To be called before torch is imported."""
    # Torch then asks for huge pages: a run spends a third less time on page faults. It reads this
    # when it allocates first.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    mallopt = _libc("mallopt")
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


def give_back() -> None:
    """Return to the system what is free, cycles of Python's objects included."""
    gc.collect()
    trim = _libc("malloc_trim")
    if trim is not None:
        trim(0)


def page_out(arrays: Iterable[NDArray[Any]]) -> None:
    """Have the system take the memory of arrays that will hardly be read again.

    They stay valid: what lies in a mapped file is read from there again, all else is kept in swap
    space, or where it is if there is none.
    """
    advise, page = _libc("madvise"), mmap.PAGESIZE
    for array in arrays if advise is not None else ():
        start = -(-array.ctypes.data // page) * page
        size = (array.ctypes.data + array.nbytes - start) // page * page
        if size > 0:
            advise(ctypes.c_void_p(start), ctypes.c_size_t(size), MADV_PAGEOUT)


def _libc(name: str) -> Any:  # noqa: ANN401 - a C function
    """A function of the C library that is not in all of them, or None."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
