"""Calls that differ between the versions of nnU-Net, and the error for unsupported versions."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement

from totalfast import TotalfastError
from totalfast.models import nnunet_versions
from totalfast.models.loading import load_model
from totalfast.models.trainers import find_trainer
from totalfast.nnunet.cases import case_from_array

from .model_folders import checkpoint, plans, write

CPU = torch.device("cpu")


@pytest.fixture
def pretend(monkeypatch):
    """Let a version of nnunetv2 seem to be installed."""

    def install(version):
        def find(package):
            assert package == "nnunetv2"
            if version is None:
                raise PackageNotFoundError(package)
            return version

        nnunet_versions.check_version.cache_clear()
        monkeypatch.setattr("importlib.metadata.version", find)

    yield install
    nnunet_versions.check_version.cache_clear()


@pytest.mark.parametrize("version", ["2.2", "2.2.1", "2.4.2", "2.5", "1.7.1", "3.0"])
def test_unsupported_versions_are_named(version, pretend, tmp_path):
    pretend(version)
    with pytest.raises(TotalfastError) as raised:
        load_model(tmp_path, folds=None, device=CPU)
    assert f"nnunetv2 {version} is installed" in str(raised.value)
    assert "2.5.1 to 2.8" in str(raised.value)


@pytest.mark.parametrize("version", ["2.5.1", "2.5.2", "2.6.0", "2.7.0", "2.8.1", "2.8.2.post1"])
def test_supported_versions_pass(version, pretend, caplog):
    pretend(version)
    nnunet_versions.check_version()
    assert not caplog.records


def test_newer_versions_give_one_warning(pretend, caplog):
    pretend("2.9.0rc1")
    nnunet_versions.check_version()
    nnunet_versions.check_version()
    (record,) = caplog.records
    assert "2.9.0rc1 is newer" in record.getMessage()


def test_packages_that_bring_nnunets_modules_under_another_name_pass(pretend, monkeypatch):
    pretend(None)
    nnunet_versions.check_version()
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    nnunet_versions.check_version.cache_clear()
    with pytest.raises(TotalfastError, match="nnunetv2 is not installed"):
        nnunet_versions.check_version()


def test_the_packages_requirement_is_the_supported_range():
    tomllib = pytest.importorskip("tomllib")
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    required = map(Requirement, tomllib.loads(text)["project"]["dependencies"])
    (own,) = (requirement for requirement in required if requirement.name == "nnunetv2")
    assert own == Requirement(nnunet_versions._requirement())


@pytest.mark.parametrize(("version", "is_old"), [("2.6.2", True), ("2.8.0", False), (None, False)])
def test_names_that_a_newer_version_may_know(version, is_old, pretend, tmp_path):
    pretend(version)
    named = plans() | {"image_reader_writer": "ReaderOfTheFuture"}
    with pytest.raises(TotalfastError, match="ReaderOfTheFuture") as raised:
        load_model(write(tmp_path, named), folds=(0,), device=CPU)
    assert ("nnunetv2 2.6.2 is installed" in str(raised.value)) is is_old


def trainer_of(signature):
    """A trainer that builds its network from what it gets, with one of nnU-Net's signatures."""

    def check(inputs, outputs, enable_deep_supervision):
        assert not enable_deep_supervision
        return torch.nn.Conv3d(inputs, outputs, 1)

    class OldTrainer:  # nnU-Net 2.0 to 2.2
        @staticmethod
        def build_network_architecture(
            plans_manager,
            dataset_json,
            configuration_manager,
            num_input_channels,
            enable_deep_supervision=True,
        ):
            labels = plans_manager.get_label_manager(dataset_json)
            assert configuration_manager.patch_size
            return check(num_input_channels, labels.num_segmentation_heads, enable_deep_supervision)

    class NamesTrainer:  # 2.3 to 2.6
        @staticmethod
        def build_network_architecture(
            architecture_class_name,
            arch_init_kwargs,
            arch_init_kwargs_req_import,
            num_input_channels,
            num_output_channels,
            enable_deep_supervision=True,
        ):
            assert architecture_class_name.endswith("PlainConvUNet")
            assert arch_init_kwargs["n_stages"] == 2
            assert "conv_op" in arch_init_kwargs_req_import
            return check(num_input_channels, num_output_channels, enable_deep_supervision)

    class NewTrainer:  # from 2.7 on
        @staticmethod
        def build_network_architecture(
            plans_manager,
            configuration_manager,
            num_input_channels,
            num_output_channels,
            enable_deep_supervision=True,
        ):
            assert plans_manager.dataset_name
            assert configuration_manager.patch_size
            return check(num_input_channels, num_output_channels, enable_deep_supervision)

    return {"2.2": OldTrainer, "2.6": NamesTrainer, "2.7": NewTrainer}[signature]


