"""``python -m totalfast.patch program.py``: short name of ``totalfast.compat.program``."""

from __future__ import annotations

import sys

from totalfast.compat.patch_nnunet import patch_nnunet, unpatch_nnunet
from totalfast.compat.patch_totalsegmentator import patch_totalsegmentator, unpatch_totalsegmentator
from totalfast.compat.program import main

__all__ = [
    "main",
    "patch_nnunet",
    "patch_totalsegmentator",
    "unpatch_nnunet",
    "unpatch_totalsegmentator",
]

if __name__ == "__main__":
    main(sys.argv[1:])
