"""The compiled loops of the linear export: compiled ahead of a run, and half precision."""

import subprocess
import sys

import numba
import numpy as np

from totalfast.export import summaries

SCRIPT = """
import numpy as np
from totalfast.export import cells, export_labels, summaries
from totalfast.export.cell_export import prepare

prepare()
loops = (summaries.summarise, cells.fill_labels)
before = [set(loop.signatures) for loop in loops]
assert all(len(signatures) == 1 for signatures in before), before
logits = np.random.default_rng(0).normal(size=(5, 6, 70, 8)).astype(np.float16)
export_labels(logits, (11, 120, 13), method="linear")
assert [set(loop.signatures) for loop in loops] == before
"""


def test_prepare_compiles_the_loops_for_the_layouts_of_a_run():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_half_precision_number_is_widened():
    @numba.njit(error_model="numpy")
    def load(source, block, bits):
        summaries.load_row(source, 0, len(source), block, bits, 0)

    halves = np.arange(2**16, dtype=np.uint16)
    block = np.empty((1, halves.size), np.float32)
    load(halves, block, block.view(np.int32))
    expected = halves.view(np.float16).astype(np.float32)
    np.testing.assert_array_equal(block[0], expected)
    np.testing.assert_array_equal(np.signbit(block[0]), np.signbit(expected))
