"""Unchanged programs that call TotalSegmentator's Python API use totalfast."""

from __future__ import annotations

import importlib
import inspect
import logging
import os
import subprocess
import sys
import types

import nibabel as nib
import numpy as np
import pytest
import totalsegmentator.python_api as upstream_api

import totalfast


@pytest.fixture
def client(monkeypatch):
    """A module that has imported upstream's function under two names."""
    module = types.ModuleType("client_of_upstream")
    module.totalsegmentator = module.another_name = upstream_api.totalsegmentator
    module.other = 1
    monkeypatch.setitem(sys.modules, module.__name__, module)
    yield module
    totalfast.unpatch_totalsegmentator()


UPSTREAMS_CLIENTS = ("TotalSegmentator", "totalseg_get_phase", "totalseg_get_modality")


def test_patch_reaches_bound_names_and_later_imports_and_unpatch_restores_all(
    client, monkeypatch, tmp_path
):
    monkeypatch.setitem(sys.modules, "xgboost", types.ModuleType("xgboost"))  # imported, not called
    clients = [client, upstream_api]
    clients += [importlib.import_module(f"totalsegmentator.bin.{n}") for n in UPSTREAMS_CLIENTS]
    original = upstream_api.totalsegmentator
    calls = []
    monkeypatch.setattr("totalfast.api.segment", lambda *a, **k: calls.append((a, k)) or "labels")
    before = [dict(vars(module)) for module in clients]
    totalfast.patch_totalsegmentator()
    totalfast.patch_totalsegmentator()
    replacement = upstream_api.totalsegmentator
    assert replacement is not original
    assert inspect.signature(replacement) == inspect.signature(original)
    assert all(module.totalsegmentator is replacement for module in clients)
    assert client.another_name("ct.nii.gz", None, True, fast=True) == "labels"
    assert calls == [(("ct.nii.gz", None, True), {"fast": True})]

    (tmp_path / "imported_later.py").write_text(
        "from totalsegmentator.python_api import totalsegmentator"
    )
    monkeypatch.syspath_prepend(tmp_path)
    later = importlib.import_module("imported_later")
    assert later.totalsegmentator is replacement
    totalfast.unpatch_totalsegmentator()
    totalfast.unpatch_totalsegmentator()
    assert later.totalsegmentator is original
    assert [dict(vars(module)) for module in clients] == before


def test_unsupported_calls_run_on_upstream_and_the_reason_is_logged_once(
    client, monkeypatch, caplog
):
    calls = []

    def upstream(input, output=None, test=0):
        calls.append((input, output, test))
        return "upstream's labels"

    monkeypatch.setattr(upstream_api, "totalsegmentator", upstream)
    totalfast.patch_totalsegmentator()
    for _ in range(2):
        assert upstream_api.totalsegmentator("a.nii.gz", None, test=1) == "upstream's labels"
    assert calls == [("a.nii.gz", None, 1)] * 2
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "TotalSegmentator runs instead of totalfast: test=1" in record.getMessage()
    with pytest.raises(ValueError, match="between 0 and 5"):  # not repeated by upstream
        upstream_api.totalsegmentator("a.nii.gz", resampling_order=7)
    assert len(calls) == 2


PROGRAM = """
import json, sys
from pathlib import Path
from totalsegmentator.python_api import totalsegmentator
import beside
_, scan, folder = sys.argv
image = totalsegmentator(scan, Path(folder) / "seg.nii.gz", True, fastest=True, device="cpu")
print("FOUND", json.dumps([__name__, sys.path[0], sys.argv, type(image).__name__, beside.WORD]))
print("nnU-Net was patched", "totalsegmentator.nnunet" in sys.modules)
sys.exit(7)
"""


@pytest.fixture
def program(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "beside.py").write_text("WORD = 'beside'")
    values = np.random.default_rng(0).normal(0, 300, (40, 36, 30)).astype(np.int16)
    nib.save(nib.Nifti1Image(values, np.diag([-2.0, 2.0, 3.0, 1.0])), tmp_path / "ct.nii.gz")
    return tmp_path


def run(*words, cwd, home):
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=cwd,
        env={**os.environ, "TOTALSEG_HOME_DIR": str(home)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("way", ["script", "module"])
def test_a_whole_program_runs_patched_and_keeps_its_exit_code(way, program, standin_home):
    what = {"script": [program / "program.py"], "module": ["-m", "program"]}[way]
    words = ["-m", "totalfast.patch", *what, "ct.nii.gz", "out"]
    done = run(*words, cwd=program, home=standin_home)
    assert done.returncode == 7, done.stderr
    path = str(program / "program.py")
    expected = f'["__main__", "{program}", ["{path}", "ct.nii.gz", "out"], "Nifti1Image", "beside"]'
    assert f"FOUND {expected}\n" in done.stdout
    assert "nnU-Net was patched False" in done.stdout
    assert [path.name for path in (program / "out").iterdir()] == ["seg.nii.gz"]


def test_patch_without_a_program_exits_with_a_usage_error(tmp_path):
    done = run("-m", "totalfast.patch", cwd=tmp_path, home=tmp_path)
    assert done.returncode == 2
    assert "give a script, a command, or -m and a module" in done.stderr
