"""``python -m totalfast``."""

from __future__ import annotations

from totalfast.cli.main import command

if __name__ == "__main__":
    command()
