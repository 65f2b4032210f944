"""Skips these tests where there is no CUDA device."""

from __future__ import annotations

import gc

import pytest

from tests.parity.matrix import input_file

from .device import DEVICE


@pytest.fixture(scope="session", autouse=True)
def _device_or_skip():
    import torch

    if DEVICE == "gpu" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture
def thorax(scans):
    """Path of a small synthetic CT."""
    return input_file("oblique", scans)


@pytest.fixture
def device_memory():
    """torch.cuda, with no memory in use and no limit; also afterwards."""
    import torch

    if DEVICE == "cpu":
        pytest.skip("the CPU has no memory of its own")

    def free() -> None:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    free()
    yield torch.cuda
    torch.cuda.set_per_process_memory_fraction(1.0)
    free()
