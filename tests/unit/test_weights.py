from __future__ import annotations

import gc
import pickle
import weakref
from argparse import Namespace
from collections import defaultdict, deque
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from pathlib import PurePosixPath, PureWindowsPath
from types import SimpleNamespace
from uuid import UUID

import numpy as np
import pytest
import torch

from totalfast import WeightsError
from totalfast.models.checkpoints import Ignored, read_checkpoint
from totalfast.models.loading import load_model
from totalfast.models.trainers import builds_from_plans
from totalfast.models.weights import find_model
from totalfast.weights.official_model import OfficialModel


class Exploit:
    def __reduce__(self):
        return (pytest.fail, ("code from a checkpoint was run",))


def test_harmless_data_beside_the_weights_are_left_out(tmp_path):
    data = {
        "log": [np.float64(0.8), np.float16(0.5), np.int64(3), np.arange(3), np.array(["a", None])],
        "arguments": Namespace(folder=PurePosixPath("a"), windows=PureWindowsPath("b")),
        "times": (datetime.now(timezone.utc), timedelta(1), date.today()),  # noqa: DTZ011
        "containers": [defaultdict(list, {"a": [1]}), deque([1]), frozenset([1]), range(3)],
        "others": [Decimal(1), Fraction(1, 2), UUID(int=1), SimpleNamespace(a=1), slice(1, 2)],
    }
    torch.save({"network_weights": {"a": torch.ones(3)}} | data, tmp_path / "c.pth")
    content = read_checkpoint(tmp_path / "c.pth")
    assert content["network_weights"]["a"].sum() == 3
    assert {type(value) for value in content["log"]} == {Ignored}
    assert type(content["arguments"]) is Ignored


def test_checkpoint_with_code_is_refused_and_not_run(tmp_path):
    torch.save({"network_weights": {}, "logging": Exploit()}, tmp_path / "c.pth")
    with pytest.raises(WeightsError, match="holds more than weights"):
        read_checkpoint(tmp_path / "c.pth")


def test_old_format_with_code_is_refused_too(tmp_path):
    torch.save({"x": Exploit()}, tmp_path / "c.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(WeightsError, match="holds more than weights"):
        read_checkpoint(tmp_path / "c.pth")


def test_old_format_with_weights_is_read(tmp_path):
    torch.save({"a": torch.ones(3)}, tmp_path / "c.pth", _use_new_zipfile_serialization=False)
    assert read_checkpoint(tmp_path / "c.pth")["a"].sum() == 3


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
def test_damaged_and_other_files_are_errors(tmp_path):
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps(Exploit()))
    torch.save({"a": torch.ones(30000)}, tmp_path / "cut.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "cut.pth").read_bytes()[:5000])
    for name in ("text.pth", "pickle.pth", "cut.pth"):
        with pytest.raises(WeightsError):
            read_checkpoint(tmp_path / name)


@pytest.mark.parametrize(
    ("trainer", "expected"),
    [
        ("nnUNetTrainer", True),
        ("nnUNetTrainerNoMirroring", True),
        ("nnUNetTrainer_4000epochs_NoMirroring", True),
        ("nnUNetTrainer_DASegOrd0_NoMirroring", True),
        ("nnUNetTrainerBN", False),
        ("nnUNetTrainerSkeletonRecall", False),
        ("unknown", False),
    ],
)
def test_trainers_that_build_the_architecture_from_the_plans(trainer, expected):
    assert builds_from_plans(trainer) is expected


def test_reading_the_trainers_source_agrees_with_importing_them():
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    for name in (
        "nnUNetTrainerNoMirroring",
        "nnUNetTrainer_4000epochs_NoMirroring",
        "nnUNetTrainer_2000epochs_NoMirroring",
        "nnUNetTrainer_DASegOrd0",
        "nnUNetTrainer_DASegOrd0_NoMirroring",
        "nnUNetTrainerBN",
    ):
        trainer = recursive_find_trainer_class_by_name(name)
        own = trainer.build_network_architecture is nnUNetTrainer.build_network_architecture
        assert builds_from_plans(name) is own


def test_network_and_weights_equal_nnunets(standin_home):
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    folder = next((standin_home / "nnunet/results").glob("Dataset297*/*"))
    expected = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    expected.initialize_from_trained_model_folder(str(folder), (0,))
    model = load_model(folder, folds=(0,), device=torch.device("cpu"))
    assert str(model.networks[0]) == str(expected.network)
    state = model.networks[0].state_dict()
    assert state.keys() == expected.network.state_dict().keys()
    for name, value in expected.network.state_dict().items():
        assert torch.equal(state[name], value)


def test_a_dropped_model_is_freed_without_garbage_collection(standin_home):
    folder = next((standin_home / "nnunet/results").glob("Dataset297*/*"))
    gc.collect()
    gc.disable()  # it could free the model by chance
    try:
        model = load_model(folder, folds=(0,), device=torch.device("cpu"))
        weights = [weakref.ref(tensor) for tensor in model.networks[0].parameters()]
        del model
        assert not any(tensor() is not None for tensor in weights)
    finally:
        gc.enable()


def test_errors_name_missing_files(standin_home, tmp_path, monkeypatch):
    folder = next((standin_home / "nnunet/results").glob("Dataset297*/*"))
    with pytest.raises(WeightsError, match=r"fold_7.checkpoint_final\.pth"):
        load_model(folder, folds=(7,), device=torch.device("cpu"))
    with pytest.raises(WeightsError, match=r"plans\.json"):
        load_model(tmp_path, folds=(0,), device=torch.device("cpu"))
    monkeypatch.delenv("TOTALSEG_WEIGHTS_PATH", raising=False)
    monkeypatch.setenv("TOTALSEG_HOME_DIR", str(standin_home))
    other = OfficialModel(
        model_id=297, trainer="other", plans="nnUNetPlans", configuration="3d_fullres", folds=(0,)
    )
    with pytest.raises(WeightsError, match="has no other__nnUNetPlans__3d_fullres, only nnUNet"):
        find_model(other)
