"""``export_labels`` against nnU-Net's own resampling of all logits, called, then its argmax."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from totalfast.errors import OptionError
from totalfast.export import choose_method, export_labels, resampling_axes
from totalfast.export.cell_export import CellExport
from totalfast.export.on_device import DeviceExport
from totalfast.geometry import CENTERS

ISOTROPIC = ((1.0, 1.0, 1.0), (1.0, 1.0, 1.0))
COARSE_Z = ((5.0, 1.0, 1.0), (2.0, 0.7, 0.7))
COARSE_X = ((1.0, 1.0, 5.0), (1.0, 1.0, 1.0))
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
LINEAR = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}


def resampler(**options):
    from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape

    return partial(resample_data_or_seg_to_shape, **(LINEAR | options))


def nnunet(logits, shape, spacings, resampling):
    """What nnU-Net does: resample everything, then take the argmax."""
    resampled = resampling(torch.from_numpy(logits), shape, *spacings)
    return np.asarray(torch.as_tensor(resampled).argmax(0))


def structured(random, classes, source, magnitude):
    """Smooth logits: a few classes win in large regions."""
    from scipy import ndimage

    noise = random.normal(size=(classes, *source))
    smooth = ndimage.gaussian_filter(noise, (0, 2, 2, 2))
    return (smooth / np.abs(smooth).max() * magnitude).astype(np.float16)


def one_ulp_apart(random, classes, source, magnitude):
    """Class 0, and the others within one float16 unit of it: rounding decides."""
    first = random.normal(size=(1, *source)) * magnitude
    steps = random.choice([-1, 0, 1], size=(classes, *source))
    return (first + steps * np.abs(first) * 2**-10).astype(np.float16)


def noise(random, classes, source, magnitude):
    return (random.normal(size=(classes, *source)) * magnitude).astype(np.float16)


def with_infinities(random, classes, source, magnitude):
    logits = noise(random, classes, source, magnitude)
    places = random.integers(0, logits.size, 4)
    logits.reshape(-1)[places] = [np.nan, np.inf, -np.inf, 0]
    return logits


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("make", [structured, one_ulp_apart, noise, with_infinities])
@pytest.mark.parametrize("spacings", [ISOTROPIC, COARSE_Z, COARSE_X])
@pytest.mark.parametrize("classes", [1, 2, 25, 300])
def test_linear_equals_nnunet(make, spacings, classes):
    random = np.random.default_rng(classes)
    for source, target in (
        ((6, 7, 8), (17, 15, 20)),
        ((9, 8, 10), (5, 11, 10)),
        ((1, 5, 4), (3,) * 3),
    ):
        for magnitude in (1e-3, 1.0, 30.0):
            logits = make(random, classes, source, magnitude)
            expected = nnunet(logits, target, spacings, resampler())
            labels = export_labels(
                logits,
                target,
                method="linear",
                spacing=spacings[0],
                new_spacing=spacings[1],
            )
            assert labels.dtype == (np.uint8 if classes < 256 else np.uint16)
            np.testing.assert_array_equal(labels, expected)


@pytest.mark.parametrize("make", [structured, one_ulp_apart, noise, with_infinities])
@pytest.mark.parametrize("separate", [None, 0, 2])
@pytest.mark.parametrize("regions", [None, (3, 1, 2, 4, 5)])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("device", DEVICES)
def test_linear_on_a_device_equals_linear_by_cells(make, separate, regions, dtype, device):
    random = np.random.default_rng(0)
    for source, target in (((6, 7, 8), (17, 15, 20)), ((9, 8, 10), (5, 11, 10))):
        logits = torch.from_numpy(make(random, 5, source, 1.0).astype(dtype))
        axes = resampling_axes(source, target, CENTERS, separate)
        by_cells, labels = np.full((2, *target), 9, np.uint8)
        with CellExport(axes, by_cells, rounded_to=dtype, regions=regions, threads=2) as export:
            export.add(0, logits)
        with DeviceExport(axes, labels, rounded_to=dtype, regions=regions) as export:
            for start in range(source[0]):  # as from a window, whose memory is used again
                slab = logits[:, start : start + 1].to(device, copy=True)
                export.add(start, slab)
                slab.zero_()
        np.testing.assert_array_equal(labels, by_cells)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    classes=st.integers(2, 6),
    exponent=st.floats(-3, 1.5),
    quantised=st.booleans(),
)
def test_no_dropped_class_wins(seed, classes, exponent, quantised):
    """The cell rule, on cells whose classes are ties and near ties."""
    random = np.random.default_rng(seed)
    make = one_ulp_apart if quantised else noise
    logits = make(random, classes, (2, 2, 3), 10.0**exponent)
    expected = nnunet(logits, (7, 6, 8), ISOTROPIC, resampler())
    np.testing.assert_array_equal(export_labels(logits, (7, 6, 8), method="linear"), expected)


@pytest.mark.parametrize("spacings", [ISOTROPIC, COARSE_Z])
@pytest.mark.parametrize("method", ["linear", "plans"])
def test_regions_equal_nnunet(spacings, method):
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    names = {"background": 0, "whole": (1, 2, 3), "core": (2, 3), "centre": 3}
    manager = LabelManager(names, (1, 2, 3))
    logits = noise(np.random.default_rng(0), 3, (6, 7, 8), 1e-6)
    resampled = resampler()(torch.from_numpy(logits), (13, 14, 15), *spacings)
    labels = export_labels(
        logits,
        (13, 14, 15),
        method=method,
        spacing=spacings[0],
        new_spacing=spacings[1],
        resampling=resampler(),
        regions=(1, 2, 3),
    )
    np.testing.assert_array_equal(labels, manager.convert_logits_to_segmentation(resampled))


@pytest.mark.parametrize("spacings", [ISOTROPIC, COARSE_Z])
def test_plans_equals_nnunet(spacings):
    from nnunetv2.preprocessing.resampling.no_resampling import no_resampling_hack
    from nnunetv2.preprocessing.resampling.resample_torch import resample_torch_fornnunet

    logits = noise(np.random.default_rng(1), 20, (6, 7, 8), 3.0)
    torch_options = {
        "is_seg": False,
        "force_separate_z": None,
        "memefficient_seg_resampling": False,
    }
    for shape, resampling in (
        ((13, 14, 15), resampler(order=3)),
        ((13, 14, 15), partial(resample_torch_fornnunet, **torch_options)),
        ((6, 7, 8), no_resampling_hack),
    ):
        assert choose_method(resampling, coordinates="centers") == "plans"
        labels = export_labels(
            logits, shape, resampling=resampling, spacing=spacings[0], new_spacing=spacings[1]
        )
        np.testing.assert_array_equal(labels, nnunet(logits, shape, spacings, resampling))


@pytest.mark.parametrize("target", [(5, 14, 9), (2, 3, 20), (6, 7, 8)])
def test_nearest_picks_scipys_voxels(target):
    from scipy import ndimage

    logits = noise(np.random.default_rng(2), 9, (6, 7, 8), 1.0)
    source = logits.argmax(0).astype(np.uint8)
    zoom = [m / n for n, m in zip(source.shape, target, strict=True)]
    for coordinates, grid_mode in (("corners", False), ("centers", True)):
        labels = export_labels(logits, target, method="nearest", coordinates=coordinates)
        expected = ndimage.zoom(source, zoom, order=0, mode="nearest", grid_mode=grid_mode)
        np.testing.assert_array_equal(labels, expected)


@pytest.mark.parametrize("forced", [True, False, None])
@pytest.mark.parametrize("threshold", [1.5, 3])
def test_auto_follows_the_options_of_the_plans(forced, threshold):
    logits = noise(np.random.default_rng(3), 7, (6, 7, 8), 3.0)
    resampling = resampler(force_separate_z=forced, separate_z_anisotropy_threshold=threshold)
    spacings = ((2.0, 1.0, 1.0), (1.0, 0.6, 0.6))
    labels = export_labels(
        logits, (12, 12, 13), resampling=resampling, spacing=spacings[0], new_spacing=spacings[1]
    )
    np.testing.assert_array_equal(labels, nnunet(logits, (12, 12, 13), spacings, resampling))


def test_auto_and_odd_arguments():
    logits = np.zeros((3, 4, 4, 4), np.float16)
    assert choose_method(resampler(), coordinates="centers") == "linear"
    assert choose_method(resampler(), coordinates="corners") == "nearest"
    assert choose_method(resampler(order=3), coordinates="centers") == "plans"
    assert export_labels(logits, (0, 4, 4), method="linear").shape == (0, 4, 4)
    for bad in ({"method": "cubic"}, {"coordinates": "edges"}, {"method": "plans"}):
        with pytest.raises(OptionError):
            export_labels(logits, (8, 8, 8), **bad)
    with pytest.raises(OptionError):
        export_labels(logits[0], (8, 8, 8))
