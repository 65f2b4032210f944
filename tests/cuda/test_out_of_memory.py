"""Too little memory on the device: sums of logits move to the host, and then the run fails."""

from __future__ import annotations

import gc
import logging

import nibabel as nib
import numpy as np
import pytest

import totalfast
from tests.parity.matrix import phantom
from totalfast import errors
from totalfast.run import device_plan

from .device import DEVICE

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("standins_are_used")]

REPEATS_XYZ = (3, 3, 1)
"""The sums of logits of a wide scan are larger than everything else that lies on the device."""

SHARES = (0.9, 0.75, 0.6, 0.45, 0.3, 0.2, 0.1, 0.05, 0.02)
"""Of the memory that the run takes without a limit."""

PLENTY = 1e15

DIFFERENT_ALGORITHM = 1e-4
"""Share of the foreground that may differ: cuDNN takes another algorithm if memory is short."""


@pytest.fixture(scope="module")
def wide_scan(tmp_path_factory):
    """Path of a scan with several tiles along x and y."""
    image = phantom((1.5, 1.5, 1.5))
    path = tmp_path_factory.mktemp("wide") / "wide.nii.gz"
    nib.save(nib.Nifti1Image(np.tile(np.asarray(image.dataobj), REPEATS_XYZ), image.affine), path)
    return path


def segment(scan, target) -> np.ndarray:
    """Labels of one run of the 3 mm model, which has the most classes."""
    with totalfast.Session(device=DEVICE) as session:
        image = session.segment(scan, target, ml=True, fast=True, quiet=True)
        return np.asarray(image.dataobj)


WAYS = ("everything on the GPU", "tile by tile", "summed up on the CPU", "error")
"""Outcomes of a run, each with less on the device than the one before; texts of the log."""


def way_of(caplog) -> str:
    """Which of ``WAYS`` the run took at last."""
    messages = [record.getMessage() for record in caplog.records]
    ways = [way for text in messages for way in WAYS[:-1] if way in text]
    return max(ways, key=WAYS.index, default=WAYS[0])


@pytest.mark.parametrize("plan_knows", [True, False], ids=["planned", "ran out"])
def test_less_memory_leads_to_the_host_and_then_to_an_error(
    plan_knows, wide_scan, device_memory, tmp_path, caplog, monkeypatch
):
    if not plan_knows:
        monkeypatch.setattr(device_plan, "free_device_bytes", lambda _: PLENTY)
    caplog.set_level(logging.INFO, logger="totalfast")
    expected = segment(wide_scan, tmp_path / "all.nii.gz")
    assert way_of(caplog) == WAYS[0]
    needed = device_memory.max_memory_reserved()
    total = device_memory.get_device_properties(0).total_memory
    outcomes = []
    for share in SHARES:
        caplog.clear()
        gc.collect()
        device_memory.empty_cache()
        device_memory.set_per_process_memory_fraction(share * needed / total)
        target = tmp_path / f"{share}.nii.gz"
        try:
            labels = segment(wide_scan, target)
        except errors.DeviceMemoryError:
            outcomes.append(WAYS[-1])
            assert not target.exists()
            continue
        differing = np.count_nonzero(labels != expected)
        assert differing <= DIFFERENT_ALGORITHM * np.count_nonzero(expected), share
        assert target.exists()
        outcomes.append(way_of(caplog))
        warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
        ran_out = any("the GPU's memory is too small" in text for text in warnings)
        assert plan_knows or ran_out is (outcomes[-1] != WAYS[0]), warnings
    assert WAYS[2] in outcomes, outcomes
    assert outcomes[-1] == WAYS[-1], outcomes
    assert outcomes == sorted(outcomes, key=WAYS.index), outcomes


def test_call_after_an_error_of_memory_has_the_whole_device(wide_scan, device_memory, tmp_path):
    expected = segment(wide_scan, None)
    total = device_memory.get_device_properties(0).total_memory
    device_memory.empty_cache()
    device_memory.set_per_process_memory_fraction(2**21 / total)
    with pytest.raises(errors.DeviceMemoryError, match="memory"):
        segment(wide_scan, tmp_path / "seg.nii.gz")
    device_memory.set_per_process_memory_fraction(1.0)
    labels = segment(wide_scan, None)
    differing = np.count_nonzero(labels != expected)
    assert differing <= DIFFERENT_ALGORITHM * np.count_nonzero(expected)
