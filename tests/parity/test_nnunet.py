"""``ArgmaxPredictor`` and ``totalfast nnunet`` against nnU-Net, on synthetic models."""

from __future__ import annotations

import argparse
import os
import pickle
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.utils import create_lists_from_splitted_dataset_folder

from totalfast import ArgmaxPredictor, InputError
from totalfast.cli.main import main
from totalfast.cli.nnunet import build_parser
from totalfast.models.known_parts import resampling_functions
from totalfast.models.nnunet_versions import installed_version
from totalfast.nnunet import export_prediction_from_logits
from totalfast.nnunet.cases import check_channel_numbers, list_cases

from .nnunet_models import SyntheticModel

TORCH = "resample_torch_fornnunet"
TORCH_OPTIONS = (
    ("is_seg", False),
    ("force_separate_z", False),
    ("memefficient_seg_resampling", False),
)
MODELS = {
    "3-D": SyntheticModel(),
    "same spacing": SyntheticModel(spacing=(2.7, 1.3, 1.1)),
    "2-D": SyntheticModel(dims=2, patch=(24, 32), spacing=(1.5, 1.5)),
    "two channels": SyntheticModel(channels=2, normalization="CTNormalization"),
    "regions": SyntheticModel(regions=True),
    "2-D regions": SyntheticModel(dims=2, patch=(24, 32), spacing=(1.5, 1.5), regions=True),
    "ignore label": SyntheticModel(ignore=True),
    "three folds": SyntheticModel(folds=3),
    "mirroring": SyntheticModel(mirroring=(0, 1, 2)),
    "2-D mirroring": SyntheticModel(dims=2, patch=(24, 32), spacing=(1.5, 1.5), mirroring=(0, 1)),
    "separate z": SyntheticModel(spacing=(8.0, 1.5, 1.5), patch=(8, 24, 16)),
    "transposed": SyntheticModel(transpose=(2, 0, 1), spacing=(1.5, 2.0, 1.5)),
    "300 classes": SyntheticModel(classes=300),
    "cubic": SyntheticModel(options=(("order", 3),)),
    "torch": SyntheticModel(resampling=TORCH, options=TORCH_OPTIONS),
    "no resampling": SyntheticModel(resampling="no_resampling_hack", spacing=(2.7, 1.3, 1.1)),
    "masked": SyntheticModel(normalization="ZScoreNormalization", use_mask=True),
    "rescaled": SyntheticModel(normalization="RescaleTo01Normalization"),
    "residual": SyntheticModel(network="ResidualEncoderUNet"),
    "cascade": SyntheticModel(previous_stage="3d_lowres"),
    "nibabel reader": SyntheticModel(reader="NibabelIOWithReorient"),
}


@pytest.fixture(params=MODELS, scope="module")
def synthetic(request, tmp_path_factory):
    """A model, its folder, images, and the first stage's labels of a cascade."""
    model, folder = MODELS[request.param], tmp_path_factory.mktemp("nnunet")
    if model.resampling not in resampling_functions():
        pytest.skip(f"this nnU-Net has no {model.resampling}")
    images = model.write_images(folder / "images")
    previous = model.write_previous_stage(images, folder / "previous")
    return model, model.write(folder), images, previous


def predictor_of(kind, folder, **settings):
    predictor = kind(device=torch.device("cpu"), allow_tqdm=False, **settings)
    predictor.initialize_from_trained_model_folder(str(folder), None)
    return predictor


def segmentations(folder):
    return {path.name: np.asarray(nib.load(path).dataobj) for path in folder.glob("case*.nii.gz")}


def predicted(kind, folder, images, output, *, previous=None, probabilities=False):
    output.mkdir()
    predictor = predictor_of(kind, folder)
    if kind is nnUNetPredictor and not has_sequential(cascade=previous is not None):
        predict_one_by_one(predictor, images, output, previous, probabilities)
        return output
    call = {nnUNetPredictor: "predict_from_files_sequential", ArgmaxPredictor: "predict_from_files"}
    getattr(predictor, call[kind])(
        str(images),
        str(output),
        save_probabilities=probabilities,
        folder_with_segs_from_prev_stage=None if previous is None else str(previous),
    )
    return output


