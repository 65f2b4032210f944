from __future__ import annotations

import gzip
import io
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from nibabel.orientations import axcodes2ornt, ornt_transform

from totalfast import InputError
from totalfast.files.read import is_dicom, read_image


def saved(path, values, slope=None, inter=None):
    image = nib.Nifti1Image(values, np.diag([1.0, 2.0, 3.0, 1.0]))
    if slope is not None:
        image.header.set_slope_inter(slope, inter)
    nib.save(image, path)
    return path


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("scaling", [(None, None), (0.37, -12.5)])
def test_intensities_equal_get_fdata(tmp_path, dtype, ending, scaling):
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


def test_images_in_memory_and_lazily_loaded_images(tmp_path):
    values = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    lazy = nib.load(saved(tmp_path / "scan.nii.gz", values, 2.0, 1.0))
    for image in (nib.Nifti1Image(values * 2.0 + 1.0, lazy.affine), lazy):
        read = read_image(image)
        np.testing.assert_array_equal(read.scale(read.stored), values * 2.0 + 1.0)
    assert not lazy.in_memory


def test_first_volume_of_a_4d_image_has_a_new_header(tmp_path, caplog):
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
        (np.zeros((2, 2, 2), np.complex64), "one real number per voxel"),
        (np.zeros((2, 2, 2), [("R", "u1"), ("G", "u1"), ("B", "u1")]), "one real number per voxel"),
    ],
)
def test_images_other_than_3d_intensities_are_refused(tmp_path, values, match):
    with pytest.raises(InputError, match=match):
        read_image(saved(tmp_path / "scan.nii.gz", values))


def test_error_names_a_missing_file(tmp_path):
    with pytest.raises(InputError, match=r"nothere\.nii\.gz does not exist"):
        read_image(tmp_path / "nothere.nii.gz")


AXES = ["RAS", "LPS", "LIP", "SLP", "PSR"]


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("ending", [".nrrd", ".nhdr", ".mha", ".mhd"])
def test_nrrd_and_metaimage_equal_the_nifti_file(tmp_path, axes, ending):
    values = np.random.default_rng(0).integers(-900, 900, (5, 6, 7)).astype(np.int16)
    affine = np.diag([0.7, 1.3, 2.1, 1.0])
    turn = np.deg2rad(11.0)
    affine[:2, :2] = np.array(
        [[0.7 * np.cos(turn), -1.3 * np.sin(turn)], [0.7 * np.sin(turn), 1.3 * np.cos(turn)]]
    )
    affine[:3, 3] = [-40.0, 12.5, 700.0]
    image = nib.Nifti1Image(values, affine)
    image = image.as_reoriented(ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(axes)))
    nib.save(image, tmp_path / "scan.nii.gz")
    sitk.WriteImage(sitk.ReadImage(tmp_path / "scan.nii.gz"), tmp_path / f"scan{ending}")
    expected, actual = read_image(tmp_path / "scan.nii.gz"), read_image(tmp_path / f"scan{ending}")
    np.testing.assert_array_equal(actual.stored, expected.stored)
    np.testing.assert_allclose(actual.grid.affine, expected.grid.affine, rtol=0, atol=2e-5)
    assert nib.aff2axcodes(actual.grid.affine) == tuple(axes)
    assert actual.header.get_data_dtype() == np.int16


def test_nrrd_with_int64_four_dimensions_or_colours(tmp_path):
    values = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    sitk.WriteImage(sitk.GetImageFromArray(values[0]), tmp_path / "long.nrrd")
    assert read_image(tmp_path / "long.nrrd").stored.dtype == np.int64
    four = sitk.GetImageFromArray(values.astype(np.int16), isVector=False)
    sitk.WriteImage(four, tmp_path / "4d.nrrd")
    np.testing.assert_array_equal(read_image(tmp_path / "4d.nrrd").stored, values[0].T)
    colours = sitk.GetImageFromArray(values.astype(np.uint8), isVector=True)
    sitk.WriteImage(colours, tmp_path / "colours.nrrd")
    with pytest.raises(InputError, match=r"colours\.nrrd is 3-D .* with 5 values per voxel"):
        read_image(tmp_path / "colours.nrrd")


