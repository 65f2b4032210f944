"""Unchanged programs that use nnU-Net in Python run on totalfast, with nnU-Net's results."""

from __future__ import annotations

import functools
import os
import pickle
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from nnunetv2.inference import export_prediction, predict_from_raw_data
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

import totalfast
from totalfast.nnunet import originals
from totalfast.nnunet.predictor import METHODS, ArgmaxPredictor

from .nnunet_models import SyntheticModel

pytestmark = pytest.mark.filterwarnings("ignore")
CPU = torch.device("cpu")
FUNCTIONS = (
    "export_prediction_from_logits",
    "convert_predicted_logits_to_segmentation_with_correct_shape",
)


class EarlySubclass(nnUNetPredictor):
    """A subclass that exists before the patch."""

    def _internal_maybe_mirror_and_predict(self, x):
        return super()._internal_maybe_mirror_and_predict(x).flip(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folders of a model and of its images."""
    synthetic, folder = SyntheticModel(regions=True), tmp_path_factory.mktemp("model")
    return synthetic.write(folder), synthetic.write_images(folder / "images", cases=1)


@pytest.fixture
def patched():
    totalfast.patch_nnunet()
    yield
    totalfast.unpatch_nnunet()


def labels(predictor, model, *, probabilities=False):
    folder, images = model
    predictor.initialize_from_trained_model_folder(str(folder), (0,))
    reader = predictor.plans_manager.image_reader_writer_class()
    image, properties = reader.read_images((str(images / "case0_0000.nii.gz"),))
    return predictor.predict_single_npy_array(image, properties, None, None, probabilities)


def new(kind):
    return kind(device=CPU, allow_tqdm=False)


def test_predictors_give_the_same_results_and_every_change_is_undone(model):
    before = {name: vars(nnUNetPredictor)[name] for name in METHODS}
    early = new(nnUNetPredictor)
    expected = [
        labels(new(nnUNetPredictor), model),
        labels(new(nnUNetPredictor), model, probabilities=True),
        labels(new(EarlySubclass), model),
    ]
    totalfast.patch_nnunet()
    totalfast.patch_nnunet()
    try:
        assert not [name for name in METHODS if vars(nnUNetPredictor)[name] is before[name]]
        actual = [
            labels(early, model),
            labels(new(nnUNetPredictor), model, probabilities=True),
            labels(new(EarlySubclass), model),
        ]
        assert isinstance(new(ArgmaxPredictor), nnUNetPredictor)
        np.testing.assert_equal(labels(new(ArgmaxPredictor), model), expected[0])
    finally:
        totalfast.unpatch_nnunet()
    np.testing.assert_equal(actual, expected)
    assert {name: vars(nnUNetPredictor)[name] for name in METHODS} == before
    np.testing.assert_equal(labels(early, model), expected[0])  # made before, used after
    assert originals.replaced == {}


def test_functions_are_replaced_where_programs_have_imported_them(monkeypatch):
    client = types.ModuleType("client_of_nnunet")
    before = {name: getattr(export_prediction, name) for name in FUNCTIONS}
    vars(client).update(before)
    monkeypatch.setitem(sys.modules, client.__name__, client)
    totalfast.patch_nnunet()
    try:
        for name in FUNCTIONS:
            ours = getattr(client, name)
            assert ours is not before[name]
            assert ours is getattr(export_prediction, name) is getattr(predict_from_raw_data, name)
            assert pickle.loads(pickle.dumps(ours)) is ours  # noqa: S301 - for worker processes
    finally:
        totalfast.unpatch_nnunet()
    for name in FUNCTIONS:
        for module in (client, export_prediction, predict_from_raw_data):
            assert getattr(module, name) is before[name]


def test_a_wrapper_of_a_replaced_function(model, patched, monkeypatch):
    expected = labels(new(nnUNetPredictor), model, probabilities=True)
    with monkeypatch.context() as program:
        for module in (export_prediction, predict_from_raw_data):
            ours = getattr(module, FUNCTIONS[1])
            program.setattr(module, FUNCTIONS[1], lambda *a, ours=ours, **k: ours(*a, **k))
        actual = labels(new(nnUNetPredictor), model, probabilities=True)
    np.testing.assert_equal(actual, expected)


def test_replaced_functions_return_nnunets_results(model, patched):
    predictor = new(nnUNetPredictor)
    labels(predictor, model)
    logits = np.random.default_rng(0).normal(size=(3, 20, 24, 22)).astype(np.float32)
    properties = {
        "spacing": (2.7, 1.3, 1.1),
        "shape_before_cropping": (16, 30, 24),
        "bbox_used_for_cropping": [[0, 15], [2, 30], [0, 24]],
        "shape_after_cropping_and_before_resampling": (15, 28, 24),
    }
    arguments = (
        logits,
        predictor.plans_manager,
        predictor.configuration_manager,
        predictor.label_manager,
        properties,
    )
    name = FUNCTIONS[1]
    for probabilities in (False, True):
        expected = originals.replaced[name](*arguments, probabilities)
        actual = getattr(export_prediction, name)(*arguments, probabilities)
        np.testing.assert_equal(actual, expected)


LOOK = """\
def look_into_processes():
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print("child", *pool.map(methods_of, [0])[0])
    name = "program_on_nnunet"
    code = f"import {name}; print('grandchild', *{name}.methods_of())"
    print(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout)
    from nnunetv2.training.nnUNetTrainer import nnUNetTrainer
    print("trainer", nnUNetTrainer.export_prediction_from_logits.__code__.co_filename)

"""
PROGRAM = """\
import multiprocessing, os, subprocess, sys
import numpy as np

def methods_of(_=None):
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor as kind
    return kind.predict_from_data_iterator.__module__, kind.predict_from_files.__module__

{look}
if __name__ == "__main__":
    assert "torch" not in sys.modules, "imported too early"
    {order}
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    print("here", *methods_of())
    if {everything}:
        look_into_processes()
    import torch
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder({model!r}, (0,))
    reader = predictor.plans_manager.image_reader_writer_class()
    image, properties = reader.read_images(({image!r},))
    approximation = {{"use_cropped_logits_resampling": True}} if {cropped} else {{}}
    np.save("labels.npy", predictor.predict_single_npy_array(image, properties, **approximation))
"""
OURS, NNUNETS = "totalfast.nnunet.predictor", "nnunetv2.inference.predict_from_raw_data"
TOTALSEGMENTATORS = "totalsegmentator.nnunet_runtime_patches"


@pytest.mark.parametrize(
    ("order", "cropped"),
    [("", False), ("import totalsegmentator.nnunet", True)],
    ids=["nnU-Net", "TotalSegmentator"],
)
def test_a_program_and_its_processes_are_patched(order, cropped, model, tmp_path):
    """Also if TotalSegmentator is imported, which replaces the same methods."""
    folder, images = model
    (tmp_path / "environment").mkdir()
    (tmp_path / "environment/sitecustomize.py").write_text("print('own sitecustomize')")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path / "environment"), ""])}
    environment["PYTHONPATH"] += os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH")]))
    results = []
    for way in ([], ["-m", "totalfast.patch"]):
        (tmp_path / "program_on_nnunet.py").write_text(
            PROGRAM.format(
                order=order,
                model=str(folder),
                image=str(images / "case0_0000.nii.gz"),
                cropped=cropped,
                everything=bool(way) and not cropped,
                look=LOOK,
            )
        )
        done = subprocess.run(
            [sys.executable, *way, "program_on_nnunet.py"],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        results.append((done.stdout, np.load(tmp_path / "labels.npy")))
    (_, expected), (printed, actual) = results
    np.testing.assert_array_equal(actual, expected)
    files = TOTALSEGMENTATORS if cropped else NNUNETS
    assert f"here {OURS} {files}" in printed
    if cropped:
        return
    assert f"child {OURS} {NNUNETS}" in printed
    assert f"grandchild {OURS} {NNUNETS}" in printed
    trainers = next(line for line in printed.splitlines() if line.startswith("trainer"))
    assert "totalfast" not in trainers
    assert printed.count("own sitecustomize") >= 3


def test_methods_that_a_program_has_replaced_stay(model, monkeypatch, caplog):
    name = "predict_logits_from_preprocessed_data"
    method = getattr(nnUNetPredictor, name)
    unchanged = labels(new(nnUNetPredictor), model)

    @functools.wraps(method)
    def changed(self, data):
        return method(self, data).flip(0)

    monkeypatch.setattr(nnUNetPredictor, name, changed)
    expected = labels(new(nnUNetPredictor), model)
    totalfast.patch_nnunet()
    try:
        assert vars(nnUNetPredictor)[name] is changed
        np.testing.assert_array_equal(labels(new(nnUNetPredictor), model), expected)
    finally:
        totalfast.unpatch_nnunet()
    assert f"nnU-Net's {name} is not patched" in caplog.text
    assert (unchanged != expected).any()


def test_wrappers_made_meanwhile_work_after_the_end(model, monkeypatch):
    name = "predict_logits_from_preprocessed_data"
    before = vars(nnUNetPredictor)[name]
    expected = labels(new(nnUNetPredictor), model)
    totalfast.patch_nnunet()
    ours = vars(nnUNetPredictor)[name]
    monkeypatch.setattr(nnUNetPredictor, name, lambda self, data: ours(self, data))
    totalfast.unpatch_nnunet()
    predictor = new(nnUNetPredictor)
    predictor.initialize_from_trained_model_folder(str(model[0]), (0,))
    predictor.network.register_forward_hook(lambda *_: None)  # nnU-Net's loop runs
    reader = predictor.plans_manager.image_reader_writer_class()
    image, properties = reader.read_images((str(model[1] / "case0_0000.nii.gz"),))
    actual = predictor.predict_single_npy_array(image, properties)
    np.testing.assert_array_equal(actual, expected)
    monkeypatch.setattr(nnUNetPredictor, name, before)


SCRIPT = """\
import atexit, os, pickle, sys, threading
from pathlib import Path

class Own:
    pass

print("file", Path(__file__).is_absolute(), __package__, sys.modules["__main__"].Own is Own)
print("words", sys.argv[1:])
atexit.register(lambda: print("pickled", type(pickle.loads(pickle.dumps(Own()))) is Own))
if "child" not in sys.argv:
    import subprocess
    subprocess.run([sys.executable, "-c", "import in_this_folder; print('found')"], check=True)
"""


@pytest.mark.parametrize("call", [["-m", "main_of_test"], ["-mmain_of_test"], ["main_of_test.py"]])
def test_programs_run_as_python_runs_them(call, tmp_path):
    (tmp_path / "main_of_test.py").write_text(SCRIPT)
    (tmp_path / "in_this_folder.py").write_text("")
    folders = os.pathsep.join([os.environ.get("PYTHONPATH", ""), ""])  # "" is this folder
    results = [
        subprocess.run(
            [sys.executable, *way, *call, "a", "--", "-h", "-m", "b"],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": folders},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for way in ([], ["-m", "totalfast.patch"])
    ]
    expected, actual = ("".join(sorted(text.splitlines(keepends=True))) for text in results)
    if call[0].startswith("-m"):  # runpy puts the former main module back before the end
        expected = expected.replace("pickled True\n", "")
        actual = actual.replace("pickled True\n", "")
    assert actual == expected


def test_a_folder_with_the_name_of_a_command(tmp_path):
    (tmp_path / "totalfast").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "totalfast.patch", "totalfast", "--version"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert totalfast.__version__ in done.stdout, done.stderr


def test_a_command_that_a_package_installs(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "totalfast.patch", "totalfast", "--version"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert totalfast.__version__ in done.stdout
    unknown = subprocess.run(
        [sys.executable, "-m", "totalfast.patch", "no_such_command"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert unknown.returncode == 2
    assert "no_such_command" in unknown.stderr