def has_sequential(*, cascade):
    """Whether this nnU-Net predicts files without processes; cascades only from 2.8 on."""
    version = tuple(int(part) for part in installed_version().split(".")[:3])
    return version >= ((2, 8) if cascade else (2, 5, 2))


def predict_one_by_one(predictor, images, output, previous, probabilities):
    """nnU-Net's prediction of the same files, which are read here."""
    reader = predictor.plans_manager.image_reader_writer_class()
    for files in list_cases(str(images), ".nii.gz"):
        image, properties = reader.read_images(files)
        name = Path(files[0]).name.replace("_0000.nii.gz", "")
        labels = None if previous is None else reader.read_seg(str(previous / f"{name}.nii.gz"))[0]
        predictor.predict_single_npy_array(
            image, properties, labels, str(output / name), probabilities
        )


def differing_voxels(expected, actual):
    """Number of voxels with other labels, over all files."""
    return sum(int(np.sum(actual[name] != labels)) for name, labels in expected.items())


def files_of(folder):
    return {path.name for path in folder.iterdir()}


@pytest.mark.filterwarnings("ignore")
def test_files_equal_nnunets(synthetic, tmp_path, record_property):
    _, folder, images, previous = synthetic
    theirs = predicted(nnUNetPredictor, folder, images, tmp_path / "theirs", previous=previous)
    ours = predicted(ArgmaxPredictor, folder, images, tmp_path / "ours", previous=previous)
    expected, actual = segmentations(theirs), segmentations(ours)
    assert set(expected) == set(actual) == {"case0.nii.gz", "case1.nii.gz"}
    record_property("voxels", sum(labels.size for labels in expected.values()))
    record_property("differing_voxels", differing_voxels(expected, actual))
    for name, labels in expected.items():
        np.testing.assert_array_equal(actual[name], labels)
        assert actual[name].dtype == labels.dtype
        assert len(np.unique(labels)) > 1
        one, two = nib.load(theirs / name), nib.load(ours / name)
        assert np.array_equal(one.affine, two.affine)
    if has_sequential(cascade=previous is not None):
        assert files_of(theirs) == files_of(ours)


@pytest.fixture(scope="module")
def simple(tmp_path_factory):
    """A region-based model, its folder and its images."""
    model, folder = SyntheticModel(regions=True, mirroring=(2,)), tmp_path_factory.mktemp("simple")
    return model, model.write(folder), model.write_images(folder / "images")


@pytest.mark.filterwarnings("ignore")
def test_probabilities_equal_nnunets(simple, tmp_path):
    _, folder, images = simple
    theirs = predicted(nnUNetPredictor, folder, images, tmp_path / "a", probabilities=True)
    ours = predicted(ArgmaxPredictor, folder, images, tmp_path / "b", probabilities=True)
    if has_sequential(cascade=False):
        assert files_of(theirs) == files_of(ours)
    for name in ("case0", "case1"):
        one, two = (np.load(f / f"{name}.npz")["probabilities"] for f in (theirs, ours))
        np.testing.assert_array_equal(one, two)
        one, two = (pickle.loads((f / f"{name}.pkl").read_bytes()) for f in (theirs, ours))  # noqa: S301
        assert set(one) == set(two)
        for key, value in one.items():
            np.testing.assert_equal(two[key], value)
    np.testing.assert_equal(segmentations(ours), segmentations(theirs))


