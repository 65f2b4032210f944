"""Main rows of the parity matrix on the device: totalfast, and upstream twice.

cuDNN's choice of algorithms is not fixed, so upstream's labels differ between two runs. totalfast
may differ from upstream as much.
"""

from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor

import nibabel as nib
import numpy as np
import pytest

from tests.parity.matrix import ONE_WORKER, Case, compare_folders, input_file

from .device import run_command

pytestmark = pytest.mark.cuda

CASES = [
    Case("oblique", ("--fast",)),
    Case("iso1.5", ("-ml",)),
    Case("oblique", ("-rs", "liver", "vertebrae_T12", "-ml")),
    Case("lps", ("-ta", "lung_vessels_LEGACY", "-ml")),  # crops to a region
    Case("oblique", ("-ta", "total_mr", "-ml")),
]

SHARE = 1e-4
"""Share of the foreground that may differ also if upstream's two runs do not."""

TIMES = 2
"""Differing voxels of totalfast and upstream, at most, as a multiple of upstream's own."""

RUNS = {"upstream": "upstream", "again": "upstream", "totalfast": "totalfast"}
"""Name of each run, to its program."""


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_command_differs_from_upstream_no_more_than_upstream_itself(
    case, scans, standin_home, tmp_path
):
    scan = input_file(case.scan, scans)
    with tempfile.TemporaryDirectory(prefix="u") as temporary, ThreadPoolExecutor() as pool:
        futures = []
        for name, program in RUNS.items():
            folder = tmp_path / name
            folder.mkdir()
            target, flags = folder / case.target, case.flags + ONE_WORKER
            futures.append(
                pool.submit(
                    run_command,
                    program,
                    scan,
                    target,
                    flags,
                    home=standin_home,
                    temporary=temporary,
                )
            )
        for future in futures:
            future.result()
    upstream, again, ours = (tmp_path / name for name in RUNS)
    own = compare_folders(case.name, upstream, again)
    result = compare_folders(case.name, upstream, ours)
    voxels = foreground(upstream)
    print(
        f"\n{case.name}: {result.differing_voxels} voxels differ from upstream, "
        f"{own.differing_voxels} between two runs of upstream; foreground {voxels} voxels"
    )
    assert result.problems == []
    assert result.classes > 0
    assert result.differing_voxels <= max(TIMES * own.differing_voxels, SHARE * voxels)


def foreground(folder) -> int:
    """Voxels that are not background, in all files of a folder."""
    return sum(
        int(np.count_nonzero(np.asanyarray(nib.load(path).dataobj)))
        for path in folder.rglob("*.nii.gz")
    )
