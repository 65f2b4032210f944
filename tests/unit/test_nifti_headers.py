"""Headers that contradict their file or themselves: repaired, told, or refused in one line."""

from __future__ import annotations

import gzip
import io
import os
import struct

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from totalfast import InputError
from totalfast.files.gunzip import REST_BYTES
from totalfast.files.read import is_dicom, open_scan, read_image
from totalfast.files.write import _header_bytes, label_image

VALUES = np.arange(6 * 7 * 8, dtype=np.int16).reshape(6, 7, 8) - 100
AFFINE = np.array([[-2.0, 0, 0, 50], [0, 2.0, 0, -40], [0, 0, 3.0, 10], [0, 0, 0, 1]])
DIM, PIXDIM, OFFSET, SCALING, UNITS = 40, 76, 108, 112, 123
QFORM, SFORM, QUATERNION, SROW = 252, 254, 256, 280
"""Places of the fields of a NIfTI-1 header."""


def raw(values=VALUES, affine=AFFINE, *, qform=1, sform=1):
    image = nib.Nifti1Image(values, affine)
    image.set_sform(affine, sform)
    image.set_qform(affine, qform)
    return bytearray(image.to_bytes())


def poked(*fields, **keywords):
    content = raw(**keywords)
    for place, kind, *numbers in fields:
        struct.pack_into(f"<{kind}", content, place, *numbers)
    return bytes(content)


def written(image):
    """What another program reads of a label map that is written with the image's header."""
    labels = np.zeros(image.grid.shape, np.uint8)
    labelled = label_image(labels, affine=image.written_affine, header=image.header, names={1: "a"})
    content = _header_bytes(labelled) + labels.tobytes()
    return nib.Nifti1Image.from_bytes(content), content


