"""Upstream's resampling on a GPU, with doubles of cupy and cucim."""

from __future__ import annotations

import sys
import types

import nibabel as nib
import numpy as np
import pytest


@pytest.fixture
def cucim(monkeypatch):
    """cupy and cucim as upstream uses them: numpy, and skimage's function of the same name."""
    from skimage.transform import resize
    from totalsegmentator import resampling

    cupy = types.ModuleType("cupy")
    cupy.asarray, cupy.asnumpy = np.asarray, np.asarray
    modules = {name: types.ModuleType(name) for name in ("cucim", "cucim.skimage")}
    transform = types.ModuleType("cucim.skimage.transform")
    transform.resize = resize
    for name, module in {"cupy": cupy, "cucim.skimage.transform": transform, **modules}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(resampling, "cupy_available", True)
    monkeypatch.setattr(resampling, "cucim_available", True)


@pytest.mark.parametrize("order", [0, 1])
def test_upstream_with_cucim_resamples_by_another_rule_and_totalfast_does_not(cucim, order):
    from totalsegmentator.resampling import change_spacing

    from totalfast.files.read import read_image
    from totalfast.resampling.model_grid import to_model_grid

    random = np.random.default_rng(0)
    voxels = random.integers(-1000, 1000, (20, 21, 22)).astype(np.int16)
    scan = nib.Nifti1Image(voxels, np.diag([1.5, 1.5, 1.5, 1.0]))
    on_cpu, on_gpu = (
        np.asarray(
            change_spacing(scan, [3.0, 3.0, 3.0], order=order, dtype=np.int32, use_gpu=gpu).dataobj
        )
        for gpu in (False, True)
    )
    assert on_gpu.shape == on_cpu.shape
    assert np.mean(on_gpu != on_cpu) > 0.5
    image = read_image(scan)
    ours = to_model_grid(image, spacing_mm=(3.0, 3.0, 3.0), order=order, threads=1).voxels
    np.testing.assert_array_equal(ours.T, on_cpu)