def write_model(folder, trainer):
    """Write a model of another trainer, whose network is a single convolution."""
    weights = torch.nn.Conv3d(1, 3, 1).state_dict()
    return write(
        folder,
        plans(),
        content=checkpoint() | {"trainer_name": trainer, "network_weights": weights},
    )


@pytest.fixture
def finder(monkeypatch):
    """Register a trainer in nnU-Net's predictor, as programs do with each version of nnU-Net."""
    from nnunetv2.inference import predict_from_raw_data

    def register(name, trainer):
        def find(*arguments):
            # From nnU-Net 2.8 on the name is the only argument; earlier it is the second one.
            if (arguments[0] if len(arguments) == 1 else arguments[1]) == name:
                return trainer
            raise RuntimeError("unknown")

        for function in nnunet_versions.FINDERS:
            if hasattr(predict_from_raw_data, function):
                monkeypatch.setattr(predict_from_raw_data, function, find)

    return register


@pytest.mark.parametrize("signature", ["2.2", "2.6", "2.7"])
def test_trainers_of_all_versions_build_their_networks(signature, finder, tmp_path):
    finder("ClientTrainer", trainer_of(signature))
    folder = write_model(tmp_path, "ClientTrainer")
    model = load_model(folder, folds=(0,), device=CPU)
    (network,) = model.networks
    assert type(network) is torch.nn.Conv3d
    weights = torch.load(folder / "fold_0/checkpoint_final.pth", weights_only=True)
    assert torch.equal(network.weight, weights["network_weights"]["weight"])


@pytest.mark.parametrize("function", nnunet_versions.FINDERS)
def test_trainers_registered_in_each_versions_predictor(function, monkeypatch):
    trainer = trainer_of("2.7")

    def find(*arguments):
        assert len(arguments) == (1 if function == nnunet_versions.FINDERS[0] else 3)
        return trainer if "ClientTrainer" in arguments else None

    name = "nnunetv2.inference.predict_from_raw_data"
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(**{function: find}))
    assert nnunet_versions.registered_trainer("ClientTrainer") is trainer
    assert nnunet_versions.registered_trainer("OtherTrainer") is None


def test_nnunets_own_finder_is_not_asked(monkeypatch):
    from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

    monkeypatch.setitem(
        sys.modules,
        "nnunetv2.inference.predict_from_raw_data",
        SimpleNamespace(recursive_find_python_class=recursive_find_python_class),
    )
    monkeypatch.setattr("pkgutil.iter_modules", lambda _: pytest.fail("searched all trainers"))
    assert nnunet_versions.registered_trainer("MissingTrainer") is None


def test_advice_for_a_missing_trainer_fits_the_version(monkeypatch):
    for reads, advice in ((True, "put the folder"), (False, "use nnunetv2 2.8")):
        monkeypatch.setattr(
            "totalfast.models.trainers.reads_trainer_folders", lambda reads=reads: reads
        )
        with pytest.raises(TotalfastError, match=advice):
            find_trainer("MissingTrainer")


@pytest.mark.parametrize("count", [2, 3])
def test_preprocessors_with_and_without_returned_properties(count, tmp_path):
    image = np.zeros((1, 9, 8, 8), np.float32)

    class Preprocessor:
        def __init__(self, verbose):
            assert not verbose

        def run_case_npy(self, data, seg, properties, plans, configuration, dataset):
            if count == 3:
                properties = dict(properties)
            properties["mark"] = 1
            return (data + 1, seg, properties)[:count]

    model = load_model(write(tmp_path, plans()), folds=(0,), device=CPU)
    configuration = SimpleNamespace(preprocessor_class=Preprocessor)
    changed = SimpleNamespace(
        plans=model.plans, configuration=configuration, labels=model.labels, dataset=model.dataset
    )
    case = case_from_array(image, None, {"spacing": [1, 1, 1]}, None, changed)
    assert case["data_properties"]["mark"] == 1
    assert torch.equal(case["data"], torch.ones(image.shape))
