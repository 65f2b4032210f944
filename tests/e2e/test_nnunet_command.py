"""``totalfast nnunet`` on folders with hidden, damaged, misnamed and missing files."""

from __future__ import annotations

import gzip
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch

from totalfast import ArgmaxPredictor, InputError
from totalfast.cli.main import main
from totalfast.nnunet import prediction as prediction_module
from totalfast.nnunet.export import INCOMPLETE

from ..parity.nnunet_models import SyntheticModel

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """The folder of a model with one channel, and its images."""
    model, folder = SyntheticModel(), tmp_path_factory.mktemp("single")
    return model.write(folder), model.write_images(folder / "images")


@pytest.fixture(scope="module")
def double(tmp_path_factory):
    """The folder of a model with two channels, and its images."""
    model, folder = SyntheticModel(channels=2), tmp_path_factory.mktemp("double")
    return model.write(folder), model.write_images(folder / "images")


@pytest.fixture
def predict(tmp_path, monkeypatch, capsys):
    """Run the command; return its exit code, stdout, stderr and the names of the segmentations."""
    monkeypatch.setenv("TOTALFAST_RESCUE_DIR", str(tmp_path / "rescue"))

    def run(model, images, *more, output=tmp_path / "out"):
        words = ["-i", images, "-o", output, "-m", model, "-f", "0", "-device", "cpu", *more]
        code = main(["nnunet", *map(str, words), "--disable_progress_bar"])
        printed = capsys.readouterr()
        names = sorted(p.name for p in output.glob("*.nii.gz")) if output.is_dir() else []
        return code, printed.out, printed.err, names

    return run


def copied(images, folder):
    return shutil.copytree(images, folder)


def rewrite(path, *, shape=None, affine=None):
    """Write a NIfTI file again, with another shape or affine."""
    image = nib.load(path)
    values = np.asarray(image.dataobj)
    if shape is not None:
        values = np.zeros(shape, values.dtype)
    nib.save(nib.Nifti1Image(values, image.affine if affine is None else affine), path)


def sheared(path):
    """Give a file an affine that SimpleITK refuses."""
    image = nib.load(path)
    affine = image.affine.copy()
    affine[0, 2] = 1.0
    image = nib.Nifti1Image(np.asarray(image.dataobj), affine)
    image.header["qform_code"] = 0
    data = bytearray(image.to_bytes())
    struct.pack_into("<h", data, 252, 0)
    path.write_bytes(gzip.compress(bytes(data)))


def cut(path):
    path.write_bytes(path.read_bytes()[:2000])


def damaged(path):
    data = bytearray(path.read_bytes())
    data[-8:-4] = b"\0\0\0\0"  # the checksum
    path.write_bytes(bytes(data))


def flat(path):
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((30, 40), np.int16)), path)


def four_dimensional(path):
    rewrite(path, shape=(20, 20, 10, 3))


def dangling(path):
    path.unlink()
    path.symlink_to(path.with_name("nowhere"))


def empty(path):
    path.write_bytes(b"")


def without_number(path):
    path.rename(path.with_name("case0.nii.gz"))