def lines(caplog):
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize("packed", [bytes, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize(
    "offset", [0.0, 348.0, -1.0, 16.0, 1e9, float("inf"), float("-inf"), float("nan")]
)
def test_a_wrong_vox_offset_is_found_by_the_files_length(offset, packed, caplog, tmp_path):
    path = tmp_path / "scan.nii"
    path.write_bytes(packed(poked((OFFSET, "f", offset))))
    np.testing.assert_array_equal(read_image(path).stored, VALUES)
    (line,) = lines(caplog)
    assert "they begin at byte 352" in line
    path.write_bytes(packed(poked((OFFSET, "f", offset)) + b"more"))
    with pytest.raises(InputError, match=r"scan\.nii .*vox_offset"):
        read_image(path)


def test_voxels_directly_behind_the_header(tmp_path, caplog):
    content = poked((OFFSET, "f", 0.0))
    (tmp_path / "scan.nii").write_bytes(content[:348] + content[352:])
    np.testing.assert_array_equal(read_image(tmp_path / "scan.nii").stored, VALUES)
    assert "they begin at byte 348" in caplog.text


@pytest.mark.parametrize("behind", [1, 3, 16])
def test_voxels_at_an_odd_place_are_read(behind, caplog):
    content = poked((OFFSET, "f", 352.0 + behind))
    content = content[:352] + bytes(behind) + content[352:]
    np.testing.assert_array_equal(read_image(io.BytesIO(content)).stored, VALUES)
    assert lines(caplog) == []


def test_a_size_that_the_file_cannot_hold_is_refused_when_it_is_opened(tmp_path):
    huge = poked((DIM, "8h", 3, 32000, 32000, 32000, 1, 1, 1, 1))
    for name, content in (("a.nii", huge), ("a.nii.gz", gzip.compress(huge))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match="promises 65536000000000 bytes of voxels"):
            open_scan(tmp_path / name)
        with pytest.raises(InputError, match="promises 65536000000000 bytes of voxels"):
            open_scan(io.BytesIO(content))


def test_axes_beyond_int16_are_refused_when_the_scan_is_opened(tmp_path):
    values = np.zeros((40000, 1, 2), np.uint8)
    nib.save(nib.Nifti2Image(values, np.eye(4)), tmp_path / "a.nii")
    sitk.WriteImage(sitk.GetImageFromArray(values.T), tmp_path / "a.nrrd")
    for name in ("a.nii", "a.nrrd"):
        with pytest.raises(InputError, match=r"\(40000, 1, 2\).* at most 32767"):
            open_scan(tmp_path / name)


@pytest.mark.parametrize("length", [1.0, 1.0000004, 1.00001, 1.0009])
def test_a_quaternion_that_is_longer_than_one_by_rounding_is_read(length):
    content = poked((QUATERNION, "3f", 0.0, length, 0.0), sform=0)
    image = read_image(io.BytesIO(content))
    np.testing.assert_allclose(image.grid.affine, AFFINE, atol=1e-2)
    again, bytes_written = written(image)
    np.testing.assert_allclose(again.affine, image.grid.affine, atol=1e-5)
    assert np.linalg.norm([again.header[f"quatern_{axis}"] for axis in "bcd"]) <= 1.0 + 1e-6
    assert len(bytes_written) > 352


@pytest.mark.parametrize("bad", [(0.9, 0.9, 0.9), (float("nan"), 0, 0), (float("inf"), 0, 0)])
def test_a_qform_that_is_no_rotation(bad, caplog):
    with pytest.raises(InputError, match="without a usable orientation: its qform"):
        read_image(io.BytesIO(poked((QUATERNION, "3f", *bad), sform=0)))
    image = read_image(io.BytesIO(poked((QUATERNION, "3f", *bad))))
    np.testing.assert_array_equal(image.grid.affine, AFFINE)
    assert lines(caplog) == []
    np.testing.assert_allclose(written(image)[0].header.get_qform(), AFFINE, atol=1e-5)


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf"), 1e38])
def test_an_sform_that_is_unusable(bad, caplog):
    image = read_image(io.BytesIO(poked((SROW, "12f", *[bad] * 12))))
    np.testing.assert_allclose(image.grid.affine, AFFINE, atol=1e-5)
    assert "its qform is used" in lines(caplog)[0]
    np.testing.assert_allclose(written(image)[0].header.get_sform(), AFFINE, atol=1e-5)
    with pytest.raises(InputError, match="without a usable orientation: its sform"):
        read_image(io.BytesIO(poked((SROW, "12f", *[bad] * 12), qform=0)))


def test_pixdim_unlike_the_affine(caplog):
    from totalfast.run.measure import _voxel_mm3

    content = poked((PIXDIM, "4f", 1.0, 1.0, 1.0, 1.0), qform=0)
    image = read_image(io.BytesIO(content))
    assert "two voxel sizes: 1 x 1 x 1 mm in pixdim, and 2 x 2 x 3 mm" in lines(caplog)[0]
    assert image.zooms_mm == (2.0, 2.0, 3.0)
    assert _voxel_mm3(image.grid, image.zooms_mm) == 12.0
    again, _ = written(image)
    np.testing.assert_array_equal(again.header.get_zooms(), [2.0, 2.0, 3.0])
    caplog.clear()
    both = read_image(io.BytesIO(poked((SROW, "f", -4.0))))  # the qform has the voxel size 2
    assert "4 x 2 x 3 mm" in lines(caplog)[0]
    assert both.zooms_mm == (4.0, 2.0, 3.0)
    np.testing.assert_array_equal(written(both)[0].affine, both.grid.affine)


def test_a_sheared_voxel_has_the_volume_of_its_affine(caplog):
    from totalfast.run.measure import _voxel_mm3

    sheared = AFFINE.copy()
    sheared[1, 2] = 1.5
    image = read_image(nib.Nifti1Image(VALUES, sheared))
    assert _voxel_mm3(image.grid, image.zooms_mm) == pytest.approx(12.0)
    np.testing.assert_array_equal(written(image)[0].affine, sheared)
    assert lines(caplog) == []


@pytest.mark.parametrize(("code", "size_mm"), [(3, 0.001), (1, 1000.0)])
@pytest.mark.parametrize("times", [0, 8])
def test_other_units_are_converted_and_written_as_they_came(code, size_mm, times, caplog):
    affine = np.diag([1 / size_mm, 1 / size_mm, 1 / size_mm, 1.0]) @ AFFINE
    content = poked((UNITS, "B", code + times), affine=affine)
    image = read_image(io.BytesIO(content))
    np.testing.assert_allclose(image.grid.affine, AFFINE, rtol=1e-6)
    np.testing.assert_allclose(image.zooms_mm, (2.0, 2.0, 3.0), rtol=1e-6)
    assert "it is converted to mm" in lines(caplog)[0]
    again, _ = written(image)
    np.testing.assert_array_equal(again.affine, nib.Nifti1Image.from_bytes(content).affine)
    assert int(again.header["xyzt_units"]) == code + times
    lazily = open_scan(nib.Nifti1Image.from_bytes(content))
    np.testing.assert_allclose(lazily.affine, AFFINE, rtol=1e-6)


def test_a_unit_that_cannot_be_meant_is_ignored(caplog):
    image = read_image(io.BytesIO(poked((UNITS, "B", 1))))
    np.testing.assert_array_equal(image.grid.affine, AFFINE)
    assert "it is read in mm" in lines(caplog)[0]


@pytest.mark.parametrize("shape", [(6, 7, 8, 1), (6, 7, 8, 1, 1), (6, 7, 8, 1, 1, 1, 1)])
def test_axes_of_one_voxel_are_dropped_silently(shape, caplog, tmp_path):
    nib.save(nib.Nifti1Image(VALUES.reshape(shape), AFFINE), tmp_path / "a.nii.gz")
    for source in (tmp_path / "a.nii.gz", nib.load(tmp_path / "a.nii.gz")):
        np.testing.assert_array_equal(read_image(source).stored, VALUES)
    in_memory = nib.Nifti1Image(VALUES.reshape(shape), AFFINE)
    np.testing.assert_array_equal(read_image(in_memory).stored, VALUES)
    assert lines(caplog) == []


def test_slices_along_the_fourth_axis_are_a_volume(caplog, tmp_path):
    values = VALUES[:, :, None, :]
    nib.save(nib.Nifti1Image(values, AFFINE), tmp_path / "a.nii.gz")
    for source in (tmp_path / "a.nii.gz", nib.Nifti1Image(values, AFFINE)):
        caplog.clear()
        image = read_image(source)
        np.testing.assert_array_equal(image.stored, VALUES)
        np.testing.assert_array_equal(image.grid.affine, AFFINE)
        assert "its 8 slices lie along the fourth axis" in lines(caplog)[0]


def test_only_the_first_of_several_time_points_is_unpacked(tmp_path):
    times = 2 + REST_BYTES // VALUES.nbytes
    content = poked((DIM, "8h", 4, 6, 7, 8, times, 1, 1, 1)) + bytes(times * VALUES.nbytes)
    packed = gzip.compress(content)
    (tmp_path / "a.nii.gz").write_bytes(packed[:-4] + b"bad!")  # the end is not looked at
    np.testing.assert_array_equal(read_image(tmp_path / "a.nii.gz").stored, VALUES)
    few = poked((DIM, "8h", 4, 6, 7, 8, 2, 1, 1, 1)) + VALUES.tobytes()
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(few)[:-4] + b"bad!")
    with pytest.raises(InputError, match="checksum"):
        read_image(tmp_path / "b.nii.gz")


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_the_content_and_not_the_ending_tells_how_a_file_is_packed(name, tmp_path):
    once = gzip.compress(bytes(raw()))
    for content in (bytes(raw()), once, gzip.compress(once), once + b"behind its end"):
        (tmp_path / name).write_bytes(content)
        np.testing.assert_array_equal(read_image(tmp_path / name).stored, VALUES)
    (tmp_path / name).write_bytes(gzip.compress(gzip.compress(once)))
    with pytest.raises(InputError, match="more than 2 times"):
        read_image(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"PK\x03\x04" + bytes(400), "zip file"),
        (b"NRRD0004\n", "NRRD file"),
        (bytes(128) + b"DICM" + bytes(400), "DICOM file"),
        (b"", "it is empty"),
        (struct.pack("<i", 348) + bytes(400), "Analyze 7.5"),
    ],
)
def test_other_content_is_named(content, match, tmp_path):
    (tmp_path / "scan.nii.gz").write_bytes(content)
    with pytest.raises(InputError, match=rf"scan\.nii\.gz is not a readable NIfTI.*{match}"):
        open_scan(tmp_path / "scan.nii.gz")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_a_pipe_does_not_block(tmp_path):
    for name in ("a.nii", "a.nrrd"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(InputError, match="no regular file"):
            open_scan(tmp_path / name)


def test_pairs_are_read_and_analyze_files_are_refused(tmp_path):
    nib.save(nib.Nifti1Pair(VALUES, AFFINE), tmp_path / "scan.hdr")
    assert not is_dicom(tmp_path / "scan.img")
    assert is_dicom(tmp_path / "alone.img")
    for name in ("scan.hdr", "scan.img"):
        image = read_image(tmp_path / name)
        np.testing.assert_array_equal(image.stored, VALUES)
        np.testing.assert_array_equal(written(image)[0].affine, AFFINE)
    nib.save(nib.AnalyzeImage(VALUES, AFFINE), tmp_path / "old.hdr")
    with pytest.raises(InputError, match="no orientation"):
        read_image(tmp_path / "old.img")


def test_damaged_extensions_are_left_out_and_sound_ones_are_kept(caplog):
    image = nib.Nifti1Image(VALUES, AFFINE)
    image.header.extensions.append(nib.nifti1.Nifti1Extension(6, b"a comment"))
    content = bytearray(image.to_bytes())
    read = read_image(io.BytesIO(bytes(content)))
    assert read.header.extensions[0].get_content() in (b"a comment", "a comment")
    struct.pack_into("<i", content, 352, 99999)
    read = read_image(io.BytesIO(bytes(content)))
    np.testing.assert_array_equal(read.stored, VALUES)
    assert len(read.header.extensions) == 0
    assert "extensions" in lines(caplog)[0]


@pytest.mark.parametrize("ending", [".mhd", ".nhdr"])
def test_detached_data_are_found_missing_or_refused(ending, tmp_path):
    header = tmp_path / f"scan{ending}"
    sitk.WriteImage(sitk.GetImageFromArray(VALUES.T), header)
    (data,) = (path for path in tmp_path.iterdir() if path != header)
    (tmp_path / "elsewhere").mkdir()
    moved = data.rename(tmp_path / "elsewhere" / data.name)
    with pytest.raises(InputError, match=rf"does not exist or is no regular file: .*{data.name}"):
        open_scan(header)
    header.write_text(header.read_text().replace(data.name, f"elsewhere/{data.name}"))
    np.testing.assert_array_equal(read_image(header).stored, VALUES)
    moved.write_bytes(b"short")
    with pytest.raises(InputError, match=r"can't be read|promises 672 bytes of voxels"):
        open_scan(header)


@pytest.mark.parametrize("ending", [".nrrd", ".mha", ".mhd", ".nhdr"])
def test_sizes_of_compressed_files_are_checked_before_they_are_read(ending, tmp_path):
    path = tmp_path / f"scan{ending}"
    sitk.WriteImage(sitk.GetImageFromArray(VALUES.T), path, useCompression=True)
    np.testing.assert_array_equal(read_image(path).stored, VALUES)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"6 7 8", b"30000 30000 30000"))
    with pytest.raises(InputError, match="promises 54000000000000 bytes of voxels") as refused:
        open_scan(path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("layers", [1, 2])
def test_no_damaged_byte_of_a_gzip_stream_changes_voxels(layers, tmp_path):
    packed = bytes(raw(np.random.default_rng(0).integers(-99, 99, (6, 7, 8)).astype(np.int16)))
    expected = nib.Nifti1Image.from_bytes(packed).get_fdata()
    for _ in range(layers):
        packed = gzip.compress(packed)
    refused = 0
    for place in range(10, len(packed)):
        content = bytearray(packed)
        content[place] ^= 0x10
        (tmp_path / "a.nii.gz").write_bytes(content)
        try:
            np.testing.assert_array_equal(read_image(tmp_path / "a.nii.gz").stored, expected)
        except InputError:
            refused += 1
    assert refused > len(packed) // 2


def test_a_nested_stream_whose_beginning_is_hardly_compressed_is_opened(tmp_path):
    header = b"\x1f\x8b\x08\x04" + bytes(6) + struct.pack("<H", 2000) + os.urandom(2000)
    plain = bytes(raw())
    inner = header + gzip.compress(plain)[10:]
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(inner))
    np.testing.assert_array_equal(read_image(tmp_path / "a.nii.gz").stored, VALUES)


