from __future__ import annotations

import ctypes
import subprocess
import sys

import numpy as np
import pytest

from tests.mapped_files import resident_kb
from totalfast.system.process_memory import release_mapped_files

COUNTED = """
import resource, sys
from totalfast.system.process_memory import prepare_process

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
def test_a_prepared_process_reuses_freed_memory():
    def count(how: str) -> int:
        words = [sys.executable, "-c", COUNTED, how]
        return int(subprocess.run(words, capture_output=True, text=True, check=True).stdout)

    assert count("prepared") < 100 < count("unprepared")


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
def test_mapped_files_leave_resident_memory_and_stay_valid(tmp_path):
    inside, outside = tmp_path / "inside", tmp_path / "inside too"
    mapped = []
    for folder in (inside, outside):
        folder.mkdir()
        np.arange(1 << 20, dtype=np.int64).tofile(folder / "values")
        mapped.append(np.memmap(folder / "values", dtype=np.int64, mode="r"))
    changed = np.memmap(inside / "values", dtype=np.int64, mode="c")
    changed += 1
    total = int(mapped[0].sum())
    assert int(mapped[1].sum()) == total
    assert min(resident_kb(inside), resident_kb(outside)) > 8000
    release_mapped_files(inside)
    assert resident_kb(inside) == 0
    assert resident_kb(outside) > 8000
    assert int(mapped[0].sum()) == total
    assert int(changed.sum()) == total + len(changed)
