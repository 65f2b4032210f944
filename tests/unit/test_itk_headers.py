"""NRRD and MetaImage headers that SimpleITK can't read safely are refused before it reads them.

Without these checks most of the cases end the process (segmentation fault).
"""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk

from totalfast import InputError
from totalfast.files.itk_header import HEADER_BYTES
from totalfast.files.read import read_image

VOXELS = np.arange(5 * 6 * 7, dtype=np.int16).reshape(5, 6, 7)


def written(path):
    sitk.WriteImage(sitk.GetImageFromArray(VOXELS), str(path))
    return path


def replaced(path, old, new):
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new, 1))
    return path


def refusal(path):
    with pytest.raises(InputError) as caught:
        read_image(path)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


@pytest.mark.parametrize("number", [b"-1", b"0", b"11", b"2147483648", b"99999999999", b"x", b""])
@pytest.mark.parametrize("sign", [b"=", b":"])
def test_a_number_of_dimensions_beyond_metaios_arrays(number, sign, tmp_path):
    path = replaced(written(tmp_path / "a.mha"), b"NDims = 3", b"NDims " + sign + b" " + number)
    assert "(NDims) is" in refusal(path)


@pytest.mark.parametrize("ending", ["mha", "mhd"])
@pytest.mark.parametrize("name", [b"%s%n", b"%1000d", b"a%d%d", b"%", b"%x", b"%*d", b"%ld"])
def test_a_data_file_that_is_a_format_of_printf(ending, name, tmp_path):
    path = written(tmp_path / f"a.{ending}")
    old = b"LOCAL" if ending == "mha" else b"a.raw"
    assert "no pattern of file names" in refusal(replaced(path, old, name))


def test_numbered_data_files_are_read(tmp_path):
    path = written(tmp_path / "a.mhd")
    for number, plane in enumerate(VOXELS, 1):
        (tmp_path / f"a_{number:03d}.raw").write_bytes(plane.tobytes())
    replaced(path, b"a.raw", b"a_%03d.raw 1 5 1")
    np.testing.assert_array_equal(read_image(path).stored, VOXELS.T)


@pytest.mark.parametrize("line", [b"x" * 900, b"kinds: " + b"x" * 5000, b"encoding: " + b"9" * 600])
def test_a_field_that_is_too_long_for_an_error_of_nrrdio(line, tmp_path):
    path = replaced(written(tmp_path / "a.nrrd"), b"type:", line + b"\ntype:")
    assert f"has {len(line)} bytes, but must have at most 500" in refusal(path)


@pytest.mark.parametrize("line", [b"# ", b"key:=", b"content: "])
def test_long_comments_and_values_of_keys_are_read(line, tmp_path):
    path = replaced(written(tmp_path / "a.nrrd"), b"type:", line + b"x" * 20_000 + b"\ntype:")
    np.testing.assert_array_equal(read_image(path).stored, VOXELS.T)


def test_voxels_are_not_taken_for_lines_of_the_header(tmp_path):
    voxels = np.full((5, 60, 70), 0x7878, np.int16)  # "x" twice
    sitk.WriteImage(sitk.GetImageFromArray(voxels), str(tmp_path / "a.nrrd"))
    assert voxels.nbytes < HEADER_BYTES
    np.testing.assert_array_equal(read_image(tmp_path / "a.nrrd").stored, voxels.T)


def test_names_of_missing_data_files_are_shown_in_one_line(tmp_path):
    path = replaced(written(tmp_path / "a.mhd"), b"a.raw", b"b\x0b\x1c\x85.raw")
    assert "does not exist or is no regular file" in refusal(path)


@pytest.mark.parametrize("name", ["a.mha", "packed.mha"])
def test_cut_voxels_are_refused_without_an_error_of_another_file(name, tmp_path):
    path = tmp_path / name
    sitk.WriteImage(sitk.GetImageFromArray(VOXELS), str(path), name.startswith("packed"))
    path.write_bytes(path.read_bytes()[:-9])
    message = refusal(path)
    assert f"{name} is damaged or truncated" in message
    assert "No such file" not in message
