"""How this process asks the system for memory, which hands out fresh pages slowly.

Knows the C library, torch's switch for it and Python's collector of cycles; knows nothing of what
the memory is for. Asks the system on Linux only, and for most of it where the C library is glibc.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
from pathlib import Path
from typing import Any

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Names of mallopt's options (malloc.h)."""

MADV_DONTNEED = 4
"""Name of madvise's option (linux/mman.h)."""

LARGE_BYTES = 32 << 20
"""From this size on memory comes from the system and goes back to it: the most that glibc takes."""

KEPT_BYTES = 2 * LARGE_BYTES
"""Free memory that is kept for the next who asks. Glibc comes to both by itself, as it sees what is
freed; until then a run clears the same pages again and again."""

OBJECTS_PER_COLLECTION = 10_000
"""New Python objects after which cycles are looked for; by default 700 or 2000. Imports alone make
hundreds of thousands, hardly any of them garbage."""


def prepare_process() -> None:
    """Set up a process of our own. To be called before torch is imported."""
    # Torch then asks for huge pages: a run spends a third less time on page faults. It reads this
    # when it allocates first.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    gc.set_threshold(OBJECTS_PER_COLLECTION, 10, 10)
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


def drop_mapped(folder: Path) -> None:
    """Take what was read of files below a folder, mapped for reading, out of this process's memory.

    It stays valid, and in the system's cache: who reads it again has it mapped again.
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


def _libc(name: str) -> Any:  # noqa: ANN401 - a C function
    """A function of the C library that is not in all of them, or None."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
