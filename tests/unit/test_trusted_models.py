"""Names in a model's files: only known parts become classes and functions, unless it is trusted."""

from __future__ import annotations

import builtins
import importlib
import json
import os
import pydoc
import subprocess
import sys

import pytest
import torch

from totalfast import ArgmaxPredictor, WeightsError
from totalfast.cli.main import main
from totalfast.models.known_parts import BLOCKS, LAYERS, layer_paths, resampling_functions
from totalfast.models.loading import load_model
from totalfast.models.model_files import Entry

from .model_folders import checkpoint, dataset, plans, write

CPU = torch.device("cpu")

MODULE = """
import pathlib
pathlib.Path(__file__).with_name("imported").touch()
from torch.nn import ReLU as Layer
from dynamic_network_architectures.architectures.unet import PlainConvUNet as Network
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """Path of a file that exists after a module named ``own_parts`` was imported."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "own_parts.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(folder))
    yield folder / "imported"
    sys.modules.pop("own_parts", None)


def network_of(content, name="3d_fullres"):
    return content["configurations"][name]["architecture"]


def set_in_kwargs(key, value, *, imported=True):
    def change(content):
        network_of(content)["arch_kwargs"][key] = value
        required = network_of(content)["_kw_requires_import"]
        if imported and key not in required:
            required.append(key)
        elif not imported and key in required:
            required.remove(key)

    return change


def set_in_network(key, value):
    return lambda content: network_of(content).__setitem__(key, value)


def set_in_base(key, value):
    return lambda content: content["configurations"]["base"].__setitem__(key, value)


def set_in_plans(key, value):
    return lambda content: content.__setitem__(key, value)


def add_configuration(**values):
    return lambda content: content["configurations"].__setitem__("other", values)


def os_system_with_a_command(content):
    kwargs = network_of(content)["arch_kwargs"]
    kwargs["nonlin"], kwargs["nonlin_kwargs"] = "os.system", {"command": "true"}


TRICKS = (
    "os.system",
    "own_parts.Layer",
    "torch.nn.modules.linear.os.system",
    "torch.nn.Module.__init__",
    "torch.nn.modules.conv.torch.hub.load",
    "torch.nn.functional.relu",
    "torch.nn.Linear",
    "torch.nn.Sequential",
    "torch.nn.LeakyReLU.forward",
    "torch.nn.LeakyReLU ",
    "torch.nn.\nLeakyReLU",
    " torch.nn.LeakyReLU",
    "torch.nn..LeakyReLU",
    "torch.nn.LeakyReLU.",
    "torch/nn/LeakyReLU",
    "torch.nn.Leaky\u200bReLU",
    "torch.nn.\uff2ceakyReLU",
    "torch.nn.LeakyRe\u041bU",
    "LeakyReLU",
    "",
    3,
    True,
    ["torch.nn.LeakyReLU"],
    {"torch.nn.LeakyReLU": 1},
)


