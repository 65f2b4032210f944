from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest

from totalfast.files.read import read_image
from totalfast.run.input_warnings import warn_of_unusual

ORDINARY = np.random.default_rng(0).normal(0, 300, (8, 9, 10))


def warnings_of(image, caplog, *, spacing_mm=(1.5, 1.5, 1.5), crops=False, modality="MR"):
    warn_of_unusual(read_image(image), spacing_mm=spacing_mm, crops=crops, modality=modality)
    return [record.getMessage() for record in caplog.records]


def rotated(degrees):
    cos, sin = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    affine = np.eye(4)
    affine[1:3, 1:3] = [[cos, -sin], [sin, cos]]
    return nib.Nifti1Image(ORDINARY.astype(np.float32), affine)


@pytest.mark.parametrize(
    "image",
    [
        nib.Nifti1Image(ORDINARY.astype(np.float32), np.diag([1.0, 1.0, 5.0, 1.0])),
        nib.Nifti1Image(ORDINARY.astype(np.int16), np.diag([-1.0, 1.0, 3.0, 1.0])),
        nib.Nifti1Image((ORDINARY > 0).astype(np.uint8), np.eye(4)),  # nothing to truncate
        nib.Nifti1Image((ORDINARY > 0).astype(np.float32), np.eye(4)),
        nib.Nifti1Image(np.full((4, 4, 4), np.nan, np.float32), np.eye(4)),
        rotated(20.0),
    ],
)
def test_ordinary_scans_give_no_warning(image, caplog):
    assert warnings_of(image, caplog) == []


def test_intensities_that_truncation_would_lose_give_a_warning(caplog, tmp_path):
    small = ((ORDINARY - ORDINARY.min()) / np.ptp(ORDINARY)).astype(np.float32)
    image = nib.Nifti1Image(small, np.eye(4))
    for no_resampling in (None, (1.0, 1.0, 1.0)):
        assert warnings_of(image, caplog, spacing_mm=no_resampling) == []
    assert len(warnings_of(image, caplog, spacing_mm=None, crops=True)) == 1
    caplog.clear()
    (line,) = warnings_of(image, caplog)
    assert "between 0 and 1; TotalSegmentator truncates them to whole numbers" in line
    caplog.clear()
    scaled = nib.Nifti1Image(np.arange(64, dtype=np.uint8).reshape(4, 4, 4), np.eye(4))
    scaled.header.set_slope_inter(1 / 255, 0)
    nib.save(scaled, tmp_path / "scaled.nii.gz")
    assert "between 0 and 0.247" in warnings_of(tmp_path / "scaled.nii.gz", caplog)[0]


def test_thick_slices_missing_orientation_and_rotation_give_warnings(caplog):
    thick = nib.Nifti1Image(ORDINARY.astype(np.int16), np.diag([0.8, 0.8, 7.5, 1.0]))
    assert "0.8 x 0.8 x 7.5 mm" in warnings_of(thick, caplog)[0]
    caplog.clear()
    unoriented = nib.Nifti1Image(ORDINARY.astype(np.int16), np.eye(4))
    unoriented.header["sform_code"] = unoriented.header["qform_code"] = 0
    assert "left and right may be swapped" in warnings_of(unoriented, caplog)[0]
    caplog.clear()
    assert "rotated by 40 degrees" in warnings_of(rotated(40.0), caplog)[0]


def ct(low=-1000, high=1500):
    """A body of fat, soft tissue, lungs and bone in air, with noise; int16, HU."""
    random = np.random.default_rng(1)
    x, y, _ = np.meshgrid(*(np.linspace(-1, 1, 40),) * 3, indexing="ij")
    values = np.full((40, 40, 40), -1000.0)
    values[x**2 + y**2 < 0.8] = -100
    values[x**2 + y**2 < 0.6] = 40
    values[(x - 0.4) ** 2 + y**2 < 0.06] = -850
    values[x**2 + (y - 0.5) ** 2 < 0.01] = 900
    return (values + random.normal(0, 15, values.shape)).clip(low, high).astype(np.int16)


def implants():
    values = ct()
    values[18:21, 18:21] = 30710
    return values


def padded(values, padding):
    x, y, _ = np.meshgrid(*(np.linspace(-1, 1, 40),) * 3, indexing="ij")
    return np.where(x**2 + y**2 > 1, padding, values).astype(values.dtype)


HOUNSFIELD = {
    "ordinary": ct(),
    "float": ct().astype(np.float32) + 0.25,
    "padding of GE": padded(ct(), -2000),
    "padding of Siemens": padded(ct(-1024), -3024),
    "lowest int16 as padding": padded(ct(), -32768),
    "implants": implants(),
    "crop without air": ct()[16:24, 16:24].clip(0),
    "crop with contrast": ct()[16:24, 16:24].clip(0) + 250,
    "bone": ct()[17:23, 26:34].clip(0),
    "lungs": ct()[26:30, 18:22],
    "mask": (ct() > 0).astype(np.uint8),
    "nothing but air": np.full((9, 9, 9), -1000, np.int16),
}

OTHERS = {
    "offset missing": (ct() + 1024).astype(np.int16),
    "offset missing, float": (ct() + 1024.0),
    "offset missing, unsigned": (ct(-1024) + 1024).astype(np.uint16),
    "offset twice": (ct() - 1024).astype(np.int16),
    "8 bits": ((ct().clip(-160, 240) + 160) / 400 * 255).astype(np.uint8),
    "8 bits, stored as int16": ((ct().clip(-160, 240) + 160) / 400 * 255).astype(np.int16),
    "padding without its sign": padded((ct(-1024) + 1024).astype(np.uint16), 63536),
    "MR": np.abs(np.random.default_rng(3).normal(0, 9, (40, 40, 40)) + 3 * (ct() + 900).clip(0)),
    "MR with an empty background": (ct() + 900).clip(0),
}


@pytest.mark.parametrize("name", HOUNSFIELD)
def test_scans_in_hounsfield_units_give_no_warning(name, caplog):
    image = nib.Nifti1Image(HOUNSFIELD[name], np.eye(4))
    assert warnings_of(image, caplog, modality="CT") == []


@pytest.mark.parametrize("name", OTHERS)
def test_other_intensities_give_one_warning_for_ct_and_none_for_mr(name, caplog):
    image = nib.Nifti1Image(OTHERS[name], np.eye(4))
    assert warnings_of(image, caplog, modality="MR") == []
    (line,) = warnings_of(image, caplog, modality="CT")
    assert "Hounsfield units" in line
    low, high = OTHERS[name].min(), OTHERS[name].max()
    assert f"between {low:.5g} and {high:.5g}" in line


def test_the_demonstration_scan_is_in_hounsfield_units(caplog):
    from totalfast.demo.phantom import make_phantom

    phantom = make_phantom(0, shape_xyz=(80, 64, 80), spacing_mm=4.5)
    assert warnings_of(nib.Nifti1Image(phantom.ct, phantom.affine), caplog, modality="CT") == []
