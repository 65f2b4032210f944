"""``python -m totalfast``."""

from __future__ import annotations

import sys

from totalfast.cli import main

if __name__ == "__main__":
    sys.exit(main())
