from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest

from totalfast.files.read import read_image
from totalfast.run.input_warnings import warn_of_unusual

ORDINARY = np.random.default_rng(0).normal(0, 300, (8, 9, 10))


def warnings_of(image, caplog, *, spacing_mm=(1.5, 1.5, 1.5), crops=False):
    warn_of_unusual(read_image(image), spacing_mm=spacing_mm, crops=crops)
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