@pytest.mark.parametrize("length", [1e-30, 1e-300])
def test_an_affine_that_is_too_small_for_float32_is_refused(length, tmp_path):
    image = nib.Nifti2Image(VALUES[..., None], AFFINE)
    image.set_qform(None, 0)
    content = bytearray(image.to_bytes())
    struct.pack_into("<d", content, 480, length)  # srow_z[2]
    (tmp_path / "a.nii").write_bytes(content)
    with pytest.raises(InputError, match="without a usable orientation"):
        open_scan(tmp_path / "a.nii")


@pytest.mark.parametrize("size", [1e38, 1e19, 1e-19])
@pytest.mark.parametrize("unit", [1, 2])
def test_voxel_sizes_beyond_float32_are_refused_without_sform_and_qform(size, unit):
    content = poked((PIXDIM + 4, "f", size), (UNITS, "B", unit), qform=0, sform=0)
    with pytest.raises(InputError, match="not usable"):
        open_scan(io.BytesIO(content))


def test_an_affine_that_is_beyond_float32_in_mm_is_refused():
    affine = np.diag([1e17, 1e17, 1e17, 1.0])
    content = poked((UNITS, "B", 1), affine=affine, qform=0)
    with pytest.raises(InputError, match="no usable orientation"):
        open_scan(io.BytesIO(content))


@pytest.mark.parametrize("number", [np.nan, np.inf, 0.0, 1e30])
def test_images_in_memory_with_an_unusable_affine_are_refused(number):
    affine = np.diag([number, 2.0, 2.0, 1.0])
    image = nib.Nifti1Image(VALUES, AFFINE)
    image._affine = affine
    with pytest.raises(InputError, match="no usable orientation"):
        open_scan(image)
    spatial = nib.spatialimages.SpatialImage(VALUES, None)
    with pytest.raises(InputError, match="no usable orientation"):
        open_scan(spatial)
