"""Planned memory, by hand and against a run; free memory, from synthetic cgroup files."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

import totalfast
from totalfast.geometry import Grid
from totalfast.models.model_summary import ModelSummary
from totalfast.options import Options
from totalfast.run.memory_plan import (
    LIBRARY_BYTES,
    MARGIN,
    PROGRAM_BYTES,
    Budget,
    StoredScan,
    plan_memory,
)
from totalfast.system.memory import _cgroup_bytes, _cgroup_limits, free_host_bytes, total_host_bytes

from .cgroup_files import write_cgroups


def grid_of(shape, mm):
    return Grid(shape=shape, affine=np.diag([mm, mm, mm, 1.0]))


NETWORK = ModelSummary(
    patch=(64, 64, 64),
    spacing_mm=(3.0, 3.0, 3.0),
    axes=(0, 1, 2),
    features=8,
    heads=118,
    folds=1,
    weights=1_000_000,
)


def test_a_networks_memory_by_hand():
    small, long = grid_of((64, 50, 64), 3.0), grid_of((80, 70, 200), 3.0)
    assert NETWORK.pads(small)
    assert not NETWORK.pads(long)
    assert NETWORK.image(small) == 4 * 64**3
    assert NETWORK.window(long) == 2 * 119 * 64 * 70 * 80
    assert NETWORK.forward == 6.5 * 4 * 8 * 64**3
    assert NETWORK.summing(long) == NETWORK.forward + NETWORK.window(long)
    assert NETWORK.summing(small) < NETWORK.forward + NETWORK.window(small)
    finer = grid_of((160, 140, 400), 1.5)
    assert NETWORK.window(finer) == NETWORK.window(long)


@pytest.fixture
def task(standin_home, monkeypatch):
    monkeypatch.delenv("TOTALSEG_WEIGHTS_PATH", raising=False)
    monkeypatch.setenv("TOTALSEG_HOME_DIR", str(standin_home))
    return Options(fast=True).resolved_task()


def plan(task, shape, *, on_gpu=False, sums_on_host=False, keeps_models=True, **options):
    scan = StoredScan(shape=shape, itemsize=2, kept=False)
    return plan_memory(
        scan,
        grid_of(shape, 1.0),
        task=task,
        options=Options(fast=True, **options),
        on_gpu=on_gpu,
        sums_on_host=sums_on_host,
        keeps_models=keeps_models,
    )


def test_plans_are_read_in_both_formats(task, tmp_path, monkeypatch):
    part = task.parts[0]
    network = ModelSummary.of(task, part)
    assert (network.patch, network.features, network.heads) == ((72, 72, 64), 8, 118)
    assert network.weights > 100_000
    child = {"inherits_from": "base", "patch_size": [32, 32]}
    base = {
        "patch_size": [8, 8, 8],
        "spacing": [1.0, 1.0],
        "architecture": {"arch_kwargs": {"features_per_stage": [24, 48]}},
    }
    axes = {"transpose_forward": [1, 0, 2], "transpose_backward": [1, 0, 2]}
    plans = axes | {"configurations": {"base": base, "3d_fullres": child}}
    (tmp_path / "plans.json").write_text(json.dumps(plans))
    regions = {"labels": {"background": 0, "a": [1, 2], "b": 2}, "regions_class_order": [1, 2]}
    images = {"channel_names": {"0": "CT"}, "file_ending": ".nii.gz"}
    (tmp_path / "dataset.json").write_text(json.dumps(regions | images))
    monkeypatch.setattr("totalfast.models.model_summary.find_part", lambda *a, **k: tmp_path)
    network = ModelSummary.of(task, part)
    assert (network.patch, network.features, network.heads) == ((32, 32), 24, 2)
    assert network.image(grid_of((50, 40, 30), 1.0)) == 4 * 50 * 40 * 32
    (tmp_path / "plans.json").write_text("{}")
    with pytest.raises(totalfast.WeightsError, match="configurations is missing"):
        ModelSummary.of(task, part)


def test_memory_does_not_grow_with_the_logits_of_a_long_scan(task):
    one, two = (plan(task, (400, 400, slices)).host for slices in (400, 1200))
    stored = 2 * 400 * 400 * 800
    assert 0 < two - one < 2.5 * stored
    assert plan(task, (400, 400, 400), export="linear").host > one


def test_all_kept_models_are_counted_or_the_two_largest(task):
    five = Options().resolved_task()
    weights = [ModelSummary.of(five, part).weights for part in five.parts]
    kept, dropped = (
        plan(five, (100, 100, 100), keeps_models=keeps).host for keeps in (True, False)
    )
    assert kept - dropped == pytest.approx(MARGIN * (sum(weights) - sum(sorted(weights)[-2:])))


def test_a_gpu_needs_less_main_memory_unless_logits_are_summed_up_there(task):
    shape = (500, 500, 500)
    resident, summing = (
        plan(task, shape, on_gpu=True, sums_on_host=on_host).host for on_host in (False, True)
    )
    network = ModelSummary.of(task, task.parts[0])
    sums = network.answer + network.window(grid_of(shape, 1.0).resampled((3.0, 3.0, 3.0)))
    assert 0 < summing - resident <= MARGIN * sums  # the largest stage may be another one
    assert resident < plan(task, shape).host


def test_a_limit_is_an_error_and_too_little_free_memory_a_warning(task, caplog):
    planned = plan(task, (400, 400, 400))
    planned.check(Budget(host=100e9, is_limit=True))
    assert planned.host > PROGRAM_BYTES
    with pytest.raises(totalfast.MemoryLimitError, match=r"max_memory allows 0\.5 GB"):
        planned.check(Budget(host=0.5e9, is_limit=True))
    assert not caplog.records
    planned.check(Budget(host=0.5e9, is_limit=False))
    assert "0.5 GB are free" in caplog.messages[-1]


def test_more_than_all_memory_is_an_error_unless_the_user_allows_it(task):
    planned = plan(task, (400, 400, 400))
    for total, is_limit in ((planned.host, False), (0.51 * planned.host, False), (1.0, True)):
        budget = Budget(host=planned.host, is_limit=is_limit, total=total)
        planned.check(budget)
    machine = Budget(host=1e8, is_limit=False, total=0.4 * planned.host)
    with pytest.raises(totalfast.MemoryLimitError, match="the machine or container has"):
        planned.check(machine)


def test_a_limit_stops_a_run_before_its_scan_is_read(task, tmp_path):
    import nibabel as nib

    nib.save(nib.Nifti1Image(np.zeros((90, 90, 90), np.int16), np.eye(4)), tmp_path / "ct.nii.gz")
    content = (tmp_path / "ct.nii.gz").read_bytes()
    (tmp_path / "ct.nii.gz").write_bytes(content[: len(content) // 2])  # can't be read
    options = {"fast": True, "device": "cpu", "quiet": True}
    with pytest.raises(totalfast.MemoryLimitError, match="--fast"):
        totalfast.segment(tmp_path / "ct.nii.gz", max_memory_gb=0.1, **options)
    with pytest.raises(totalfast.InputError, match="damaged"):
        totalfast.segment(tmp_path / "ct.nii.gz", **options)
    with pytest.raises(totalfast.OptionError, match="max_memory_gb must be above 0"):
        totalfast.segment(tmp_path / "ct.nii.gz", max_memory_gb=0.0, **options)


RUN = """
import nibabel, numpy, totalfast
scan = nibabel.Nifti1Image(numpy.zeros((200, 200, 260), numpy.int16), 2 * numpy.eye(4))
totalfast.segment(scan, fast=True, device="cpu", quiet=True)
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
# getrusage also counts the parent's memory. The system decides how much of a file is mapped.
print(*(1024 * int(status[name].split()[0]) for name in ("VmHWM", "RssFile")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems count other bytes")
def test_a_run_takes_no_more_than_planned(task):
    shape = (200, 200, 260)
    scan = StoredScan(shape=shape, itemsize=2, kept=False)
    plan = plan_memory(scan, grid_of(shape, 2.0), task=task, options=Options(fast=True))
    planned = plan.host - MARGIN * LIBRARY_BYTES
    done = subprocess.run([sys.executable, "-c", RUN], capture_output=True, text=True, check=True)
    peak, of_files = map(int, done.stdout.split()[-2:])
    share = (peak - of_files) / planned
    assert 0.6 < share < 1.15, f"{peak} bytes, {of_files} of files; {planned:.0f} were planned"


@pytest.mark.parametrize(
    ("line", "files", "left"),
    [
        ("0::/a/b", {"a/b/memory.max": "1000", "a/b/memory.current": "300"}, [700]),
        ("0::/a/b", {"a/memory.max": "max", "memory.max": "500", "memory.current": "600"}, [-100]),
        (
            "0::/",
            {
                "memory.max": "1000",
                "memory.current": "800",
                "memory.stat": "anon 5\ninactive_file 300\n",
            },
            [500],
        ),
        (
            "4:cpu,memory:/gone",
            {"memory/memory.limit_in_bytes": "900", "memory/memory.usage_in_bytes": "100"},
            [800],
        ),
        ("3:cpuset:/", {"memory.max": "10"}, []),
    ],
)
def test_free_memory_of_cgroups(tmp_path, line, files, left):
    write_cgroups(tmp_path, line, files)
    assert list(_cgroup_bytes(tmp_path / "cgroup", tmp_path / "sys")) == left
    assert list(_cgroup_bytes(tmp_path / "nothing", tmp_path / "sys")) == []
    assert len(list(_cgroup_limits(tmp_path / "cgroup", tmp_path / "sys"))) == len(left)


def test_free_memory_is_plausible():
    free = free_host_bytes()
    assert 0 < free < 1e15
    assert free <= total_host_bytes() < 1e15
