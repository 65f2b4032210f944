"""How this process gets memory from the system, which hands out fresh pages slowly.

Sets up the C library's allocator, torch's use of huge pages and Python's garbage collector. Most of
it works with glibc on Linux only; on other systems it does nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""mallopt's options (malloc.h)."""

MADV_DONTNEED = 4
"""madvise's option (linux/mman.h)."""

LARGE_BYTES = 32 << 20
"""Blocks of this size or larger come directly from the system and return to it. It is the largest
value that glibc accepts."""

KEPT_BYTES = 2 * LARGE_BYTES
"""Free memory that the process keeps. glibc adapts these values over time; until then a run clears
the same pages again and again."""

OBJECTS_PER_COLLECTION = 10_000
"""Number of new Python objects that starts a search for cycles; the default is 700 or 2000. Imports
alone create hundreds of thousands of objects, and almost none of them is garbage."""


def prepare_process() -> None:
    """Set up the memory of a command's process. Call it before torch is imported."""
    # With huge pages a run spends a third less time on page faults. Torch reads the variable at its
    # first allocation.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    gc.set_threshold(OBJECTS_PER_COLLECTION, 10, 10)
    mallopt = _libc("mallopt")
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


def release_free_memory() -> None:
    """Collect cycles of Python objects, then return free memory to the system."""
    gc.collect()
    trim_memory()


def trim_memory() -> None:
    """Return free memory to the system.

    Networks take and free blocks of many sizes, and glibc keeps what lies between blocks in use:
    without this, 0.1 GB more after each of TotalSegmentator's models.
    """
    trim = _libc("malloc_trim")
    if trim is not None:
        trim(0)


def release_mapped_files(folder: Path) -> None:
    """Remove read-only mapped files below a folder from this process's resident memory.

    The mappings stay valid: the next access maps the pages again from the system's cache.
    """
    advise = _libc("madvise")
    if advise is None:
        return
    inside = f"{folder.resolve()}/"
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/maps").read_text().splitlines():
            addresses, rights, _, _, _, *name = line.split(maxsplit=5)
            if rights.startswith("r-") and name and name[0].startswith(inside):
                start, stop = (int(address, 16) for address in addresses.split("-"))
                advise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), MADV_DONTNEED)


def _libc(name: str) -> Callable[..., Any] | None:
    """A function of the C library, or None if this system's library lacks it."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
