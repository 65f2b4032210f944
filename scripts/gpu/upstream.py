"""TotalSegmentator's command, without cucim unless --cucim is the first word.

    python scripts/gpu/upstream.py [--cucim] -i SCAN -o TARGET ...

Where cupy and cucim are installed, upstream resamples by another rule than on a CPU, and its labels
differ from its own on a CPU.
"""

import runpy
import sys
from pathlib import Path

# The modules of this folder must not hide others of the same name.
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != Path(__file__).parent]

from totalsegmentator import resampling  # noqa: E402

if "--cucim" in sys.argv[1:2]:
    del sys.argv[1]
else:
    resampling.cucim_available = False

if __name__ == "__main__":
    runpy.run_module("totalsegmentator.bin.TotalSegmentator", run_name="__main__")
