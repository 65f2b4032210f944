"""Whether a CUDA device is probable: without torch, while it is being imported, and with it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from totalfast.system import gpus
from totalfast.system.gpus import may_have_gpu


@pytest.fixture
def system(monkeypatch):
    """What the module sees of Python; the real torch must stay imported."""
    system = SimpleNamespace(modules={}, platform="linux")
    monkeypatch.setattr(gpus, "sys", system)
    return system


@pytest.fixture
def driver(system, tmp_path, monkeypatch):
    """Path of a driver's file; no torch is imported."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
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


def test_windows_has_the_driver_among_its_own_files(driver, system, monkeypatch):
    system.platform = "win32"
    monkeypatch.setenv("SYSTEMROOT", str(driver.parent))
    assert not may_have_gpu("gpu")
    (driver.parent / "System32").mkdir()
    (driver.parent / "System32/nvcuda.dll").touch()
    assert may_have_gpu("gpu")


@pytest.mark.parametrize("answer", [True, False])
def test_torch_knows_once_it_is_imported(driver, system, answer):
    torch = SimpleNamespace(
        __spec__=SimpleNamespace(_initializing=True),
        cuda=SimpleNamespace(is_available=lambda: answer),
    )
    system.modules["torch"] = torch
    assert not may_have_gpu("gpu")  # no file of a driver
    torch.__spec__._initializing = False
    assert may_have_gpu("gpu") is answer
