"""Labels that are exported on the device equal those of the CPU."""

from __future__ import annotations

import numpy as np
import pytest

from .device import torch_device

pytestmark = pytest.mark.cuda

SHAPES = {
    "larger": ((20, 27, 30), (61, 102, 99)),
    "smaller": ((31, 40, 36), (20, 25, 36)),
    "mixed": ((24, 18, 30), (13, 70, 31)),
}


def smooth_logits(classes: int, shape: tuple[int, ...], dtype: str):
    """Logits with regions of several voxels, some ties and a NaN, on the CPU."""
    import torch

    random = torch.Generator().manual_seed(5)
    coarse = torch.randn(1, classes, *(n // 5 for n in shape), generator=random)
    logits = torch.nn.functional.interpolate(coarse, shape, mode="trilinear")[0]
    logits[2, 3:6] = logits[1, 3:6]
    logits[3, 7, 8, 9] = torch.nan
    return logits.to(getattr(torch, dtype)).contiguous()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("sizes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("method", ["nearest", "linear"])
@pytest.mark.parametrize("coordinates", ["corners", "centers"])
def test_labels_of_the_device_equal_those_of_the_cpu(method, coordinates, sizes, dtype):
    from totalfast.export import export_labels

    source, target = sizes
    logits = smooth_logits(24, source, dtype)
    on_device, on_cpu = (
        export_labels(one, target, method=method, coordinates=coordinates)
        for one in (logits.to(torch_device()), logits)
    )
    assert on_device.dtype == on_cpu.dtype
    assert len(np.unique(on_cpu)) > 10
    np.testing.assert_array_equal(on_device, on_cpu)


@pytest.mark.parametrize("method", ["nearest", "linear"])
def test_regions_of_the_device_equal_those_of_the_cpu(method):
    from totalfast.export import export_labels

    source, target = SHAPES["larger"]
    logits = smooth_logits(5, source, "float16")
    on_device, on_cpu = (
        export_labels(one, target, method=method, regions=(3, 1, 4, 2, 5))
        for one in (logits.to(torch_device()), logits)
    )
    assert len(np.unique(on_cpu)) > 3
    np.testing.assert_array_equal(on_device, on_cpu)


def test_a_coarse_axis_is_resampled_separately_as_on_the_cpu():
    from totalfast.export import export_labels

    logits = smooth_logits(24, (12, 40, 36), "float16")
    spacings = {"spacing": (5.0, 1.0, 1.0), "new_spacing": (2.5, 0.5, 0.5)}
    on_device, on_cpu = (
        export_labels(one, (24, 80, 72), method="linear", **spacings)
        for one in (logits.to(torch_device()), logits)
    )
    np.testing.assert_array_equal(on_device, on_cpu)
