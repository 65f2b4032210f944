"""``python -m totalfast.patch program.py``: short name of ``totalfast.compat.patch``."""

from __future__ import annotations

import sys

from totalfast.compat.patch import main, patch_totalsegmentator, unpatch_totalsegmentator

__all__ = ["main", "patch_totalsegmentator", "unpatch_totalsegmentator"]

if __name__ == "__main__":
    main(sys.argv[1:])
