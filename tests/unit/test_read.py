from __future__ import annotations

import gzip

import nibabel as nib
import numpy as np
import pytest

from totalfast import InputError, UnsupportedError
from totalfast.stages.read import read_image


def saved(path, values, slope=None, inter=None):
    image = nib.Nifti1Image(values, np.diag([1.0, 2.0, 3.0, 1.0]))
    if slope is not None:
        image.header.set_slope_inter(slope, inter)
    nib.save(image, path)
    return path


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("scaling", [(None, None), (0.37, -12.5)])
def test_intensities_are_get_fdatas(tmp_path, dtype, ending, scaling):
    values = np.random.default_rng(0).integers(0, 200, (5, 6, 7)).astype(dtype)
    path = saved(tmp_path / f"scan{ending}", values, *scaling)
    image = read_image(path)
    expected = nib.load(path).get_fdata()
    np.testing.assert_array_equal(image.scale(image.stored), expected)
    np.testing.assert_array_equal(image.scale(image.stored[:, :, 2:4]), expected[:, :, 2:4])
    assert image.stored.dtype == nib.load(path).get_data_dtype()


def test_big_endian_file(tmp_path):
    header = nib.Nifti1Header(endianness=">")
    header.set_data_dtype(">i2")
    values = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    nib.save(nib.Nifti1Image(values.astype(">i2"), np.eye(4), header), tmp_path / "b.nii.gz")
    image = read_image(tmp_path / "b.nii.gz")
    np.testing.assert_array_equal(image.scale(image.stored), values)


def test_an_image_in_memory_and_one_that_is_loaded_lazily(tmp_path):
    values = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    lazy = nib.load(saved(tmp_path / "scan.nii.gz", values, 2.0, 1.0))
    for image in (nib.Nifti1Image(values * 2.0 + 1.0, lazy.affine), lazy):
        read = read_image(image)
        np.testing.assert_array_equal(read.scale(read.stored), values * 2.0 + 1.0)
    assert not lazy.in_memory


def test_first_volume_of_a_4d_image_with_a_fresh_header(tmp_path, caplog):
    values = np.random.default_rng(0).integers(0, 99, (3, 4, 5, 2)).astype(np.int16)
    image = read_image(saved(tmp_path / "4d.nii.gz", values))
    np.testing.assert_array_equal(image.stored, values[..., 0])
    assert image.header.get_data_shape() == (3, 4, 5)
    assert "Only using first three dimensions" in caplog.text


@pytest.mark.parametrize(
    ("values", "match"),
    [
        (np.zeros((5, 5), np.int16), "is 2-D"),
        (np.zeros((2, 2, 2, 2, 2), np.int16), "is 5-D"),
        (np.zeros((2, 2, 2), np.complex64), "one real number a voxel"),
        (np.zeros((2, 2, 2), [("R", "u1"), ("G", "u1"), ("B", "u1")]), "one real number a voxel"),
    ],
)
def test_what_is_no_3d_intensity_image_is_refused(tmp_path, values, match):
    with pytest.raises(InputError, match=match):
        read_image(saved(tmp_path / "scan.nii.gz", values))


def test_missing_file_names_itself(tmp_path):
    with pytest.raises(InputError, match=r"nothere\.nii\.gz does not exist"):
        read_image(tmp_path / "nothere.nii.gz")


def test_directories_and_other_formats_are_not_supported_yet(tmp_path):
    with pytest.raises(UnsupportedError, match="not supported yet"):
        read_image(tmp_path)
    (tmp_path / "scan.mha").write_bytes(b"x")
    with pytest.raises(UnsupportedError, match=r"\.nii\.gz"):
        read_image(tmp_path / "scan.mha")


def test_truncated_file_says_how_much_is_there(tmp_path):
    path = saved(tmp_path / "scan.nii.gz", np.zeros((40, 40, 40), np.int16))
    whole = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(whole[: len(whole) // 2]))
    with pytest.raises(
        InputError, match=r"scan\.nii\.gz is damaged or truncated.* of 128000 bytes"
    ):
        read_image(path)


def test_download_that_was_cut_off(tmp_path):
    values = np.random.default_rng(0).integers(0, 9999, (40, 40, 40)).astype(np.int16)
    path = saved(tmp_path / "scan.nii.gz", values)
    path.write_bytes(path.read_bytes()[:-30000])
    with pytest.raises(InputError, match="damaged or truncated"):
        read_image(path)


def test_wrong_checksum_is_noticed(tmp_path):
    path = saved(tmp_path / "scan.nii.gz", np.zeros((9, 9, 9), np.int16))
    content = bytearray(path.read_bytes())
    content[-6] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(InputError, match="damaged"):
        read_image(path)


def test_text_with_a_nifti_name(tmp_path):
    (tmp_path / "scan.nii.gz").write_text("not a scan")
    with pytest.raises(InputError, match=r"scan\.nii\.gz"):
        read_image(tmp_path / "scan.nii.gz")


def test_gzip_of_several_members_as_bgzip_and_pigz_make_it(tmp_path):
    path = saved(tmp_path / "scan.nii.gz", np.arange(6000, dtype=np.int16).reshape(10, 20, 30))
    whole = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(whole[:500]) + gzip.compress(whole[500:]))
    np.testing.assert_array_equal(read_image(path).stored.ravel(), np.arange(6000))