def changes():
    """Yield a name and a change of plans that makes nnU-Net import or call something."""
    for trick in TRICKS:
        for key in ("nonlin", "conv_op", "norm_op", "dropout_op"):
            yield f"{key} {trick!r}", set_in_kwargs(key, trick)
            yield f"{key} not to import {trick!r}", set_in_kwargs(key, trick, imported=False)
        yield f"new keyword {trick!r}", set_in_kwargs("own", trick)
        for key, change in (
            ("network_class_name", set_in_network),
            ("preprocessor_name", set_in_base),
            ("resampling_fn_data", set_in_base),
            ("resampling_fn_seg", set_in_base),
            ("resampling_fn_probabilities", set_in_base),
            ("image_reader_writer", set_in_plans),
            ("label_manager", set_in_plans),
        ):
            yield f"{key} {trick!r}", change(key, trick)
        yield f"scheme {trick!r}", set_in_base("normalization_schemes", [trick])
    for path in (
        "own_parts.Network",
        "dynamic_network_architectures.architectures.unet.torch.hub.load",
        "dynamic_network_architectures.architectures.unet.test_submodules_loadable",
        "dynamic_network_architectures.architectures.unet.InitWeights_He",
        "dynamic_network_architectures.architectures.own_parts.Network",
        "dynamic_network_architectures.architectures.unet.PlainConvUNet\n",
        "dynamic_network_architectures.architectures..unet.PlainConvUNet",
    ):
        yield f"network {path!r}", set_in_network("network_class_name", path)
    yield "layer of another kind", set_in_kwargs("conv_op", "torch.nn.LeakyReLU")
    yield "os.system with a command", os_system_with_a_command
    yield "keywords of a layer", set_in_kwargs("nonlin_kwargs", {"own": 1}, imported=False)
    yield "device of a layer", set_in_kwargs("norm_op_kwargs", {"device": "cpu"}, imported=False)
    yield "keyword's value", set_in_kwargs("nonlin_kwargs", {"inplace": "os"}, imported=False)
    yield "keywords of a function", set_in_base("resampling_fn_data_kwargs", {"fn": "os.system"})
    yield "nnU-Net's imports", set_in_base("preprocessor_name", "multiprocessing")
    yield "nnU-Net's abstract class", set_in_plans("image_reader_writer", "BaseReaderWriter")
    yield (
        "another configuration",
        add_configuration(inherits_from="3d_fullres", preprocessor_name="os"),
    )
    yield (
        "another configuration's network",
        add_configuration(
            architecture={
                "network_class_name": "os.system",
                "arch_kwargs": {},
                "_kw_requires_import": [],
            }
        ),
    )


CHANGES = dict(changes())


