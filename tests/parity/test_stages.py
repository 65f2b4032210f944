"""Single stages against the functions of upstream that they stand for, called in this process."""

from __future__ import annotations

import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest

from totalfast.engine.normalise import resample_image
from totalfast.export import nearest_to_scanner_grid
from totalfast.export.legacy import smooth_to_scanner_grid
from totalfast.files.read import read_image
from totalfast.labels.clean import clean_labels, skin_mask
from totalfast.resampling.model_grid import to_model_grid

SHAPES = [
    ((60, 50, 40), (0.7, 0.8, 5.0), 1.5),
    ((61, 40, 33), (1.5, 1.5, 1.5), 3.0),
    ((20, 150, 30), (0.5, 0.4, 1.0), 3.0),
    ((30, 30, 1), (1.0, 1.0, 3.0), 1.5),
    ((24, 21, 230), (0.9, 0.9, 1.1), 1.5),
    ((20, 20, 20), (1.5, 1.5, 1.5), 1.5),
]


def oblique_scan(shape, spacing, dtype=np.int16):
    values = np.random.default_rng(0).normal(0, 300, shape).astype(dtype)
    affine = np.diag([-spacing[0], spacing[1], spacing[2], 1.0])
    turn = np.eye(3)
    turn[:2, :2] = [[np.cos(0.1), -np.sin(0.1)], [np.sin(0.1), np.cos(0.1)]]
    affine[:3, :3] = turn @ affine[:3, :3]
    affine[:3, 3] = [13.2, -7.1, 100.0]
    return nib.Nifti1Image(values, affine[:, [1, 0, 2, 3]])


