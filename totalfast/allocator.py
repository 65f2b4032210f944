"""How this process asks the system for memory, which hands out fresh pages slowly.

Knows the C library and torch's switch for it; knows nothing of what the memory is for. Does nothing
where the C library is another than glibc.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from typing import Any

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Names of mallopt's options (malloc.h)."""

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
    mallopt = _glibc("mallopt")
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


def give_back() -> None:
    """Return to the system what is free, cycles of Python's objects included."""
    gc.collect()
    trim = _glibc("malloc_trim")
    if trim is not None:
        trim(0)


def _glibc(name: str) -> Any:  # noqa: ANN401 - a C function
    """A function that only glibc has, or None."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