def nan(path, *, where=...):
    """Make voxels NaN, all of them by default, and one infinite."""
    image = nib.load(path)
    voxels = image.get_fdata(dtype=np.float32)
    voxels[where] = np.nan
    voxels[3, 3, 3] = np.inf
    nib.save(nib.Nifti1Image(voxels, image.affine), path)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (nan, "all its voxels are NaN or infinite"),
        (sheared, "can't be read: ITK only supports orthonormal direction cosines"),
        (cut, r"can't be read: it ends after \d+ of \d+ bytes"),
        (damaged, "can't be read: the gzip data are damaged"),
        (empty, "can't be read"),
        (dangling, "can't be read"),
        (flat, r"2-D \(30, 40\), but the model needs 3-D images"),
        (four_dimensional, r"3 channels, but the model needs 1: 0000 \(CT\)"),
        (without_number, "has no channel number: an image is named CASE_0000.nii.gz"),
    ],
)
def test_a_bad_case_is_named_and_the_others_are_predicted(single, predict, tmp_path, spoil, reason):
    model, images = single
    folder = copied(images, tmp_path / "in")
    spoil(folder / "case0_0000.nii.gz")
    code, out, err, names = predict(model, folder)
    assert (code, names) == (1, ["case1.nii.gz"])
    assert f"1 cases in {tmp_path / 'out'}" in out
    (line,) = err.strip().splitlines()
    assert line.startswith("ERROR: case0")
    assert re.search(reason, line), line
    # The next command does only what is missing, and fails again.
    modified_ns = (tmp_path / "out/case1.nii.gz").stat().st_mtime_ns
    code, out, _, names = predict(model, folder, "--continue_prediction")
    assert (code, names) == (1, ["case1.nii.gz"])
    assert "0 cases" in out
    assert (tmp_path / "out/case1.nii.gz").stat().st_mtime_ns == modified_ns


@pytest.mark.parametrize("ending", [".nii.gz", ".nii"])
def test_voxels_that_are_nan_are_counted(predict, tmp_path, ending):
    """SimpleITK reads them as 0."""
    model = SyntheticModel(ending=ending)
    folder, images = model.write(tmp_path), model.write_images(tmp_path / "images")
    nan(images / f"case0_0000{ending}", where=(slice(2), 0, 0))
    code, out, *_ = predict(folder, images)
    assert code == 0
    assert f"case0_0000{ending}: 3 of " in out


def test_input_of_the_network_that_is_nan_is_refused(predict, tmp_path):
    """nibabel, unlike SimpleITK, reads NaN as NaN."""
    model = SyntheticModel(reader="NibabelIO")
    folder, images = model.write(tmp_path), model.write_images(tmp_path / "images")
    nan(images / "case0_0000.nii.gz", where=(0, 0, 0))
    code, _, err, names = predict(folder, images)
    assert (code, names) == (1, ["case1.nii.gz"])
    assert "ERROR: case0 failed: the image that the network would get has NaN" in err


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_names_that_are_not_utf8_do_not_end_the_process(single, tmp_path):
    model, images = single
    folder, out = copied(images, tmp_path / "in"), tmp_path / "out"
    (folder / "case0_0000.nii.gz").rename(folder / os.fsdecode(b"\xff_0000.nii.gz"))
    shutil.copy(images / "case0_0000.nii.gz", folder / "a\nb 'c\"_0000.nii.gz")

    def run(*flags):
        words = ["-m", model, "-f", "0", "-device", "cpu", *flags]
        command = [sys.executable, "-m", "totalfast", "nnunet", *words]
        return subprocess.run(command, capture_output=True, check=False)

    done = run("-i", folder, "-o", out)
    assert done.returncode == 1
    assert b"its name is not UTF-8" in done.stderr
    assert sorted(p.name for p in out.glob("*.nii.gz")) == ["a\nb 'c\".nii.gz", "case1.nii.gz"]
    for flags in (("-i", images, "-o", os.fsencode(tmp_path) + b"/\xff"), ("-i", "", "-o", out)):
        done = run(*flags)
        assert done.returncode == 2
        assert b"needs a folder whose name is UTF-8" in done.stderr


def test_parts_share_good_and_bad_cases(single, predict, tmp_path):
    model, images = single
    folder = copied(images, tmp_path / "in")
    cut(folder / "case0_0000.nii.gz")
    assert predict(model, folder, "-num_parts", 2, "-part_id", 1)[0] == 0
    code, _, err, names = predict(model, folder, "-num_parts", 2, "-part_id", 0)
    assert (code, names) == (1, ["case1.nii.gz"])
    assert "case0 failed" in err