def test_no_name_but_known_parts_is_imported_or_called(tmp_path, monkeypatch, own_module):
    """All tricks in one test, so that the modules of nnU-Net are imported once."""
    write(tmp_path, plans())
    load_model(tmp_path, folds=(0,), device=CPU)
    content, located = checkpoint(), []
    real_import, locate = builtins.__import__, pydoc.locate
    monkeypatch.setattr(pydoc, "locate", lambda *names: located.append(names) or locate(*names))

    def watch(name, *arguments, **keywords):
        assert not name.startswith("own_parts"), "an unknown module was imported"
        return real_import(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", watch)
    monkeypatch.setattr(os, "system", lambda *_: pytest.fail("a command was run"))
    for name, change in CHANGES.items():
        changed = plans()
        change(changed)
        write(tmp_path, changed, content=content)
        with pytest.raises(WeightsError) as error:
            load_model(tmp_path, folds=(0,), device=CPU)
        assert str(tmp_path / "plans.json") in str(error.value), name
        assert located == [], name
        assert not own_module.exists(), name


def test_message_names_key_value_and_way_out(tmp_path):
    changed = plans()
    os_system_with_a_command(changed)
    write(tmp_path, changed)
    with pytest.raises(WeightsError) as error:
        load_model(tmp_path, folds=(0,), device=CPU)
    message = str(error.value)
    assert "configurations.3d_fullres.architecture.arch_kwargs.nonlin is 'os.system'" in message
    assert "--trust-model" in message
    assert "trust_model=True" in message
    assert "Copy" not in message


@pytest.mark.parametrize("key", [*LAYERS, "block"])
def test_known_layers_exist_and_are_found_under_their_paths(key):
    paths = layer_paths(key)
    assert len(paths) >= 2
    for path, name in paths.items():
        assert pydoc.locate(path).__name__ == name
        assert issubclass(pydoc.locate(path), torch.nn.Module)
    assert set(BLOCKS) == set(layer_paths("block"))


def test_known_parts_are_those_that_nnunet_finds():
    from nnunetv2.imageio.reader_writer_registry import LIST_OF_IO_CLASSES
    from nnunetv2.preprocessing.resampling.utils import recursive_find_resampling_fn_by_name

    from totalfast.models.known_parts import _classes

    readers = _classes("nnunetv2", "imageio")
    assert {reader.__name__ for reader in LIST_OF_IO_CLASSES} <= readers
    schemes = _classes("nnunetv2", "preprocessing/normalization")
    module = importlib.import_module(
        "nnunetv2.preprocessing.normalization.default_normalization_schemes"
    )
    classes = module.ImageNormalization.__subclasses__()
    assert schemes == {
        scheme.__name__ for scheme in classes if scheme.__module__ == module.__name__
    }
    assert "DefaultPreprocessor" in _classes("nnunetv2", "preprocessing/preprocessors")
    assert len(resampling_functions()) >= 3
    for name in resampling_functions():
        assert callable(recursive_find_resampling_fn_by_name(name))


@pytest.mark.parametrize(
    "change",
    [
        set_in_kwargs("nonlin", "torch.nn.modules.activation.GELU"),
        set_in_kwargs("norm_op", "torch.nn.InstanceNorm3d"),
        set_in_kwargs("dropout_op", "torch.nn.Dropout3d"),
        # The module that old versions of nnU-Net wrote, which is gone.
        set_in_network(
            "network_class_name", "dynamic_network_architectures.architectures.plain.PlainConvUNet"
        ),
        set_in_base("normalization_schemes", ["ZScoreNormalization"]),
        set_in_plans("image_reader_writer", "NibabelIOWithReorient"),
        set_in_plans("experiment_planner_used", "MyOwnPlanner"),
        lambda content: content.pop("label_manager"),
    ],
)
def test_known_parts_are_allowed_and_nothing_is_printed(change, tmp_path, capsys):
    changed = plans()
    change(changed)
    kwargs = network_of(changed)["arch_kwargs"]
    kwargs["dropout_op_kwargs"] = {"p": 0.1, "inplace": True} if kwargs["dropout_op"] else None
    kwargs["nonlin_kwargs"] = {} if "GELU" in kwargs["nonlin"] else kwargs["nonlin_kwargs"]
    # A dropout layer changes the names of the weights.
    content = checkpoint(network_of(changed)) if kwargs["dropout_op"] else None
    write(tmp_path, changed, content=content)
    assert load_model(tmp_path, folds=(0,), device=CPU).heads == 3
    assert capsys.readouterr() == ("", "")


def test_own_parts_of_a_trusted_model_are_imported(tmp_path, own_module):
    changed = plans()
    network_of(changed)["arch_kwargs"] |= {"nonlin": "own_parts.Layer"}
    network_of(changed)["network_class_name"] = "own_parts.Network"
    write(tmp_path / "model", changed)
    with pytest.raises(WeightsError):
        load_model(tmp_path / "model", folds=(0,), device=CPU)
    assert not own_module.exists()
    predictor = ArgmaxPredictor(device=CPU, allow_tqdm=False, trust_model=True)
    predictor.initialize_from_trained_model_folder(str(tmp_path / "model"), (0,))
    assert own_module.exists()
    assert "ReLU" in str(predictor.network)


def test_command_refuses_unknown_parts_and_takes_the_flag(tmp_path, own_module, capsys):
    import nibabel as nib
    import numpy as np

    changed = plans()
    network_of(changed)["arch_kwargs"] |= {"nonlin": "own_parts.Layer"}
    folder = write(tmp_path / "model", changed)
    (tmp_path / "in").mkdir()
    image = nib.Nifti1Image(np.zeros((9, 8, 8), np.int16), np.diag([3, 3, 3, 1]))
    nib.save(image, tmp_path / "in" / "a_0000.nii.gz")
    words = ["nnunet", "-i", tmp_path / "in", "-o", tmp_path / "out", "-m", folder, "-f", "0"]
    words = [*map(str, words), "-device", "cpu", "--disable_tta", "--disable_progress_bar"]
    assert main(words) == 1
    captured = capsys.readouterr()
    assert "nonlin is 'own_parts.Layer'" in captured.err
    assert not own_module.exists()
    assert main([*words, "--trust-model"]) == 0
    assert own_module.exists()
    assert (tmp_path / "out" / "a.nii.gz").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nnUNetTrainerOfSomebody", "nnUNetTrainerOfSomebody, which is not installed. Install"),
        ("os", "os, which is not installed"),
        ("torch", "torch, which is not installed"),
        ("os.system", "which is no name"),
        ("nnUNetTrainer\n", "which is no name"),
        ("nnUNetTr\u0430iner", "which is no name"),
        ("", "which is no name"),
    ],
)
def test_trainers_that_are_not_installed(name, message, tmp_path, monkeypatch):
    monkeypatch.delenv("nnUNet_extTrainer", raising=False)
    write(tmp_path, plans(), content=checkpoint() | {"trainer_name": name})
    with pytest.raises(WeightsError, match=message) as error:
        load_model(tmp_path, folds=(0,), device=CPU)
    assert "Copy" not in str(error.value)


