"""Damaged model folders: each is a WeightsError, or loads and predicts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from totalfast import InputError, WeightsError
from totalfast.models.loading import load_model

from .model_folders import (
    architecture,
    checkpoint,
    dataset,
    plans,
    predict,
    undamaged_files,
    write,
)

CPU = torch.device("cpu")


def put(*keys: str | int, value: object):
    """Return a function that sets a value of nested containers."""

    def change(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


def drop(*keys: str | int):
    """Return a function that removes a value of nested containers."""

    def change(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        del content[keys[-1]]

    return change


BASE = ("configurations", "base")
FULL = ("configurations", "3d_fullres")
NETWORK = (*FULL, "architecture")
KWARGS = (*NETWORK, "arch_kwargs")

PLANS = {
    "inherits from itself": (put(*FULL, "inherits_from", value="3d_fullres"), "is a circle"),
    "inherits in a circle": (put(*BASE, "inherits_from", value="3d_fullres"), "is a circle"),
    "unknown parent": (put(*FULL, "inherits_from", value="none"), "no configuration 'none'"),
    "parent is a list": (put(*FULL, "inherits_from", value=["base"]), "must be a text"),
    "no configuration": (drop(*FULL), "no configuration '3d_fullres', only 'base'"),
    "configurations a list": (put("configurations", value=[]), "configurations is"),
    "patch a word": (put(*BASE, "patch_size", value="abc"), "patch_size is 'abc'"),
    "patch 0": (put(*BASE, "patch_size", value=[0, 8, 8]), r"patch_size\[0\] is 0"),
    "patch of one axis": (put(*BASE, "patch_size", value=[8]), "a list of 2 to 3 values"),
    "patch enormous": (put(*BASE, "patch_size", value=[2**20] * 3), "at most 536870912 voxels"),
    "patch a float": (put(*BASE, "patch_size", value=[8.0, 8, 8]), "a whole number"),
    "patch not divisible": (put(*BASE, "patch_size", value=[9, 8, 8]), "divisors of the tile"),
    "patch of a layer's size": (put(*BASE, "patch_size", value=[2, 2, 2]), "2 voxels of the tile"),
    "spacing 0": (put(*BASE, "spacing", value=[0, 3, 3]), r"spacing\[0\] is 0"),
    "spacing not a number": (put(*BASE, "spacing", value=[3, float("nan"), 3]), "is nan"),
    "spacing infinite": (put(*BASE, "spacing", value=[3, 3, float("inf")]), "is inf"),
    "spacing negative": (put(*BASE, "spacing", value=[3, 3, -3]), "is -3"),
    "axes": (put("transpose_forward", value=[0, 1, 7]), r"transpose_forward\[2\] is 7"),
    "axes twice": (put("transpose_forward", value=[0, 1, 1]), "an order of the axes"),
    "axes that do not undo": (put("transpose_backward", value=[1, 0, 2]), "the inverse of"),
    "no axes": (drop("transpose_backward"), "transpose_backward is missing"),
    "no reader": (drop("image_reader_writer"), "image_reader_writer is missing"),
    "preprocessor": (put(*BASE, "preprocessor_name", value="Nope"), "'Nope', which is no known"),
    "network": (put(*NETWORK, "network_class_name", value="no.such.Class"), "no known part"),
    "no kernels": (put(*KWARGS, "kernel_sizes", value=None), "kernel_sizes is None"),
    "even kernel": (put(*KWARGS, "kernel_sizes", value=[[4, 3, 3]] * 2), "an odd number"),
    "negative features": (put(*KWARGS, "features_per_stage", value=[-2, 3]), "is -2"),
    "enormous features": (put(*KWARGS, "features_per_stage", value=[10**30, 3]), "is 10000"),
    "stages": (put(*KWARGS, "n_stages", value=3), "a list of 3 values"),
    "enormous number of layers": (put(*KWARGS, "n_conv_per_stage", value=10**9), "from 1 to 100"),
    "layer of other images": (put(*KWARGS, "conv_op", value="torch.nn.Conv2d"), "for 3-D images"),
    "first stage with strides": (
        put(*KWARGS, "strides", value=[[2, 2, 2], [1, 1, 1]]),
        "1 at the first stage",
    ),
    "unknown keyword": (put(*KWARGS, "depth", value=3), "its network can't be built"),
    "no statistics": (drop("foreground_intensity_properties_per_channel", "0"), "is missing"),
    "order a word": (
        put(*BASE, "resampling_fn_data_kwargs", "order", value="three"),
        "order is 'three'",
    ),
    "order of no function": (
        put(*BASE, "resampling_fn_data", value="no_resampling_hack"),
        "is no keyword of no_resampling_hack",
    ),
    "two schemes": (put(*BASE, "normalization_schemes", value=["NoNormalization"] * 2), "1 values"),
}


@pytest.mark.parametrize("name", PLANS)
def test_damaged_plans_are_refused_by_place_value_and_expectation(name, tmp_path):
    change, message = PLANS[name]
    content = plans()
    change(content)
    write(tmp_path, content)
    with pytest.raises(WeightsError, match=message) as error:
        load_model(tmp_path, folds=(0,), device=CPU)
    assert str(tmp_path / "plans.json") in str(error.value)


DATASETS = {
    "no labels": (drop("labels"), "labels is missing"),
    "labels a list": (put("labels", value=["background"]), "an object with keys"),
    "no background": (drop("labels", "background"), "background is missing"),
    "gap in the labels": (put("labels", "spleen", value=7), "consecutive numbers from 0"),
    "label a word": (put("labels", "liver", value="one"), "liver is 'one'"),
    "region without order": (
        put("labels", "liver", value=[1, 2]),
        "regions_class_order is missing",
    ),
    "ignored label a list": (put("labels", "ignore", value=[3]), "ignore is"),
    "no channels": (drop("channel_names"), "channel_names is missing"),
    "channels a text": (put("channel_names", value="CT"), "channel_names is 'CT'"),
    "more channels": (put("channel_names", value={"0": "CT", "1": "CT"}), "a list of 2 values"),
    "no ending": (drop("file_ending"), "file_ending is missing"),
    "ending a path": (put("file_ending", value="/../a.nii"), "the ending of a file"),
}


@pytest.mark.parametrize("name", DATASETS)
def test_damaged_dataset_files_are_refused(name, tmp_path):
    change, message = DATASETS[name]
    content = dataset()
    change(content)
    write(tmp_path, plans(), content)
    with pytest.raises(WeightsError, match=message):
        load_model(tmp_path, folds=(0,), device=CPU)


def first_weight(content):
    return next(iter(content["network_weights"]))


CHECKPOINTS = {
    "a tensor": (lambda _: torch.zeros(3), "holds a Tensor"),
    "a list": (lambda _: [1], "holds a list"),
    "empty": (lambda _: {}, "has no init_args"),
    "no trainer": (
        lambda c: {k: v for k, v in c.items() if k != "trainer_name"},
        "no trainer_name",
    ),
    "trainer a number": (lambda c: c | {"trainer_name": 3}, "trainer_name is a int"),
    "weights a number": (lambda c: c | {"network_weights": 3}, "network_weights is a int"),
    "weights of numbers": (lambda c: c | {"network_weights": {"a": 1}}, "not a tensor by name"),
    "configuration missing": (lambda c: c | {"init_args": {}}, "has no configuration"),
    "other configuration": (lambda c: c | {"init_args": {"configuration": "2d"}}, "'2d'"),
    "mirroring by words": (
        lambda c: c | {"inference_allowed_mirroring_axes": "xyz"},
        "not a list of axes",
    ),
    "a layer more": (
        lambda c: c | {"network_weights": c["network_weights"] | {"more": torch.ones(1)}},
        "has layers that the network of the plans lacks: more",
    ),
    "a layer missing": (
        lambda c: c | {"network_weights": dict(list(c["network_weights"].items())[1:])},
        "lacks layers of the network",
    ),
    "another shape": (
        lambda c: (
            c | {"network_weights": c["network_weights"] | {first_weight(c): torch.ones((2, 2))}}
        ),
        r"has \(2, 2\) numbers",
    ),
    "integers": (
        lambda c: (
            c | {"network_weights": {k: v.to(torch.int32) for k, v in c["network_weights"].items()}}
        ),
        "numbers of torch.int32",
    ),
    "more numbers than stored": (
        lambda c: (
            c
            | {
                "network_weights": c["network_weights"]
                | {first_weight(c): torch.ones(1).expand(2, 1, 3, 3, 3)}
            }
        ),
        "no ordinary tensor",
    ),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_damaged_checkpoints_are_refused(name, tmp_path):
    change, message = CHECKPOINTS[name]
    write(tmp_path, plans(), content=change(checkpoint()))
    with pytest.raises(WeightsError, match=message) as error:
        load_model(tmp_path, folds=(0,), device=CPU)
    assert "Traceback" not in str(error.value)


@pytest.mark.parametrize("name", ["plans.json", "dataset.json", "fold_0/checkpoint_final.pth"])
@pytest.mark.parametrize(
    "damage", ["empty", "cut", "zeros", "folder", "web page", "deep", "missing"]
)
def test_damaged_files_are_refused_by_name(name, damage, tmp_path):
    path = write(tmp_path, plans()) / name
    content = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes(
            {
                "empty": b"",
                "cut": content[: len(content) // 2],
                "zeros": bytes(len(content)),
                "web page": b"<html>Not found</html>",
                "deep": b"[" * 100_000,
            }[damage]
        )
    with pytest.raises(WeightsError, match=Path(name).name.replace(".", r"\.")):
        load_model(tmp_path, folds=(0,), device=CPU)


def test_missing_folds_are_named_with_those_that_exist(tmp_path):
    write(tmp_path, plans())
    with pytest.raises(WeightsError, match=r"no fold_7/c.* folds with this file: fold_0"):
        load_model(tmp_path, folds=(0, 7), device=CPU, checkpoint_name="checkpoint_final.pth")
    with pytest.raises(WeightsError, match=r"has no other\.pth; folds with this file: none"):
        load_model(tmp_path, folds=None, device=CPU, checkpoint_name="other.pth")
    with pytest.raises(WeightsError, match="can't be read"):  # a name that is too long
        load_model(tmp_path, folds=("a" * 300,), device=CPU)


def test_mirroring_along_an_axis_that_the_network_lacks_is_refused(tmp_path):
    flat = plans()
    network = flat["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    network |= {"conv_op": "torch.nn.Conv2d", "norm_op": "torch.nn.InstanceNorm2d"}
    network |= {"kernel_sizes": [[3, 3]] * 2, "strides": [[1, 1], [2, 2]]}
    flat["configurations"]["base"] |= {"patch_size": [8, 8], "spacing": [3.0, 3.0]}
    write(tmp_path, flat)
    with pytest.raises(WeightsError, match=r"mirroring axes \(0, 1, 2\)"):
        load_model(tmp_path, folds=(0,), device=CPU)


def test_json_files_in_any_unicode_encoding_are_read(tmp_path):
    path = write(tmp_path, plans()) / "plans.json"
    path.write_bytes(json.dumps(plans()).encode("utf-16"))
    assert load_model(tmp_path, folds=(0,), device=CPU).heads == 3


@pytest.mark.filterwarnings("ignore")
def test_undamaged_models_predict(tmp_path):
    for files in undamaged_files():
        for name in ("plans", "old plans"):
            predict(write(tmp_path, files[name], files["dataset"], files["checkpoint"]))


def test_old_plans_with_words_for_numbers_do_not_fill_the_memory(tmp_path):
    content = plans(old=True)
    network = content["configurations"]["3d_fullres"]
    network |= {"UNet_base_num_features": "abc", "n_conv_per_stage_encoder": [1] * 31}
    write(tmp_path, content)
    with pytest.raises(WeightsError, match="UNet_base_num_features is 'abc'"):
        load_model(tmp_path, folds=(0,), device=CPU)


def test_image_thinner_than_half_a_voxel_of_the_plans_is_an_input_error(tmp_path):
    content = plans()
    content["configurations"]["base"]["spacing"] = [3.0, 73.0, 3.0]
    write(tmp_path, content)
    with pytest.raises(InputError, match="none remain along one axis"):
        predict(tmp_path)


def test_advice_names_the_weights_command_only_for_models_in_its_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TOTALSEG_WEIGHTS_PATH", str(tmp_path / "weights"))
    for folder, advised in ((tmp_path / "weights/Dataset297_x/t", True), (tmp_path / "own", False)):
        write(folder, {})
        for path in (folder / "plans.json", folder / "fold_0/checkpoint_final.pth"):
            with pytest.raises(WeightsError) as error:
                load_model(folder, folds=(0, 1), device=CPU)
            assert ("totalfast weights verify" in str(error.value)) is advised, path
            assert "Delete" not in str(error.value)
            (folder / "plans.json").write_text(json.dumps(plans()))


def test_architecture_of_the_small_model_is_that_of_its_old_plans(tmp_path):
    write(tmp_path, plans(old=True))
    converted = load_model(tmp_path, folds=(0,), device=CPU).configuration
    kwargs = architecture()["arch_kwargs"]
    assert converted.network_arch_init_kwargs == kwargs