@pytest.mark.parametrize("order", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize(("shape", "spacing", "target"), SHAPES)
def test_resampling_equals_change_spacing_bit_for_bit(shape, spacing, target, order, tmp_path):
    from totalsegmentator.resampling import change_spacing

    scan = oblique_scan(shape, spacing)
    canonical = nib.as_closest_canonical(nib.Nifti1Image(scan.get_fdata(), scan.affine))
    expected = change_spacing(canonical, [target] * 3, order=order, dtype=np.int32)
    nib.save(expected, tmp_path / "model.nii")
    expected = nib.load(tmp_path / "model.nii")
    actual = to_model_grid(read_image(scan), spacing_mm=[target] * 3, order=order, threads=2)
    np.testing.assert_array_equal(actual.voxels, expected.get_fdata(dtype=np.float32).T)
    np.testing.assert_array_equal(actual.grid.stored().affine, expected.affine)
    assert tuple(actual.grid.spacing_mm) == expected.header.get_zooms()


@pytest.mark.parametrize(
    ("shape", "target", "spacing", "new_spacing", "separate"),
    [
        ((40, 50, 30), (20, 70, 31), (2.0, 1.0, 1.0), (2.0, 0.7, 1.0), None),
        ((230, 12, 9), (115, 6, 20), (1.0, 1.0, 1.0), (2.0, 2.0, 0.5), None),
        ((20, 50, 30), (35, 70, 31), (8.0, 1.0, 1.0), (4.0, 0.7, 1.0), 0),
        ((40, 20, 30), (20, 30, 71), (1.0, 5.0, 1.0), (2.0, 3.3, 0.4), 1),
        ((40, 50, 30), (20, 30, 71), (1.0, 1.0, 5.0), (2.0, 2.0, 2.1), 2),
        ((1, 20, 30), (4, 30, 71), (5.0, 1.0, 1.0), (1.2, 0.7, 0.4), 0),
    ],
)
def test_resampling_of_the_networks_input_equals_nnunets(
    shape, target, spacing, new_spacing, separate
):
    from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape

    image = np.random.default_rng(3).normal(0, 2, (2, *shape)).astype(np.float32)
    image[0, : shape[0] // 2] = -1.5  # flat, where rounding would be seen first
    expected = resample_data_or_seg_to_shape(
        image, target, spacing, new_spacing, order=3, order_z=0, force_separate_z=None
    )
    np.testing.assert_array_equal(resample_image(image, target, separate), expected)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_resampling_casts_nan_and_infinity_as_upstream_does(tmp_path):
    from totalsegmentator.resampling import change_spacing

    scan = oblique_scan((20, 21, 22), (1.0, 1.0, 1.0), np.float32)
    values = np.asarray(scan.dataobj)
    values[3, 4, 5], values[10, 11, 12], values[0, 0, 0] = np.nan, np.inf, 3e38
    canonical = nib.as_closest_canonical(nib.Nifti1Image(scan.get_fdata(), scan.affine))
    expected = np.asarray(change_spacing(canonical, [1.5] * 3, order=1, dtype=np.int32).dataobj)
    actual = to_model_grid(read_image(scan), spacing_mm=[1.5] * 3, order=1, threads=1)
    np.testing.assert_array_equal(actual.voxels, expected.T.astype(np.float32))


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize(("shape", "spacing", "target"), SHAPES)
def test_restoring_equals_change_spacing_and_undo_canonical(shape, spacing, target, smooth):
    from totalsegmentator.alignment import undo_canonical
    from totalsegmentator.resampling import change_spacing

    scan = oblique_scan(shape, spacing)
    canonical = nib.as_closest_canonical(scan)
    model = to_model_grid(read_image(scan), spacing_mm=[target] * 3, order=0, threads=1)
    labels = np.random.default_rng(1).integers(0, 9, model.voxels.shape).astype(np.uint8)
    restored = change_spacing(
        nib.Nifti1Image(labels.T, model.grid.affine),
        [target] * 3,
        canonical.shape,
        order=1 if smooth else 0,
        crop_resample=smooth,
        dtype=np.uint8,
        force_affine=canonical.affine,
    )
    expected = np.asarray(undo_canonical(restored, scan).dataobj)
    restore = smooth_to_scanner_grid if smooth else nearest_to_scanner_grid
    actual = restore(labels, scanner=read_image(scan).grid, threads=2)
    np.testing.assert_array_equal(actual, expected)
    assert actual.flags.f_contiguous


def test_body_clean_up_equals_upstreams():
    from totalsegmentator.map_to_binary import class_map
    from totalsegmentator.postprocessing import (
        keep_largest_blob_multilabel,
        remove_small_blobs_multilabel,
    )

    rough = np.random.default_rng(2).random((40, 41, 42))
    labels = np.where(rough > 0.7, 1, np.where(rough < 0.28, 2, 0)).astype(np.uint8)
    voxel_mm3 = 3.375
    expected = keep_largest_blob_multilabel(
        labels.copy(), class_map["body"], ["body_trunc"], quiet=True
    )
    expected = remove_small_blobs_multilabel(
        expected,
        class_map["body"],
        ["body_extremities"],
        interval=[50000 / voxel_mm3, 1e10],
        quiet=True,
    )
    actual = clean_labels(labels, task="body", classes=class_map["body"], voxel_mm3=voxel_mm3)
    np.testing.assert_array_equal(actual, expected)
    assert not np.array_equal(actual, labels)


def test_skin_in_slabs_equals_upstreams_whole_volume():
    from totalsegmentator.postprocessing import extract_skin

    random = np.random.default_rng(3)
    shape = (34, 30, 150)
    x, y, z = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
    body = (x - 16) ** 2 / 150 + (y - 14) ** 2 / 120 < 1 - 0.3 * np.cos(z / 9.0)
    body &= random.random(shape) > 0.02
    values = random.normal(-150, 120, shape).astype(np.int16)
    scan = nib.Nifti1Image(values, np.eye(4))
    expected = extract_skin(scan, nib.Nifti1Image(body.astype(np.uint8), np.eye(4)))
    actual = skin_mask(read_image(scan), np.asfortranarray(body))
    np.testing.assert_array_equal(actual, np.asarray(expected.dataobj))
    assert 0 < actual.sum() < body.sum()


def test_importing_totalfast_never_imports_the_module_that_patches_nnunet():
    code = (
        "import sys, totalfast.cli.main, totalfast.run.pipeline, totalfast.nnunet.predictor; "
        "sys.exit('totalsegmentator.nnunet' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
