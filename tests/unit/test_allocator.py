from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

COUNTED = """
import resource, sys
from totalfast.allocator import prepare_process

if sys.argv[1] == "prepared":
    prepare_process()


def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


bytearray(16 << 20)
before = faults()
bytearray(16 << 20)
print(faults() - before)
"""


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc"
)
def test_a_command_uses_freed_memory_again_from_the_start():
    def count(how: str) -> int:
        words = [sys.executable, "-c", COUNTED, how]
        return int(subprocess.run(words, capture_output=True, text=True, check=True).stdout)

    assert count("prepared") < 100 < count("as it is")
