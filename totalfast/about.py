"""Versions of installed packages, this one first."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata


@functools.cache
def version() -> str:
    """Return the version of totalfast, such as "0.1.0"."""
    return importlib.metadata.version("totalfast")


@functools.cache
def versions(*packages: str) -> dict[str, str]:
    """Return the versions of those of some packages that are installed."""
    found = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
