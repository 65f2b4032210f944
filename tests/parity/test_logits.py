"""Probabilities, and logits at the scan's resolution, against upstream's command and nnU-Net."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest

import totalfast

from .matrix import Case, input_file, run_pair

PLAIN_NNUNET = """
import sys
from pathlib import Path
import totalsegmentator.nnunet as upstream

known = upstream.supports_keyword_argument
upstream.supports_keyword_argument = lambda function, name: (
    name != "use_cropped_logits_resampling" and known(function, name)
)
from totalsegmentator.python_api import totalsegmentator

if __name__ == "__main__":
    scan, output, task, fast = sys.argv[1:]
    totalsegmentator(
        Path(scan), Path(output), ml=True, task=task, fast=fast == "True", device="cpu",
        higher_order_resampling=True, nr_thr_saving=1, quiet=True,
    )
"""
"""Upstream's --higher_order_resampling without its approximation, with nnU-Net's own export."""


@pytest.mark.parametrize(
    ("scan", "flags"),
    [("oblique", ("--fast", "-ml")), ("lps", ("-ta", "body", "-ml", "-fs"))],
)
def test_probabilities_equal_upstreams(scan, flags, scans, standin_home, tmp_path):
    saved = {}
    source = input_file(scan, scans)
    environment = {**os.environ, "TOTALSEG_HOME_DIR": str(standin_home)}
    for program in ("totalsegmentator.bin.TotalSegmentator", "totalfast"):
        folder = tmp_path / program.partition(".")[0]
        folder.mkdir()
        # Not for upstream, whose worker processes need a short path for their sockets.
        own = {"TMPDIR": str(folder)} if program == "totalfast" else {}
        subprocess.run(
            [
                *(sys.executable, "-m", program, "-i", source, "-o", folder / "seg.nii.gz"),
                *("-d", "cpu", "-ns", "1", "-sp", folder / "all.npz"),
                *flags,
            ],
            env=environment | own,
            check=True,
            capture_output=True,
        )
        saved[folder.name] = (
            np.load(folder / "all.npz")["probabilities"],
            pickle.loads((folder / "all.pkl").read_bytes()),  # noqa: S301 - just written
            np.asarray(nib.load(folder / "seg.nii.gz").dataobj),
        )
    theirs, ours = saved["totalsegmentator"], saved["totalfast"]
    assert ours[0].dtype == theirs[0].dtype == np.float32
    np.testing.assert_array_equal(ours[0], theirs[0])
    assert repr(ours[1]) == repr(theirs[1])
    np.testing.assert_array_equal(ours[2], theirs[2])
    assert not list((tmp_path / "totalfast").glob("totalfast-*"))


@pytest.mark.parametrize(
    ("scan", "task", "fast"),
    [("thick", "total", True), ("lps", "liver_segments", False)],
)
def test_higher_order_resampling_equals_nnunets_full_export(
    scan, task, fast, scans, standin_home, tmp_path, monkeypatch
):
    source = input_file(scan, scans)
    monkeypatch.setenv("TOTALSEG_HOME_DIR", str(standin_home))
    program = tmp_path / "plain.py"
    program.write_text(PLAIN_NNUNET)
    target = tmp_path / "upstream.nii.gz"
    subprocess.run(
        [sys.executable, program, source, target, task, str(fast)], check=True, capture_output=True
    )
    image = totalfast.segment(
        source, task=task, fast=fast, device="cpu", quiet=True, higher_order_resampling=True
    )
    expected = nib.load(target)
    np.testing.assert_array_equal(np.asarray(image.dataobj), np.asarray(expected.dataobj))
    np.testing.assert_array_equal(image.affine, expected.affine)
    assert np.count_nonzero(np.unique(image.dataobj)) > 1


def test_higher_order_resampling_differs_from_upstreams_approximation_as_listed(
    scans, standin_home, tmp_path
):
    case = Case("oblique", ("--fast", "-ml", "-ho"))
    result = run_pair(case, input_file(case.scan, scans), standin_home, tmp_path)
    share = result.differing_voxels / result.voxels
    print(f"\n{case.name}: {result.differing_voxels} of {result.voxels} voxels differ, {share:.3%}")
    assert 0 < share < 0.01
    assert result.problems == []


@pytest.mark.parametrize("name", ["seg.pkl", "."])
def test_invalid_paths_of_probabilities_are_refused_before_any_work(name, tmp_path):
    scan = nib.Nifti1Image(np.zeros((8, 8, 8), np.int16), np.eye(4))
    with pytest.raises(totalfast.TotalfastError, match="save_probabilities"):
        totalfast.segment(scan, save_probabilities=tmp_path / name, quiet=True)
