"""How this process asks the system for memory, which hands out fresh pages slowly.

Knows the C library, torch's switch for it and Python's collector of cycles; knows nothing of what
the memory is for. Of the system it asks nothing but on Linux, and most only where the C library is
glibc.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import mmap
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

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

OBJECTS = 100_000
"""New Python objects after which cycles are looked for; by default 700 or 2000. Imports alone make
hundreds of thousands, none of them garbage."""


def prepare_process() -> None:
    """Set up a process of our own. To be called before torch is imported."""
    # Torch then asks for huge pages: a run spends a third less time on page faults. It reads this
    # when it allocates first.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    gc.set_threshold(OBJECTS, 10, 10)
    mallopt = _libc("mallopt")
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


@contextlib.contextmanager
def given_back() -> Iterator[None]:
    """Return to the system, at the end, what is free, cycles of objects made meanwhile included."""
    gc.freeze()  # so that the many objects of before need not be looked at
    try:
        yield
    finally:
        gc.collect()
        gc.unfreeze()
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
