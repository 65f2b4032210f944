from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from totalfast import InputError
from totalfast.geometry import Grid, linear_weights, nearest_indices


def test_nearest_indices_by_hand():
    assert nearest_indices(3, 6).tolist() == [0, 0, 1, 1, 2, 2]
    assert nearest_indices(5, 3).tolist() == [0, 2, 4]
    assert nearest_indices(4, 4).tolist() == [0, 1, 2, 3]
    assert nearest_indices(7, 1).tolist() == [0]
    assert nearest_indices(1, 4).tolist() == [0, 0, 0, 0]


def test_linear_weights_by_hand():
    weights = linear_weights(3, 5)
    assert weights.lower.tolist() == [0, 0, 1, 1, 2]
    assert weights.upper.tolist() == [1, 1, 2, 2, 2]
    assert weights.lower_weight.tolist() == [1.0, 0.5, 1.0, 0.5, 1.0]
    assert weights.upper_weight.tolist() == [0.0, 0.5, 0.0, 0.5, 0.0]


@given(st.integers(1, 700), st.integers(1, 700))
def test_nearest_indices_are_scipys(source, target):
    zoom = (target + 0.25) / source if target == 1 else target / source
    line = np.arange(source, dtype=np.float64)
    expected = ndimage.zoom(line, zoom, order=0, mode="nearest")
    if len(expected) == target:
        assert nearest_indices(source, target).tolist() == expected.astype(int).tolist()


def test_spacing_is_the_float32_column_norm_that_nibabel_stores():
    affine = np.array(
        [[0.7, -0.1, 0.3, 5], [0.2, 0.8, -0.2, 6], [-0.1, 0.15, 2.5, 7], [0, 0, 0, 1]]
    )
    image = nib.Nifti1Image(np.zeros((3, 4, 5), np.uint8), affine)
    grid = Grid(shape=(3, 4, 5), affine=affine)
    assert tuple(grid.spacing_mm) == image.header.get_zooms()


@pytest.mark.parametrize("axes", ["RAS", "LPS", "RPI", "SLP", "AIL"])
def test_canonical_grid_is_nibabels(axes):
    from nibabel.orientations import axcodes2ornt, ornt_transform

    image = nib.Nifti1Image(np.zeros((3, 4, 5), np.uint8), np.diag([1.5, 2, 3, 1.0]))
    image = image.as_reoriented(ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(axes)))
    expected = nib.as_closest_canonical(image)
    actual = Grid(shape=image.shape, affine=image.affine).canonical()
    assert actual.shape == expected.shape
    np.testing.assert_array_equal(actual.affine, expected.affine)


def test_grid_refuses_what_is_no_grid():
    with pytest.raises(InputError, match="at least 1 voxel"):
        Grid(shape=(3, 0, 2), affine=np.eye(4))
    with pytest.raises(InputError, match="NaN"):
        Grid(shape=(3, 3, 2), affine=np.full((4, 4), np.nan))
    with pytest.raises(InputError, match="spacing must be positive"):
        Grid(shape=(3, 3, 2), affine=np.diag([1.0, 0, 1, 1]))


def test_image_thinner_than_half_a_model_voxel_is_refused_with_its_extent():
    grid = Grid(shape=(100, 100, 1), affine=np.diag([1.0, 1.0, 0.5, 1.0]))
    with pytest.raises(InputError, match=r"covers only 100 x 100 x 0\.5 mm"):
        grid.resampled((6.0, 6.0, 6.0))


def test_spacing_fits_only_if_it_is_equal_as_float32_and_float64():
    assert Grid(shape=(2, 2, 2), affine=np.diag([1.5, 1.5, 1.5, 1])).has_spacing((1.5, 1.5, 1.5))
    assert not Grid(shape=(2, 2, 2), affine=np.diag([0.7, 0.7, 0.7, 1])).has_spacing((0.7,) * 3)
