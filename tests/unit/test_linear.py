"""What is compiled ahead is what a run needs."""

import subprocess
import sys

SCRIPT = """
import numpy as np
from totalfast.export import cells, export_labels
from totalfast.export.linear import prepare

prepare()
loops = (cells.summarise, cells.fill_labels)
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
