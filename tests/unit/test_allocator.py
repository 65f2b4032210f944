from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from totalfast.allocator import page_out

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


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
def test_a_mapped_file_that_was_read_takes_no_memory_once_it_is_paged_out(tmp_path):
    kind = subprocess.run(
        ["stat", "-fc", "%T", tmp_path], capture_output=True, text=True, check=True
    )
    if kind.stdout.strip() == "tmpfs":
        pytest.skip("files are in memory anyway")
    path = tmp_path / "values"
    np.arange(1 << 20, dtype=np.int64).tofile(path)
    subprocess.run(["sync", path], check=True)
    mapped = np.memmap(path, dtype=np.int64, mode="r")

    def resident() -> int:
        lines = iter(Path("/proc/self/smaps").read_text().splitlines())
        next(line for line in lines if line.endswith(str(path)))
        return int(next(line for line in lines if line.startswith("Rss:")).split()[1])

    total = int(mapped.sum())
    assert resident() > 8000
    page_out([mapped[5:]])
    assert resident() < 100
    assert int(mapped.sum()) == total
