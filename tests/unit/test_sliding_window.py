from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from totalfast import ArgmaxPredictor, PredictionError
from totalfast.backends.forward import run_by_torch, split_head
from totalfast.backends.openvino import run_by_openvino
from totalfast.backends.winograd import run_by_winograd
from totalfast.engine import fold_networks
from totalfast.engine.fold_networks import constant_value, logits_by_slices
from totalfast.engine.rolling_window import WindowMemory
from totalfast.engine.sliding_window import predict_labels, predict_logits
from totalfast.engine.tiles import Tiling, plan_tiles
from totalfast.export.nearest import first_maximum
from totalfast.models.loading import load_model

SHAPES = [(32, 24, 40), (21, 33, 80), (100, 30, 70)]
"""Images of one tile, of two tiles, and of several tiles along z, where the window moves."""


@pytest.fixture(scope="module")
def folder(standin_home):
    return next((standin_home / "nnunet/results").glob("Dataset297*/*"))


@pytest.fixture(scope="module")
def predictors(folder):
    pair = []
    for kind in (nnUNetPredictor, ArgmaxPredictor):
        predictor = kind(
            tile_step_size=0.8, use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False
        )
        predictor.initialize_from_trained_model_folder(str(folder), (0,))
        pair.append(predictor)
    return pair


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("step", [0.5, 0.8])
def test_labels_and_logits_are_nnunets(predictors, shape, step):
    theirs, ours = predictors
    theirs.tile_step_size = ours.tile_step_size = step
    image = torch.randn((1, *shape), generator=torch.Generator().manual_seed(0))
    expected = theirs.predict_logits_from_preprocessed_data(image)
    assert torch.equal(predict_logits(ours.model, image, Tiling(step=step)), expected)
    labels = ours.predict_labels_from_preprocessed_data(image)
    assert torch.equal(labels, expected.argmax(0).to(torch.uint8))
    assert labels.dtype == torch.uint8


@pytest.mark.parametrize("backend", [run_by_torch, run_by_winograd, run_by_openvino])
@pytest.mark.parametrize("folds", [1, 2])
def test_tiles_of_one_value_are_computed_once_and_change_nothing(folder, backend, folds):
    """Equal to what the network gives if no tile is recognised."""
    model = load_model(folder, folds=(0,) * folds, device=torch.device("cpu"), backend=backend)
    z, y, x = model.patch_size
    image = torch.full((1, 4 * z, y, x), -2.0)
    image[:, 3 * z :] = torch.randn((1, z, y, x), generator=torch.Generator().manual_seed(0))
    image[:, 2 * z :, 20, 20] = 3.0
    computed: list[int] = []

    def counting(body):
        return lambda tile: computed.append(1) or body(tile)

    forwards = tuple(replace(each, body=counting(each.body)) for each in model.forwards)
    model = replace(model, forwards=forwards)
    logits = predict_logits(model, image, Tiling(step=0.5))
    once, tiles = len(computed), plan_tiles(tuple(image.shape[1:]), model.patch_size, 0.5).count
    computed.clear()
    with mock.patch.object(fold_networks, "constant_value", return_value=None):
        expected = predict_logits(model, image, Tiling(step=0.5))
    assert len(computed) == folds * tiles
    if folds == 1:
        assert once == tiles - 2  # three of them are constant
    assert torch.equal(logits, expected)


def test_a_value_is_constant_by_its_bits():
    tile = torch.full((2, 3, 4, 5), 1.5)
    tile[1] = -0.0
    assert constant_value(tile) == constant_value(tile.clone()) is not None
    for channel, place, value in ((0, (0, 0, 0), 2.0), (1, (2, 3, 4), 0.0), (1, (1, 0, 2), 1e-45)):
        changed = tile.clone()
        changed[(channel, *place)] = value
        assert constant_value(changed) is None
        assert constant_value(changed[:, :, 1:2, 1:2]) == constant_value(tile)
    assert constant_value(torch.zeros((1, 4, 4, 4))) != constant_value(-torch.zeros((1, 4, 4, 4)))


def test_shared_window_memory_does_not_change_labels(predictors):
    model, memory = predictors[1].model, WindowMemory()
    for shape in reversed(SHAPES):
        image = torch.randn((1, *shape), generator=torch.Generator().manual_seed(0))
        alone = predict_labels(model, image, Tiling(step=0.8))
        shared = predict_labels(model, image, Tiling(step=0.8), memory=memory)
        assert torch.equal(shared, alone)


def test_window_memory_is_reused_and_grows():
    memory = WindowMemory()
    first = memory.zeros((2, 6))
    first[:] = 1
    again = memory.zeros((3, 3))
    assert again.shape == (3, 3)
    assert not again.any()
    assert again.base is first.base
    assert not memory.zeros((5, 5)).any()