def test_hidden_files_folders_and_other_endings_are_no_images(single, predict, tmp_path):
    model, images = single
    folder = copied(images, tmp_path / "in")
    for name in ("._case0_0000.nii.gz", ".DS_Store", "._case0_0000.NII.GZ", "notes.txt"):
        (folder / name).write_bytes(b"\0\5\x16\7" + bytes(100))
    copied(images, folder / "older_0000.nii.gz")
    (folder / "case1_0000.nii.gz").rename(folder / "case1_0000.NII.GZ")
    code, _, err, names = predict(model, folder)
    assert (code, err) == (0, "")
    assert names == ["case0.nii.gz", "case1.nii.gz"]


def test_a_folder_without_images_of_the_kind_shows_what_it_has(single, predict, tmp_path):
    model, _ = single
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a_0000.nrrd").touch()
    code, _, err, _ = predict(model, tmp_path / "in")
    assert code == 1
    assert "no file *_0000.nii.gz; it has images with the endings .nrrd" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda f: rewrite(f, shape=(30, 20, 10)), r"same shape.*20, 36, 41.*10, 20, 30"),
        (lambda f: rewrite(f, affine=np.diag([2.0, 1.3, 2.7, 1.0])), r"same spacing.*1\.1.*2\.0"),
        (lambda f: f.unlink(), r"1 channel, but the model needs 2: 0000 \(CT\), 0001 \(CT\)"),
        (lambda f: f.rename(str(f).replace("1.nii", "2.nii")), "numbered 0000, 0002, but should"),
        (lambda f: shutil.copy(f, str(f).replace("1.nii", "1.NII")), "0000, 0001, 0001, but"),
    ],
)
def test_channels_that_do_not_fit_are_named(double, predict, tmp_path, spoil, reason):
    model, images = double
    folder = copied(images, tmp_path / "in")
    spoil(folder / "case0_0001.nii.gz")
    code, _, err, names = predict(model, folder)
    assert (code, names) == (1, ["case1.nii.gz"])
    assert "case0" in err
    assert re.search(reason, err.replace("\n", " ")), err


def test_a_first_channel_that_is_missing_is_not_replaced_by_the_second(single, predict, tmp_path):
    model, images = single
    folder = copied(images, tmp_path / "in")
    (folder / "case0_0000.nii.gz").rename(folder / "case0_0001.nii.gz")
    code, _, err, names = predict(model, folder)
    assert (code, names) == (1, ["case1.nii.gz"])
    assert "numbered 0001, but should be 0000" in err


def test_unlike_origins_are_a_warning(double, predict, tmp_path):
    model, images = double
    folder = copied(images, tmp_path / "in")
    affine = nib.load(folder / "case0_0001.nii.gz").affine.copy()
    affine[:3, 3] = 5, 6, 7
    rewrite(folder / "case0_0001.nii.gz", affine=affine)
    code, out, _, names = predict(model, folder)
    assert (code, len(names)) == (0, 2)
    (line,) = [line for line in out.splitlines() if "WARNING" in line]
    assert "case0_0000.nii.gz, case0_0001.nii.gz" in line
    assert "same origin" in line
    assert "7.0" in line


def test_outputs_that_would_replace_images_are_refused(single, predict, tmp_path):
    model, images = single
    folder = copied(images, tmp_path / "in")
    (folder / "case0_0000.nii.gz").rename(folder / "a_0000_0000.nii.gz")
    shutil.copy(folder / "case1_0000.nii.gz", folder / "a_0000.nii.gz")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    code, _, err, _ = predict(model, folder, output=folder)
    assert code == 2
    assert "would replace one of the input files" in err
    (tmp_path / "out").mkdir()
    (tmp_path / "out/case1.nii.gz").symlink_to(folder / "case1_0000.nii.gz")
    assert predict(model, folder)[0] == 2
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_an_output_that_cant_be_written_is_refused_before_any_prediction(
    single, predict, tmp_path, monkeypatch
):
    model, images = single
    monkeypatch.setattr(
        prediction_module, "predict_network_image", lambda *_, **__: pytest.fail("predicted")
    )
    (tmp_path / "out/case1.nii.gz").mkdir(parents=True)
    code, _, err, _ = predict(model, images)
    assert code == 1
    assert "is a folder" in err
    (tmp_path / "file").touch()
    assert predict(model, images, output=tmp_path / "file")[0] == 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["case1.nii.gz"]


