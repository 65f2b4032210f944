"""NaN and infinity in a scan are replaced, and a warning gives their number."""

from __future__ import annotations

import numpy as np
import pytest

from totalfast.errors import InputError
from totalfast.geometry import Grid
from totalfast.run.intensities import replace_non_finite
from totalfast.scan import ScannerImage


def scan(values, slope=1.0, intercept=0.0):
    grid = Grid(shape=values.shape, affine=np.eye(4))
    return ScannerImage(stored=values, slope=slope, intercept=intercept, grid=grid, header=None)


def values(dtype=np.float32):
    return np.arange(24, dtype=dtype).reshape(2, 3, 4) - 4


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_values_are_replaced_by_air_and_the_highest(dtype, caplog):
    wrong = values(dtype)
    wrong[0, 0, 1], wrong[1, 2, 1], wrong[1, 1, 2] = np.nan, -np.inf, np.inf
    before = wrong.copy()
    image = scan(wrong, slope=2.0, intercept=1.0)
    for modality, air in (("CT", -1024.0), ("MR", -7.0)):  # -4 * 2 + 1
        replaced = replace_non_finite(image, modality=modality)
        expected = values(dtype) * 2.0 + 1.0
        expected[0, 0, 1] = expected[1, 2, 1] = air
        expected[1, 1, 2] = 39.0
        np.testing.assert_allclose(replaced.scale(replaced.stored), expected, rtol=1e-3)
        assert replaced.stored.dtype == dtype
        np.testing.assert_array_equal(wrong, before)  # it may be the caller's array
        assert "3 voxels of the scan (12.5 %) are NaN or infinite" in caplog.text
        assert f"the intensity of air, {air:g} " in caplog.text


def test_finite_scans_are_returned_unchanged(caplog):
    huge = np.full((2, 3, 4), 1e308)  # their sum is infinite
    for image in (scan(values()), scan(values(np.int16)), scan(huge)):
        for modality in ("CT", "MR"):
            assert replace_non_finite(image, modality=modality) is image
    assert caplog.text == ""


def test_a_scan_without_a_finite_intensity_is_refused():
    with pytest.raises(InputError, match="all intensities of the scan are NaN or infinite"):
        replace_non_finite(scan(np.full((2, 2, 2), np.nan)), modality="CT")


def test_a_background_of_nan_becomes_zero_in_mr():
    wrong = np.full((6, 6, 6), np.nan, np.float32)
    wrong[2:4, 2:4, 1:5] = 150.0
    replaced = replace_non_finite(scan(wrong), modality="MR").stored
    np.testing.assert_array_equal(replaced, np.nan_to_num(wrong))
