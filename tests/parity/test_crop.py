"""The region of a task, compared with upstream's cropping functions."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import totalfast
from totalfast.errors import LicenseError, OptionError
from totalfast.files.read import read_image
from totalfast.geometry import Grid
from totalfast.labels.crop import box_around, remove_outside

from .matrix import input_file

SPACINGS = st.tuples(*[st.sampled_from([0.1, 0.4, 0.7, 0.8, 1.5, 3.0, 6.5])] * 3)
SHAPES = st.tuples(*[st.integers(1, 40)] * 3)


def empty_image(spacing, shape, axes="RAS"):
    image = nib.Nifti1Image(np.zeros(shape, np.int16), np.diag([*spacing, 1.0]))
    turn = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(axes)
    )
    return image.as_reoriented(turn)


def on_scanner_grid(rough, image):
    """Return to the scanner grid as upstream does: resample the mask with order 0, undo RAS+."""
    from totalsegmentator.alignment import undo_canonical
    from totalsegmentator.resampling import resample_img

    canonical = nib.as_closest_canonical(image)
    zoom = np.asarray(canonical.shape) / np.asarray(rough.T.shape)
    native = resample_img(rough.T.astype(np.uint8), zoom=zoom, order=0, nr_cpus=1)
    assert native.shape == canonical.shape
    return undo_canonical(nib.Nifti1Image(native.astype(np.uint8), canonical.affine), image)


@settings(max_examples=60, deadline=None)
@given(
    spacing=SPACINGS,
    shape=SHAPES,
    rough_shape=st.tuples(*[st.integers(1, 25)] * 3),
    axes=st.sampled_from(["RAS", "LPS", "PIR", "SLA"]),
    seed=st.integers(0, 2**31),
)
def test_box_equals_the_box_of_upstreams_mask_on_the_scanner_grid(
    spacing, shape, rough_shape, axes, seed
):
    from totalsegmentator.cropping import crop_to_mask

    image = empty_image(spacing, shape, axes)
    random = np.random.default_rng(seed)
    rough = (random.random(rough_shape) < random.choice([0.002, 0.05, 0.5])).astype(np.uint8) * 7
    rough[random.random(rough_shape) < 0.3] = 3
    native = on_scanner_grid(rough, image)
    mask = nib.Nifti1Image((np.asarray(native.dataobj) == 7).astype(np.uint8), image.affine)
    grid = Grid(shape=image.shape, affine=image.affine)
    box = box_around(rough, {7}, scanner=grid, margin_mm=(20, 20, 20))
    if not np.asarray(mask.dataobj).any():
        assert box is None
        return
    cropped, bounds = crop_to_mask(image, mask, addon=[20, 20, 20], dtype=np.int32)
    assert [[part.start, part.stop] for part in box] == bounds
    assert np.array_equal(grid.cropped(box).affine, cropped.affine)


@pytest.mark.parametrize(
    ("distance_mm", "spacing"),
    # 10 mm are 15 voxels of (0.5, 0.5, 1.0) in float32 and 14.99999955 in float64.
    [(10, (2.0, 1.5, 3.0)), (3, (2.0, 1.5, 3.0)), (0.5, (2.0, 1.5, 3.0)), (10, (0.5, 0.5, 1.0))],
)
@pytest.mark.parametrize("axes", ["RAS", "PIR"])
def test_remove_outside_equals_upstreams(distance_mm, spacing, axes):
    from totalsegmentator.postprocessing import remove_outside_of_mask

    image = empty_image(spacing, (40, 36, 28), axes)
    rough = np.zeros((14, 18, 20), np.uint8)
    rough[4:7, 6:9, 5:8] = 2
    rough[9:11, 11:14, 12:15] = 4
    native = np.asarray(on_scanner_grid(rough, image).dataobj)
    grid = Grid(shape=image.shape, affine=image.affine)
    box = box_around(rough, {2, 4}, scanner=grid, margin_mm=(6, 6, 6))
    labels = np.zeros(image.shape, np.uint8, order="F")
    labels[box] = np.random.default_rng(0).integers(0, 5, labels[box].shape)
    steps = int(distance_mm / np.mean(image.header.get_zooms()))
    expected = remove_outside_of_mask(labels.copy(), np.isin(native, (2, 4)), addon=steps)
    remove_outside(
        labels,
        box,
        rough,
        {2, 4},
        scanner=grid,
        zooms_mm=image.header.get_zooms(),
        distance_mm=distance_mm,
        threads=2,
    )
    assert np.array_equal(labels, expected)
    assert labels.any()


def test_cropped_scans_are_truncated_to_whole_numbers_like_upstreams():
    from totalsegmentator.cropping import crop_to_bbox_nifti

    values = np.random.default_rng(0).normal(0, 300, (9, 8, 7)).astype(np.float32)
    values[4, 4, 4] = np.nan
    scan = nib.Nifti1Image(values, np.diag([1.0, 2.0, 3.0, 1.0]))
    box = (slice(1, 8), slice(2, 7), slice(0, 6))
    with np.errstate(invalid="ignore"):
        expected = crop_to_bbox_nifti(scan, [[1, 8], [2, 7], [0, 6]], dtype=np.int32)
    part = read_image(scan).cropped(box)
    assert np.array_equal(part.scale(part.stored), np.asarray(expected.dataobj))
    assert np.array_equal(part.grid.affine, expected.affine)


def test_missing_region_gives_empty_masks_and_upstreams_message(
    standin_home, tmp_path, monkeypatch, caplog
):
    monkeypatch.setenv("TOTALSEG_HOME_DIR", str(standin_home))
    # Stand-ins find lungs even in air, so the missing box is simulated.
    monkeypatch.setattr("totalfast.run.region.box_around", lambda *_, **__: None)
    air = nib.Nifti1Image(np.full((30, 30, 20), -1000, np.int16), np.diag([3.0, 3, 3, 1]))
    with caplog.at_level("INFO", logger="totalfast"):
        result = totalfast.segment(
            air, tmp_path / "seg", task="lung_vessels_LEGACY", device="cpu", quiet=True
        )
    assert "INFO: Crop is empty. Returning empty segmentation." in caplog.messages
    assert result.shape == air.shape
    assert not np.asarray(result.dataobj).any()
    names = totalfast.upstream.CLASS_MAPS["lung_vessels_LEGACY"].values()
    assert {path.name for path in (tmp_path / "seg").iterdir()} == {f"{n}.nii.gz" for n in names}


@pytest.mark.parametrize("stored", [None, {}, {"license_number": "short"}])
def test_licensed_tasks_use_upstreams_licence_check(stored, tmp_path, monkeypatch):
    monkeypatch.setenv("TOTALSEG_HOME_DIR", str(tmp_path))
    if stored is not None:
        (tmp_path / "config.json").write_text(json.dumps(stored))
    image = nib.Nifti1Image(np.zeros((10, 10, 10), np.int16), np.eye(4))
    with pytest.raises(LicenseError, match="needs a TotalSegmentator licence"):
        totalfast.segment(image, task="heartchambers_highres", device="cpu", quiet=True)


def test_upstream_does_not_pass_the_cpu_to_the_rough_model_of_teeth():
    """Upstream calls the model that finds the region without a device, and fails."""
    from totalsegmentator.python_api import convert_device_to_string, select_device

    assert convert_device_to_string(select_device("cpu")) is None


def test_save_lowres_of_cropping_tasks_is_an_error():
    image = nib.Nifti1Image(np.zeros((10, 10, 10), np.int16), np.eye(4))
    with pytest.raises(OptionError, match="which crops"):
        totalfast.segment(image, task="lung_vessels", fast=True, save_lowres=True)


def test_voxels_far_from_the_rough_structures_are_removed_from_the_result(
    standin_home, scans, monkeypatch
):
    from totalsegmentator.postprocessing import remove_outside_of_mask

    monkeypatch.setenv("TOTALSEG_HOME_DIR", str(standin_home))
    monkeypatch.setattr("totalfast.run.pipeline.check_license", lambda task: None)
    scan = nib.load(input_file("thick", scans))
    settings = {"device": "cpu", "quiet": True}
    result = totalfast.segment(scan, task="heartchambers_highres", **settings)
    monkeypatch.setattr("totalfast.run.pipeline.keep_near", lambda *arguments: None)
    before = np.asarray(totalfast.segment(scan, task="heartchambers_highres", **settings).dataobj)
    rough = np.asarray(totalfast.segment(scan, fast=True, **settings).dataobj)
    names = {name: label for label, name in totalfast.upstream.CLASS_MAPS["total"].items()}
    near = np.isin(rough, [names[name] for name in ("heart", "aorta", "inferior_vena_cava")])
    steps = int(10 / np.mean(scan.header.get_zooms()))
    expected = remove_outside_of_mask(before.copy(), near, addon=steps)
    assert np.array_equal(np.asarray(result.dataobj), expected)
    assert 0 < np.count_nonzero(expected) < np.count_nonzero(before)