def test_error_names_a_damaged_metaimage(tmp_path):
    (tmp_path / "scan.mha").write_bytes(b"x")
    with pytest.raises(InputError, match=r"scan\.mha can't be read"):
        read_image(tmp_path / "scan.mha")


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("newer", [False, True])
def test_open_files_are_read_from_their_current_position(tmp_path, ending, newer):
    values = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    kind = nib.Nifti2Image if newer else nib.Nifti1Image
    image = kind(values, np.diag([1.0, 2.0, 3.0, 1.0]))
    image.header.set_slope_inter(0.5, 3.0)
    nib.save(image, tmp_path / f"scan{ending}")
    expected = read_image(tmp_path / f"scan{ending}")
    content = (tmp_path / f"scan{ending}").read_bytes()
    behind_something = io.BytesIO(b"before" + content)
    behind_something.seek(6)
    with (tmp_path / f"scan{ending}").open("rb") as file:
        for stream in (file, io.BytesIO(content), behind_something):
            actual = read_image(stream)
            np.testing.assert_array_equal(
                actual.scale(actual.stored), expected.scale(expected.stored)
            )
            np.testing.assert_array_equal(actual.grid.affine, expected.grid.affine)


@pytest.mark.parametrize(
    ("stream", "match"),
    [
        (io.BytesIO(b"not a scan" * 99), "not a readable NIfTI"),
        (io.BytesIO(b""), "can't be read|not a readable"),
        (io.BytesIO(b"\x1f\x8b and no more"), "can't be read"),
        (io.StringIO("text"), "mode 'rb'"),
        (3, "the input is of type int"),
    ],
)
def test_open_files_that_are_not_nifti_are_refused(stream, match):
    with pytest.raises(InputError, match=match):
        read_image(stream)


def test_only_paths_without_another_formats_ending_are_dicom(tmp_path):
    assert all(map(is_dicom, [tmp_path, str(tmp_path), tmp_path / "ct.zip", tmp_path / "a.nii.d"]))
    others = ["a.nii", "a.NII.GZ", "a.nrrd", "a.nhdr", "a.mha", Path("a.mhd"), io.BytesIO(b"")]
    assert not any(map(is_dicom, others))


def test_error_gives_the_bytes_of_a_truncated_file(tmp_path):
    path = saved(tmp_path / "scan.nii.gz", np.zeros((40, 40, 40), np.int16))
    whole = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(whole[: len(whole) // 2]))
    with pytest.raises(
        InputError, match=r"scan\.nii\.gz is damaged or truncated.* of 128000 bytes"
    ):
        read_image(path)


def test_incomplete_download_is_refused(tmp_path):
    values = np.random.default_rng(0).integers(0, 9999, (40, 40, 40)).astype(np.int16)
    path = saved(tmp_path / "scan.nii.gz", values)
    path.write_bytes(path.read_bytes()[:-30000])
    with pytest.raises(InputError, match="damaged or truncated"):
        read_image(path)


def test_wrong_checksum_is_an_error(tmp_path):
    path = saved(tmp_path / "scan.nii.gz", np.zeros((9, 9, 9), np.int16))
    content = bytearray(path.read_bytes())
    content[-6] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(InputError, match="damaged"):
        read_image(path)


def test_text_file_with_a_nifti_ending_is_refused(tmp_path):
    (tmp_path / "scan.nii.gz").write_text("not a scan")
    with pytest.raises(InputError, match=r"scan\.nii\.gz"):
        read_image(tmp_path / "scan.nii.gz")


def test_gzip_with_several_members_like_bgzip_and_pigz(tmp_path):
    path = saved(tmp_path / "scan.nii.gz", np.arange(6000, dtype=np.int16).reshape(10, 20, 30))
    whole = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(whole[:500]) + gzip.compress(whole[500:]))
    np.testing.assert_array_equal(read_image(path).stored.ravel(), np.arange(6000))