def test_two_folds_are_averaged_in_half_precision_like_nnunet(folder, tmp_path):
    import shutil

    copy = tmp_path / folder.name
    shutil.copytree(folder, copy)
    shutil.copytree(copy / "fold_0", copy / "fold_1")
    second = torch.load(copy / "fold_1" / "checkpoint_final.pth", weights_only=False)
    second["network_weights"] = {
        name: value * 1.01 for name, value in second["network_weights"].items()
    }
    (copy / "fold_1" / "checkpoint_final.pth").unlink()
    torch.save(second, copy / "fold_1" / "checkpoint_final.pth")
    image = torch.randn((1, 40, 24, 40), generator=torch.Generator().manual_seed(1))
    theirs = nnUNetPredictor(use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False)
    theirs.initialize_from_trained_model_folder(str(copy), None)
    expected = theirs.predict_logits_from_preprocessed_data(image)
    model = load_model(copy, folds=None, device=torch.device("cpu"))
    assert len(model.networks) == 2
    assert torch.equal(predict_logits(model, image, Tiling(step=0.5)), expected)
    assert torch.equal(
        predict_labels(model, image, Tiling(step=0.5)), expected.argmax(0).to(torch.uint8)
    )


@pytest.mark.parametrize("added", [1e6, float("nan"), float("-inf")])
@pytest.mark.parametrize("shape", SHAPES)
def test_overflow_and_nan_are_errors_and_settings_are_restored(predictors, shape, added):
    threads = torch.get_num_threads()
    with pytest.raises(PredictionError, match="is infinite or NaN"):
        broken = predictors[1].model
        layer = broken.networks[0].decoder.seg_layers[-1]
        bias = layer.bias.detach().clone()
        try:
            with torch.no_grad():
                layer.bias.add_(added)
            predict_labels(broken, torch.zeros((1, *shape)), Tiling(step=0.5))
        finally:
            with torch.no_grad():
                layer.bias.copy_(bias)
    assert torch.get_num_threads() == threads


def test_tiles_by_hand():
    tiles = plan_tiles((30, 128, 200), (64, 64, 64), 0.5)
    assert tiles.below == (17, 0, 0)
    assert tiles.above == (17, 0, 0)
    assert tiles.starts == ((0,), (0, 32, 64), (0, 27, 54, 82, 109, 136))
    assert tiles.count == 18


def test_each_tile_is_reported(predictors):
    reports = []
    predict_labels(
        predictors[1].model,
        torch.zeros((1, 50, 24, 48)),
        Tiling(step=0.5),
        on_tile=lambda: reports.append(1),
    )
    assert len(reports) == plan_tiles((50, 24, 48), predictors[1].model.patch_size, 0.5).count


@pytest.mark.parametrize(
    "values",
    [
        [0.0, -0.0, 1.0, 1.0, -2.0, float("nan"), float("nan"), 6e-8],
        [0.5, 0.25],
        [0.0, -0.0, 6e-8, -6e-8],
        [65504.0, -65504.0, 65472.0],
        [float("inf"), float("-inf"), 1.0],
        [float("-inf"), -65504.0],
    ],
)
@pytest.mark.parametrize("classes", [1, 40, 3000])
@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16, torch.float32, torch.float64])
def test_first_maximum_is_argmax_with_ties_signed_zeros_and_nan(values, classes, dtype):
    torch.manual_seed(classes)
    logits = torch.tensor(values)[torch.randint(0, len(values), (classes, 3, 50, 6))].to(dtype)
    assert torch.equal(first_maximum(logits), logits.argmax(0))


def test_first_maximum_finds_the_last_of_many_classes_and_distinguishes_float64_numbers():
    logits = torch.zeros(2**16, 2, dtype=torch.half)
    logits[-1] = 6e-8
    assert first_maximum(logits).tolist() == [2**16 - 1] * 2
    assert first_maximum(torch.tensor([[1.0], [1.0 + 1e-12]], dtype=torch.float64)).item() == 1


def test_first_maximum_distinguishes_all_neighbouring_float16_numbers():
    numbers = torch.arange(0, 0x7C00, dtype=torch.int16).view(torch.half)
    numbers = torch.cat((-numbers.flip(0), numbers))
    pairs = torch.stack((numbers[:-1], numbers[1:]))
    for logits in (pairs, pairs.flip(0)):
        assert torch.equal(first_maximum(logits), logits.argmax(0))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("classes", [2, 25, 118])
@pytest.mark.parametrize(
    "shape",
    [(8, 72, 72, 64), (32, 112, 112, 40), (32, 9, 31, 17), (20, 33, 40, 47), (64, 40, 33, 47)],
)
def test_last_layer_by_slices_gives_identical_bits(classes, shape, threads):
    torch.manual_seed(classes)
    head = torch.nn.Conv3d(shape[0], classes, 1)
    features = torch.nn.functional.leaky_relu(10 * torch.randn(1, *shape))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            expected = head(features)[0]
            parts = list(logits_by_slices(head, features))
    finally:
        torch.set_num_threads(before)
    assert (parts[0][0].start, parts[-1][0].stop) == (0, shape[1])
    for slices, logits in parts:
        assert torch.equal(logits, expected[:, slices])


@pytest.mark.parametrize("threads", [1, 2])
def test_split_networks_share_weights_and_do_not_change_the_original(predictors, threads):
    network = predictors[1].model.networks[0]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            tile = torch.randn(1, 1, 24, 32, 32)
            expected = network(tile)
            body, head = split_head(network)
            assert torch.equal(head(body(tile)), expected)
            assert torch.equal(network(tile), expected)
    finally:
        torch.set_num_threads(before)
    assert head is network.decoder.seg_layers[-1]
    assert {id(p) for p in body.encoder.parameters()} == {
        id(p) for p in network.encoder.parameters()
    }


def test_other_networks_are_not_split():
    layer = torch.nn.Conv3d(1, 2, 1)
    assert split_head(layer) == (layer, None)
