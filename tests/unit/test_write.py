from __future__ import annotations

import gzip
import subprocess

import nibabel as nib
import numpy as np
import pytest
import SimpleITK

from totalfast import OutputError
from totalfast.files.write import label_image, write_labels, write_masks
from totalfast.system.pending_files import PendingFiles

NAMES = {1: "liver", 2: "spleen", 7: "heart", 255: "absent"}


@pytest.fixture
def header():
    scan = nib.Nifti1Image(np.zeros((31, 20, 43), np.int16), np.diag([-0.7, 0.8, 2.5, 1.0]))
    scan.header.set_qform(scan.affine, code=1)
    scan.header.set_xyzt_units("mm", "sec")
    scan.header["descrip"] = b"a scan"
    scan.header.set_slope_inter(2.0, 5.0)
    return scan.header


@pytest.fixture
def labels():
    labels = np.zeros((31, 20, 43), np.uint8, order="F")
    labels[3:20, 4:9, 10:30] = 1
    labels[3:9, 10:19, 0:43] = 2
    labels[30, 19, 42] = 7
    return labels


def image_of(labels, header):
    return label_image(labels, affine=header.get_best_affine(), header=header, names=NAMES)


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_label_map_file_equals_nibabels(labels, header, tmp_path, ending):
    image = image_of(labels, header)
    nib.save(image, tmp_path / f"expected{ending}")
    with PendingFiles() as files:
        write_labels(image, tmp_path / f"actual{ending}", files=files, threads=2)
        files.commit()
    expected = (tmp_path / f"expected{ending}").read_bytes()
    actual = (tmp_path / f"actual{ending}").read_bytes()
    if ending == ".nii.gz":
        expected, actual = gzip.decompress(expected), gzip.decompress(actual)
    assert actual == expected


def test_mask_files_equal_nibabels(labels, header, tmp_path):
    with PendingFiles() as files:
        write_masks(
            image_of(labels, header), NAMES, folder=tmp_path / "new" / "seg", files=files, threads=2
        )
        files.commit()
    folder = tmp_path / "new" / "seg"
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        f"{name}.nii.gz" for name in NAMES.values()
    )
    for label, name in NAMES.items():
        mask = label_image(
            (labels == label).astype(np.uint8),
            affine=header.get_best_affine(),
            header=header,
            names=None,
        )
        nib.save(mask, tmp_path / "expected.nii.gz")
        expected = gzip.decompress((tmp_path / "expected.nii.gz").read_bytes())
        assert gzip.decompress((folder / f"{name}.nii.gz").read_bytes()) == expected
        read = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(folder / f"{name}.nii.gz")))
        np.testing.assert_array_equal(read.T, labels == label)
        subprocess.run(["gzip", "-t", folder / f"{name}.nii.gz"], check=True)


def test_label_map_in_c_order(header, tmp_path):
    labels = np.random.default_rng(0).integers(0, 9, (31, 20, 43)).astype(np.uint8)
    with PendingFiles() as files:
        write_labels(image_of(labels, header), tmp_path / "seg.nii.gz", files=files, threads=1)
        files.commit()
    np.testing.assert_array_equal(nib.load(tmp_path / "seg.nii.gz").dataobj, labels)


def test_files_appear_together_or_not_at_all(tmp_path):
    (tmp_path / "b").write_text("old")
    with pytest.raises(RuntimeError, match="stop"), PendingFiles() as files:
        files.write(tmp_path / "a", lambda path: path.write_text("half"))
        files.write(tmp_path / "b", lambda path: path.write_text("half"))
        raise RuntimeError("stop")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"b": "old"}
    with PendingFiles() as files:
        files.write(tmp_path / "a", lambda path: path.write_text("whole"))
        assert not (tmp_path / "a").exists()
        files.commit()
    assert (tmp_path / "a").read_text() == "whole"


def test_disk_errors_become_output_errors_and_leave_nothing(tmp_path):
    def full(path):
        path.write_text("half")
        raise OSError(28, "No space left on device", "a")

    with pytest.raises(OutputError, match="No space left"), PendingFiles() as files:
        files.write(tmp_path / "a", full)
    assert list(tmp_path.iterdir()) == []
