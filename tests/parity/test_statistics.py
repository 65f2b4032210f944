"""Statistics and blobs of label maps against the functions of upstream, called in this process."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from totalfast.files.read import read_image
from totalfast.labels.clean import remove_small_blobs
from totalfast.labels.statistics import Wanted, measure
from totalfast.upstream import CLASS_MAPS

SHAPE = (44, 38, 41)


def blobby_labels(seed, smooth=2.0):
    """All labels, each in blobs of a cube of its own, which begin 2 to 4 slices from the sides."""
    x, y, z = (np.arange(size) // 9 for size in SHAPE)
    labels = x[:, None, None] * 25 + y[:, None] * 5 + z + 1
    labels[labels > 117] = 7
    field = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=SHAPE), smooth)
    labels[field < 0] = 0
    for axis, empty in enumerate([(3, 2), (2, 4), (3, 3)]):
        for side, slices in zip((1, -1), empty, strict=True):
            np.moveaxis(labels, axis, 0)[::side][:slices] = 0
    return np.asfortranarray(labels.astype(np.uint8))


def images():
    random = np.random.default_rng(5)
    int16 = random.normal(0, 400, SHAPE).astype(np.int16)
    affine = np.array([[-0.7, 0.1, 0, 3], [0.1, 0.7, 0, 4], [0, 0, 1.3, 5], [0, 0, 0, 1.0]])
    sloped = nib.Nifti1Image(int16, affine)
    sloped.header.set_slope_inter(0.01, -1.0)
    return {
        "int16": nib.Nifti1Image(int16, affine),
        "float": nib.Nifti1Image(random.normal(0, 400, SHAPE).astype(np.float32), affine),
        "slope": sloped,
        "all of int16": nib.Nifti1Image(
            random.normal(0, 9000, SHAPE).clip(-16000, 16000).astype(np.int32), affine
        ),
        "zero to one": nib.Nifti1Image(random.random(SHAPE), affine),
    }


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("aggregation", ["mean", "median"])
@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("kind", ["int16", "float", "slope", "all of int16", "zero to one"])
def test_statistics_equal_upstreams_digit_for_digit(kind, aggregation, normalized, tmp_path):
    from totalsegmentator.statistics import get_basic_statistics

    nib.save(images()[kind], tmp_path / "scan.nii")
    scan = nib.load(tmp_path / "scan.nii")
    image = read_image(scan)
    x, y, z = scan.header.get_zooms()
    counted = 0
    for seed, border, extra in ((0, True, True), (1, False, False), (2, False, True)):
        labels = blobby_labels(seed)
        expected = get_basic_statistics(
            labels.astype(np.float64),
            scan,
            quiet=True,
            exclude_masks_at_border=border,
            metric=aggregation,
            normalized_intensities=normalized,
            extra_metrics=extra,
        )
        wanted = Wanted(
            exclude_at_border=border,
            aggregation=aggregation,
            normalized=normalized,
            extra=extra,
        )
        measured = measure(labels, image, CLASS_MAPS["total"], voxel_mm3=x * y * z, wanted=wanted)
        assert json.dumps(measured, indent=4) == json.dumps(expected, indent=4)
        counted += sum(row["volume"] > 0 for row in measured.values())
    assert counted > 100


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float64])
def test_intensities_beyond_int16_are_the_scans_own(dtype, extra, normalized):
    low = 0 if dtype == np.uint16 else -60000
    values = np.random.default_rng(2).integers(low, 65536, SHAPE).astype(dtype)
    labels, image = blobby_labels(0), read_image(nib.Nifti1Image(values, np.eye(4)))
    wanted = Wanted(exclude_at_border=False, extra=extra, normalized=normalized)
    measured = measure(labels, image, CLASS_MAPS["total"], voxel_mm3=np.float32(1), wanted=wanted)
    if normalized:
        values = (values - np.float64(values.min())) / np.ptp(values.astype(np.float64))
    for label in np.unique(labels[labels > 0]):
        row, inside = measured[CLASS_MAPS["total"][label]], values[labels == label]
        assert row["intensity"] == pytest.approx(inside.astype(np.float64).mean(), abs=1e-5)
        if extra:
            assert row["intensity_std"] == pytest.approx(inside.astype(np.float64).std(), abs=2e-5)
            assert (row["intensity_min"], row["intensity_max"]) == (inside.min(), inside.max())


def test_statistics_of_a_tiny_image_with_only_border_and_empty_classes():
    from totalsegmentator.statistics import get_basic_statistics

    values = np.arange(8, dtype=np.int16).reshape(2, 2, 2, order="F")
    labels = np.asfortranarray(values.astype(np.uint8) % 3)
    scan = nib.Nifti1Image(values, np.eye(4))
    for border in (True, False):
        expected = get_basic_statistics(
            labels, scan, quiet=True, exclude_masks_at_border=border, roi_subset=["spleen", "liver"]
        )
        classes = {1: "spleen", 5: "liver"}
        measured = measure(
            labels,
            read_image(scan),
            classes,
            voxel_mm3=np.float32(1),
            wanted=Wanted(exclude_at_border=border),
        )
        assert json.dumps(measured) == json.dumps(expected)
        assert (measured["spleen"]["volume"] > 0) is not border


@pytest.mark.parametrize("spacing", [(1.5, 1.5, 1.5), (0.7, 0.7, 1.3)])
@pytest.mark.parametrize("mm3", [True, 27.0])
def test_small_blobs_are_those_that_upstream_removes(spacing, mm3):
    from totalsegmentator.postprocessing import remove_small_blobs_multilabel

    labels = blobby_labels(3, smooth=0.5)
    labels[20:, :, :] %= 3
    labels[labels == 7] = 200  # no class of the task
    classes = CLASS_MAPS["total"]
    zooms = nib.Nifti1Image(labels, np.diag([*spacing, 1.0])).header.get_zooms()
    limit = 200 if mm3 is True else mm3
    expected = remove_small_blobs_multilabel(
        labels.copy(),
        classes,
        list(classes.values()),
        interval=[limit / np.prod(zooms), 1e10],
        quiet=True,
    )
    measured = remove_small_blobs(labels, classes, up_to_mm3=limit, voxel_mm3=np.prod(zooms))
    np.testing.assert_array_equal(measured, expected)
    assert 0 < np.count_nonzero(measured != labels) < np.count_nonzero(labels)