def test_a_file_that_the_writer_truncates_is_not_delivered(single, predict, tmp_path, monkeypatch):
    """SimpleITK writes NIfTI files without an error when the disk is full."""
    write = sitk.WriteImage

    def truncated(image, path, *arguments):
        write(image, path, *arguments)
        with Path(path).open("rb+") as stream:
            stream.truncate(200)

    model, images = single
    monkeypatch.setattr(sitk, "WriteImage", truncated)
    code, _, err, names = predict(model, images)
    assert (code, names) == (1, [])
    assert INCOMPLETE in err
    assert "ERROR: case0 failed" in err


def test_memory_that_runs_out_on_the_device_moves_the_sums_to_the_cpu(single, monkeypatch):
    model, images = single
    predictor = ArgmaxPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), (0,))
    (case,) = predictor._internal_get_data_iterator_from_lists_of_filenames(
        [[str(images / "case0_0000.nii.gz")]], None, None, 1
    )
    expected = prediction_module.predict_case(predictor, case, False)
    predict, calls = prediction_module.predict_network_image, []

    def short_of_memory(image, own_model, tiling, **keywords):
        calls.append(tiling.on_device)
        if tiling.on_device:
            raise torch.OutOfMemoryError
        return predict(image, own_model, tiling, **keywords)

    monkeypatch.setattr(prediction_module, "predict_network_image", short_of_memory)
    predictor.perform_everything_on_device = True
    with pytest.raises(torch.OutOfMemoryError):  # nothing else to try on a CPU
        prediction_module.predict_case(predictor, case, False)
    assert calls == [True]
    own_model = predictor.model
    monkeypatch.setattr(prediction_module, "_own_loop", lambda *_: own_model)
    predictor.device = torch.device("meta")  # any device that is no CPU
    labels = prediction_module.predict_case(predictor, case, False)
    np.testing.assert_array_equal(labels, expected)
    assert calls[1:] == [True, True, False]  # the second with the image on the CPU


def test_a_trainer_of_the_users_own_is_found_or_named(tmp_path, predict, monkeypatch):
    model = SyntheticModel()
    folder, images = model.write(tmp_path), model.write_images(tmp_path / "in", cases=1)
    path = folder / "fold_0/checkpoint_final.pth"
    checkpoint = torch.load(path, weights_only=True)
    torch.save(checkpoint | {"trainer_name": "nnUNetTrainerOfTheTest"}, path)
    monkeypatch.delenv("nnUNet_extTrainer", raising=False)
    code, _, err, _ = predict(folder, images)
    assert code == 1
    assert "nnUNetTrainerOfTheTest, which is not installed" in err
    assert "nnUNet_extTrainer" in err
    trainers = tmp_path / "trainers/inner"
    trainers.mkdir(parents=True)
    (trainers / "__init__.py").touch()
    (trainers / "own.py").write_text(
        "from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer\n"
        "class nnUNetTrainerOfTheTest(nnUNetTrainer):\n"
        "    @staticmethod\n"
        "    def build_network_architecture(plans_manager, *arguments, **keywords):\n"
        "        print('BUILT')\n"
        "        build = nnUNetTrainer.build_network_architecture\n"
        "        return build(plans_manager, *arguments, **keywords)\n"
    )
    monkeypatch.setenv(
        "nnUNet_extTrainer", f"{tmp_path / 'none'}{os.pathsep}{tmp_path / 'trainers'}"
    )
    code, out, err, names = predict(folder, images)
    assert (code, err, names) == (0, "", ["case0.nii.gz"])
    assert "BUILT" in out


def test_without_on_failure_the_predictor_raises_the_first_error(single, tmp_path):
    model, images = single
    folder = copied(images, tmp_path / "in")
    cut(folder / "case0_0000.nii.gz")
    predictor = ArgmaxPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), (0,))
    with pytest.raises(InputError, match="case0_0000"):
        predictor.predict_from_files(str(folder), str(tmp_path / "out"))