@pytest.mark.filterwarnings("ignore")
def test_predictions_from_arrays_equal_nnunets(simple):
    _, folder, images = simple
    theirs, ours = (predictor_of(kind, folder) for kind in (nnUNetPredictor, ArgmaxPredictor))
    reader = ours.plans_manager.image_reader_writer_class()
    pairs = [reader.read_images((str(images / f"case{n}_0000.nii.gz"),)) for n in (0, 1)]
    expected = [
        theirs.predict_single_npy_array(image, dict(properties), None, None, False)
        for image, properties in pairs
    ]
    single = ours.predict_single_npy_array(pairs[0][0], dict(pairs[0][1]), None, None, False)
    np.testing.assert_array_equal(single, expected[0])
    several = ours.predict_from_list_of_npy_arrays(
        [image for image, _ in pairs], None, [dict(properties) for _, properties in pairs], None
    )
    for one, two in zip(several, expected, strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("probabilities", [False, True])
def test_export_has_nnunets_interface_and_files(simple, tmp_path, probabilities):
    from nnunetv2.inference import export_prediction

    _, folder, images = simple
    predictor = predictor_of(ArgmaxPredictor, folder)
    iterator = predictor._internal_get_data_iterator_from_lists_of_filenames(
        [[str(images / "case0_0000.nii.gz")]], None, None, 1
    )
    (case,) = iterator
    logits = predictor.predict_logits_from_preprocessed_data(case["data"])
    for name, export in (
        ("theirs", export_prediction.export_prediction_from_logits),
        ("ours", export_prediction_from_logits),
    ):
        (tmp_path / name).mkdir()
        export(
            logits.numpy(),
            case["data_properties"],
            predictor.configuration_manager,
            predictor.plans_manager,
            predictor.dataset_json,
            str(tmp_path / name / "case0"),
            probabilities,
        )
    np.testing.assert_equal(segmentations(tmp_path / "ours"), segmentations(tmp_path / "theirs"))
    assert files_of(tmp_path / "ours") == files_of(tmp_path / "theirs")


def test_cases_of_a_folder_equal_nnunets(tmp_path):
    names = "b_0001.nii.gz b_0000.nii.gz a_1_0000.nii.gz a_0000.nii.gz a10_0000.nii.gz"
    for name in [*names.split(), "a_0000.nii", "notes.txt"]:
        (tmp_path / name).touch()
    expected = create_lists_from_splitted_dataset_folder(str(tmp_path), ".nii.gz", num_processes=1)
    assert list_cases(str(tmp_path), ".nii.gz") == expected
    assert len(expected) == 4
    (tmp_path / "patient.nii.gz").touch()  # nnU-Net fails with an IndexError
    unnumbered = list_cases(str(tmp_path), ".nii.gz")[-1]
    with pytest.raises(InputError, match=r"patient\.nii\.gz has no channel number"):
        check_channel_numbers(unnumbered, ".nii.gz")


@pytest.mark.filterwarnings("ignore")
def test_no_process_is_started(simple, tmp_path, monkeypatch):
    _, folder, images = simple
    for start in ("multiprocessing.process.BaseProcess.start", "subprocess.Popen"):
        monkeypatch.setattr(start, lambda *_, **__: pytest.fail("started a process"))
    predicted(ArgmaxPredictor, folder, images, tmp_path / "ours", probabilities=True)


@pytest.mark.filterwarnings("ignore")
def test_manual_initialization_uses_the_given_network(simple):
    _, folder, _ = simple
    loaded = predictor_of(ArgmaxPredictor, folder)
    manual = ArgmaxPredictor(device=torch.device("cpu"), allow_tqdm=False)
    manual.manual_initialization(
        loaded.network,
        loaded.plans_manager,
        loaded.configuration_manager,
        None,
        loaded.dataset_json,
        loaded.trainer_name,
        loaded.allowed_mirroring_axes,
    )
    image = torch.randn((1, 20, 30, 20), generator=torch.Generator().manual_seed(0))
    expected = loaded.predict_labels_from_preprocessed_data(image)
    assert torch.equal(manual.predict_labels_from_preprocessed_data(image), expected)


def test_files_of_the_command_equal_those_of_nnunets_command(simple, tmp_path, capsys):
    _, folder, images = simple
    flags = ["-i", images, "-m", folder, "-f", "0", "-step_size", "0.7", "-device", "cpu"]
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    script = tmp_path / "nnunet.py"
    script.write_text(
        "from nnunetv2.inference.predict_from_raw_data import predict_entry_point_modelfolder\n"
        "if __name__ == '__main__':\n"
        "    predict_entry_point_modelfolder()\n"
    )
    done = subprocess.run(
        [sys.executable, script, *flags, "-o", theirs, "-npp", "1", "-nps", "1"],
        env=os.environ | {"TMPDIR": "/tmp"},  # noqa: S108 - sockets need short paths
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert main(["nnunet", *map(str, flags), "-o", str(ours)]) == 0
    assert f"2 cases in {ours}" in capsys.readouterr().out
    assert files_of(theirs) == files_of(ours)
    np.testing.assert_equal(segmentations(ours), segmentations(theirs))
    # Existing results are not written again.
    (ours / "case0.nii.gz").unlink()
    modified_ns = (ours / "case1.nii.gz").stat().st_mtime_ns
    assert main(["nnunet", *map(str, flags), "-o", str(ours), "--continue_prediction"]) == 0
    assert "1 cases" in capsys.readouterr().out
    assert (ours / "case1.nii.gz").stat().st_mtime_ns == modified_ns
    np.testing.assert_equal(segmentations(ours), segmentations(theirs))


@pytest.mark.filterwarnings("ignore")
def test_clear_errors(simple, tmp_path, capsys):
    _, folder, images = simple
    common = ["nnunet", "-o", str(tmp_path / "out")]
    assert main([*common, "-i", str(images)]) == 2
    assert "-m FOLDER" in capsys.readouterr().err
    assert main([*common, "-i", str(tmp_path / "none"), "-m", str(folder)]) == 1
    assert "is no folder" in capsys.readouterr().err
    empty = tmp_path / "empty"
    empty.mkdir()
    assert main([*common, "-i", str(empty), "-m", str(folder), "-f", "0"]) == 1
    assert "no image of the model's kind" in capsys.readouterr().err
    assert main([*common, "-i", str(images), "-m", str(folder), "-f", "3"]) == 1
    assert "fold_3" in capsys.readouterr().err
    (empty / "case0_0000.nii.gz").write_bytes(b"no image")
    assert main([*common, "-i", str(empty), "-m", str(folder), "-f", "0"]) == 1
    assert "can't be read" in capsys.readouterr().err
    assert segmentations(tmp_path / "out") == {}
    predictor = predictor_of(ArgmaxPredictor, folder)
    two_channels = np.zeros((2, 8, 8, 8), np.float32)
    with pytest.raises(InputError, match="needs 1 input channels, not 2"):
        predictor.predict_single_npy_array(two_channels, {"spacing": [1, 1, 1]})


@pytest.mark.parametrize("entry", ["predict_entry_point", "predict_entry_point_modelfolder"])
def test_flags_and_their_defaults_equal_nnunets(entry, monkeypatch):
    from nnunetv2.inference import predict_from_raw_data

    class ParserError(Exception):
        pass

    def parse(parser, *_):
        raise ParserError(parser)

    with monkeypatch.context() as patched:
        patched.setattr(argparse.ArgumentParser, "parse_args", parse)
        with pytest.raises(ParserError) as raised:
            getattr(predict_from_raw_data, entry)()
    ours = {flag: action for action in build_parser()._actions for flag in action.option_strings}
    for action in raised.value.args[0]._actions:
        for flag in action.option_strings:
            assert flag in ours
            own = ours[flag]
            assert type(own) is type(action)
            assert (own.type or str, own.nargs) == (action.type or str, action.nargs)
            # Without a CUDA device our command uses the CPU; -m and -d exclude each other.
            if flag == "-device":
                assert own.default is None
            elif flag == "-f":
                assert [int(fold) for fold in own.default] == list(action.default)
            elif flag not in ("-m", "-d", "-c"):
                assert (own.default, own.required) == (action.default, action.required)
