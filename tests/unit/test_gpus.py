"""Whether a CUDA device is probable: without torch, while it is being imported, and with it."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest

from totalfast.system import gpus
from totalfast.system.gpus import may_have_gpu


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """Path of a driver's file; no torch is imported."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(gpus, "DRIVER_FILES", (str(tmp_path / "a"), str(tmp_path / "b")))
    return tmp_path / "b"


def test_a_driver_means_a_gpu(driver, monkeypatch):
    assert not may_have_gpu("gpu")
    driver.touch()
    assert may_have_gpu("gpu:1")
    assert not may_have_gpu("cpu")
    assert not may_have_gpu("mps")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not may_have_gpu("gpu")


def test_windows_has_the_driver_among_its_own_files(driver, monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("SYSTEMROOT", str(driver.parent))
    assert not may_have_gpu("gpu")
    (driver.parent / "System32").mkdir()
    (driver.parent / "System32/nvcuda.dll").touch()
    assert may_have_gpu("gpu")


@pytest.mark.parametrize("answer", [True, False])
def test_torch_knows_once_it_is_imported(driver, monkeypatch, answer):
    torch = ModuleType("torch")
    torch.__spec__ = SimpleNamespace(_initializing=True)
    torch.cuda = SimpleNamespace(is_available=lambda: answer)
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert not may_have_gpu("gpu")  # no file of a driver
    torch.__spec__._initializing = False
    assert may_have_gpu("gpu") is answer
