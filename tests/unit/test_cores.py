"""Numbers of threads: affinity, quotas of cgroups, and the user's limit."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from totalfast.engine import torch_settings
from totalfast.engine.sliding_window import predict_logits
from totalfast.engine.tiles import Tiling
from totalfast.models.loading import load_model
from totalfast.system import cores
from totalfast.system.cores import NNUNET_THREADS, _cgroup_cores, network_threads, usable_cores

from .cgroup_files import write_cgroups


@pytest.fixture
def allow(monkeypatch):
    """Set the three limits: affinity, quotas of cgroups, OMP_NUM_THREADS."""

    def set_limits(affinity, quotas=(), variable=None):
        monkeypatch.setattr(cores, "_affinity", lambda: affinity)
        monkeypatch.setattr(cores, "_cgroup_cores", lambda *_: iter(quotas))
        monkeypatch.delenv(cores.THREADS_VARIABLE, raising=False)
        if variable is not None:
            monkeypatch.setenv(cores.THREADS_VARIABLE, variable)

    return set_limits


@pytest.mark.parametrize(
    ("affinity", "quotas", "variable", "usable"),
    [
        (128, [], None, 128),
        (128, [2.0], None, 2),  # docker --cpus=2
        (128, [64.0, 3.5, 8.0], None, 3),  # a cgroup in a cgroup
        (128, [0.25], None, 1),
        (1, [8.0], None, 1),  # SLURM gave one core
        (128, [], "4", 4),
        (128, [2.0], "4", 2),
        (4, [], "16", 4),
        (16, [], "4,2", 4),  # nested parallel regions
        (16, [], " 3 ", 3),
        (16, [], "0", 16),
        (16, [], "-2", 16),
        (16, [], "many", 16),
        (16, [], "", 16),
    ],
)
def test_the_smallest_limit_counts(allow, affinity, quotas, variable, usable):
    allow(affinity, quotas, variable)
    assert usable_cores() == usable
    assert network_threads() == min(usable, NNUNET_THREADS)


@pytest.mark.parametrize(
    ("line", "files", "quotas"),
    [
        ("0::/a/b", {"a/b/cpu.max": "200000 100000"}, [2.0]),
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "50000 100000"}, [0.5]),
        ("0::/host/only", {"cpu.max": "150000 100000"}, [1.5]),
        ("0::/a/b", {"a/b/cpu.max": "300000 100000", "a/cpu.max": "100000 50000"}, [3.0, 2.0]),
        (
            "4:cpu,cpuacct:/job",
            {"cpu/job/cpu.cfs_quota_us": "400000", "cpu/job/cpu.cfs_period_us": "100000"},
            [4.0],
        ),
        (
            "4:cpuacct,cpu:/job",
            {"cpu/job/cpu.cfs_quota_us": "-1", "cpu/job/cpu.cfs_period_us": "100000"},
            [],
        ),
        ("4:cpu:/job", {"cpu/job/cpu.cfs_quota_us": "100000"}, []),
        ("4:cpuacct:/job", {"cpu.max": "100000 100000"}, []),
        ("0::/", {"cpu.max": "strange"}, []),
        ("0::/", {"cpu.max": ""}, []),
        ("0::/", {}, []),
    ],
)
def test_quotas_of_cgroups(tmp_path, line, files, quotas):
    write_cgroups(tmp_path, line, files)
    assert list(_cgroup_cores(tmp_path / "cgroup", tmp_path / "sys")) == quotas
    assert list(_cgroup_cores(tmp_path / "nothing", tmp_path / "sys")) == []


@pytest.mark.parametrize(
    ("affinity", "quotas", "variable", "expected"),
    [(16, [2.0], None, "2"), (16, [2.0], "1", "1"), (2, [4.0], None, None), (16, [], None, None)],
)
def test_libraries_are_limited_only_by_a_quota(allow, affinity, quotas, variable, expected):
    allow(affinity, quotas, variable)
    cores.limit_libraries()
    assert os.environ.get(cores.THREADS_VARIABLE) == expected


COUNT = """
import os, sys
from totalfast.system.cores import usable_cores
import torch
from totalfast.engine.torch_settings import inference_settings
before = len(os.listdir("/proc/self/task"))
with inference_settings(torch.device("cpu")):
    torch.nn.functional.conv3d(torch.ones(1, 16, 40, 40, 40), torch.ones(16, 16, 3, 3, 3))
    torch.ones(10_000_000).exp()
print(usable_cores(), torch.get_num_threads(), len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.skipif(shutil.which("taskset") is None, reason="needs taskset")
def test_a_process_with_one_core_starts_no_further_thread():
    first = str(min(os.sched_getaffinity(0)))
    plain = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    for wrap, environment in (
        (["taskset", "-c", first], plain),
        ([], plain | {"OMP_NUM_THREADS": "1"}),
    ):
        done = subprocess.run(
            [*wrap, sys.executable, "-c", COUNT],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.split() == ["1", "1", "0"]


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_logits_are_nnunets_for_the_same_number_of_threads(standin_home, monkeypatch, threads):
    folder = next((standin_home / "nnunet/results").glob("Dataset297*/*"))
    image = torch.randn((1, 40, 70, 30), generator=torch.Generator().manual_seed(0))
    theirs = nnUNetPredictor(use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False)
    theirs.initialize_from_trained_model_folder(str(folder), (0,))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        expected = theirs.predict_logits_from_preprocessed_data(image)
    finally:
        torch.set_num_threads(before)
    monkeypatch.setattr(torch_settings, "network_threads", lambda: threads)
    model = load_model(folder, folds=(0,), device=torch.device("cpu"))
    assert torch.equal(predict_logits(model, image, Tiling(step=0.5)), expected)


def test_logits_do_not_depend_on_the_number_of_threads_above_one(standin_home, monkeypatch):
    folder = next((standin_home / "nnunet/results").glob("Dataset297*/*"))
    image = torch.randn((1, 40, 70, 30), generator=torch.Generator().manual_seed(0))
    model = load_model(folder, folds=(0,), device=torch.device("cpu"))
    results = []
    for threads in (2, 3, 8):
        monkeypatch.setattr(torch_settings, "network_threads", lambda number=threads: number)
        results.append(predict_logits(model, image, Tiling(step=0.5)))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
