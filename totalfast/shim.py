"""``python -m totalfast.shim``: short name of ``totalfast.compat.shim``."""

from __future__ import annotations

from totalfast.cli.main import command
from totalfast.compat.shim import main

__all__ = ["main"]

if __name__ == "__main__":
    command(main)
