"""The version of the installed package."""

from __future__ import annotations

import functools
import importlib.metadata


@functools.cache
def version() -> str:
    """Return the version of totalfast, such as "0.1.0"."""
    return importlib.metadata.version("totalfast")