def test_trainers_in_the_users_folder_are_found(tmp_path, monkeypatch):
    folder = tmp_path / "trainers"
    folder.mkdir()
    (folder / "own_trainer.py").write_text(
        "from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer\n"
        "class OwnTrainer(nnUNetTrainer):\n    pass\n"
    )
    monkeypatch.setenv("nnUNet_extTrainer", str(folder))
    write(tmp_path / "model", plans(), content=checkpoint() | {"trainer_name": "OwnTrainer"})
    model = load_model(tmp_path / "model", folds=(0,), device=CPU)
    assert model.trainer_name == "OwnTrainer"


def test_entries_name_their_place(tmp_path):
    entry = Entry(tmp_path / "a.json", "", {"a": {"b": [1, "x"]}})
    with pytest.raises(
        WeightsError, match=r"a\.json: a\.b\[1\] is 'x', but must be a whole number"
    ):
        entry.item("a").item("b").items((2,))[1].whole(0, 3)
    with pytest.raises(WeightsError, match=r"a\.json: a\.c is missing"):
        entry.item("a").item("c")
    with pytest.raises(WeightsError, match="must be a number from 0 to 1"):
        Entry(tmp_path, "a", 10**400).number(0, 1)


SCRIPT = """
import sys, threading, time
import torch, numpy
from pathlib import Path

class Slow:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("nnunetv2"):
            time.sleep(0.02)
        return None

sys.meta_path.insert(0, Slow())
done = threading.Event()

def lines():
    number = 0
    while not done.is_set() or number < 50:
        print("line", number, flush=True)
        number += 1
        time.sleep(0.005)

from totalfast.models.loading import load_model
thread = threading.Thread(target=lines)
thread.start()
try:
    load_model(Path(sys.argv[1]), folds=(0,), device=torch.device("cpu"))
finally:
    done.set()
    thread.join()
assert "nnunetv2.utilities.plans_handling.plans_handler" in sys.modules
"""


@pytest.mark.parametrize("old", [False, True])
def test_lines_of_other_threads_are_printed_while_a_model_is_loaded(old, tmp_path):
    folder = write(tmp_path, plans(old=old), dataset())
    environment = {k: v for k, v in os.environ.items() if not k.startswith("nnUNet_")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, folder],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    printed = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert len(printed) >= 50
    assert printed == [f"line {number}" for number in range(len(printed))]
    assert done.stderr == ""


def test_importing_nnunet_prints_nothing():
    """The least version of nnU-Net that is supported; older ones print at import."""
    code = (
        "import nnunetv2.inference.predict_from_raw_data, nnunetv2.utilities.find_objects\n"
        "import nnunetv2.training.nnUNetTrainer.nnUNetTrainer, totalfast.nnunet.predictor\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("nnUNet_")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("", "")


def test_predictor_prints_nothing(tmp_path, capsys, caplog):
    folder = write(tmp_path, plans())
    with caplog.at_level("DEBUG", logger="totalfast"):
        predictor = ArgmaxPredictor(device=CPU, allow_tqdm=False)
        predictor.initialize_from_trained_model_folder(str(folder), (0,))
        lists = predictor._manage_input_and_output_lists([["a_0000.nii.gz"]], str(tmp_path))
    assert lists[1] == [str(tmp_path / "a")]
    assert capsys.readouterr() == ("", "")
    assert "There are 1 cases in the source folder" in caplog.text


def test_filters_of_warnings_and_stdout_stay_as_they_are(tmp_path, monkeypatch):
    import warnings

    folder = write(tmp_path, plans(old=True))
    for name in ("catch_warnings", "filterwarnings", "simplefilter"):
        monkeypatch.setattr(warnings, name, lambda *_, **__: pytest.fail("changed filters"))
    before = sys.stdout
    seen = []
    monkeypatch.setattr(
        json, "loads", lambda *a, real=json.loads: seen.append(sys.stdout) or real(*a)
    )
    load_model(folder, folds=(0,), device=CPU)
    assert seen
    assert all(stream is before for stream in seen)
