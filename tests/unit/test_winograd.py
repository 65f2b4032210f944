"""The backend of our own loops: every layer against torch, and what it can't run."""

from __future__ import annotations

import _thread
import logging
import os
import platform
import subprocess
import sys
import textwrap
import threading
import time

import numba
import numpy as np
import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from dynamic_network_architectures.building_blocks.residual import BottleneckD
from torch import nn

from totalfast.backends import keeps_weights
from totalfast.backends.fastest import run_fastest
from totalfast.backends.forward import run_by_torch
from totalfast.backends.last_layer import LastLayer
from totalfast.backends.winograd import features, program, run_by_winograd, transforms
from totalfast.backends.winograd import threads as module
from totalfast.backends.winograd.head import last_layer
from totalfast.backends.winograd.layers import Shape, Work
from totalfast.backends.winograd.vectors import CONVERTS_HALVES, lanes_of
from totalfast.engine.fold_networks import TileOutput
from totalfast.engine.sliding_window import inference_settings

CPU = torch.device("cpu")

LARGEST_ERROR, MEAN_ERROR = 5e-5, 5e-6
"""Of the logits, as a share of their standard deviation; torch's are 7e-6 and 1e-6."""


def unet(
    counts=(32, 64, 96), *, kernels=3, strides=None, inputs=1, kind=PlainConvUNet, **keywords
) -> nn.Module:
    """A U-Net of nnU-Net with random weights; its normalisations are not the identity."""
    torch.manual_seed(sum(counts))
    blocks = {"n_conv_per_stage": 2} if kind is PlainConvUNet else {"n_blocks_per_stage": 2}
    settings = {
        "conv_op": nn.Conv3d,
        "conv_bias": True,
        "norm_op": nn.InstanceNorm3d,
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin": nn.LeakyReLU,
        "nonlin_kwargs": {"inplace": True},
    }
    network = kind(
        input_channels=inputs,
        n_stages=len(counts),
        features_per_stage=counts,
        kernel_sizes=kernels,
        strides=strides or [1] + [2] * (len(counts) - 1),
        num_classes=7,
        n_conv_per_stage_decoder=2,
        **blocks | settings | keywords,
    )
    for layer in network.modules():
        if isinstance(layer, nn.InstanceNorm3d) and layer.affine:
            nn.init.normal_(layer.weight, 1.0, 0.3)
            nn.init.normal_(layer.bias, 0.0, 0.5)
    return network.eval()


def residual(*arguments, **keywords) -> nn.Module:
    """As ``unet``, with residual blocks."""
    return unet(*arguments, kind=ResidualEncoderUNet, **keywords)


def without_stem(network) -> nn.Module:
    network.encoder.stem = None
    return network


def errors(network, tile) -> tuple[float, float]:
    """Largest and mean error of the logits against float64, as a share of their deviation."""
    with inference_settings(CPU):
        logits = run_by_winograd(network, tuple(tile.shape))(tile).double()
        exact = network.double()(tile.double())
        network.float()
    error = (logits - exact) / exact.std()
    return error.abs().max().item(), error.square().mean().sqrt().item()


def tile_of(*shape, seed=0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_transforms_are_an_exact_convolution_along_one_axis():
    kernel, voxels = np.array([1.0, -2.0, 3.0]), np.arange(6.0) ** 2
    points = np.array(transforms.to_points.py_func(*voxels))
    products = points * (transforms._kernel_transform() @ kernel)
    result = transforms.from_points.py_func(*products)
    assert np.allclose(result, np.convolve(voxels, kernel[::-1], "valid"), atol=1e-12)


def test_what_is_multiplied_in_the_transforms_is_exact_in_float32():
    for name in ("NEAR", "FAR", "NEAR_2", "FAR_2", "NEAR_3", "FAR_3", "BOTH_2", "SUM_2"):
        number = getattr(transforms, name)
        assert number == np.float32(number)


@pytest.mark.parametrize(
    ("network", "shape"),
    [
        (unet(), (1, 1, 16, 24, 32)),
        (unet((32, 64), strides=[1, (1, 2, 2)]), (1, 1, 9, 14, 18)),
        (unet((32, 48, 64), kernels=[(1, 3, 3), 3, (3, 3, 1)]), (1, 1, 12, 20, 28)),
        (unet((8, 20, 40), inputs=4), (1, 4, 12, 12, 20)),
        (unet((32, 64), strides=[2, 2]), (1, 1, 16, 16, 24)),
        (unet((33, 70)), (1, 1, 6, 10, 14)),
        (unet((32, 64), nonlin=nn.ReLU), (1, 1, 8, 8, 40)),
        (unet((32, 64), nonlin=None, nonlin_kwargs=None), (1, 1, 8, 8, 8)),
        (unet((32, 64), norm_op_kwargs={"affine": False}), (1, 1, 8, 8, 8)),
        (unet((32, 64), conv_bias=False), (1, 1, 8, 8, 8)),
        (unet((32, 64), dropout_op=nn.Dropout3d, dropout_op_kwargs={"p": 0.5}), (1, 1, 8, 8, 8)),
        (unet((32, 64), kernels=1), (1, 1, 8, 8, 8)),
        (residual(), (1, 1, 16, 24, 32)),
        (residual((32, 64, 64), strides=[1, (1, 2, 2), 2]), (1, 1, 6, 12, 20)),
        (residual((24, 40), stem_channels=16, inputs=3, kernels=[(1, 3, 3), 3]), (1, 3, 6, 10, 14)),
        (residual((32, 64), strides=[(2, 1, 1), (1, 2, 1)]), (1, 1, 8, 8, 12)),
        (residual((32, 64), strides=[1, 3]), (1, 1, 12, 12, 12)),
        (residual((32, 64), strides=[3, (1, 4, 3)]), (1, 1, 12, 12, 36)),
        (unet((32, 64), strides=[1, (4, 3, 1)]), (1, 1, 8, 12, 12)),
        (residual((32, 32), n_blocks_per_stage=[1, 4]), (1, 1, 8, 8, 8)),
        (residual((32, 64), nonlin=nn.ReLU, nonlin_kwargs={}), (1, 1, 8, 8, 8)),
        (residual((32, 64), nonlin=None, nonlin_kwargs=None), (1, 1, 8, 8, 8)),
        (residual((32, 64), norm_op=None, norm_op_kwargs=None), (1, 1, 8, 8, 8)),
        (
            residual((32, 64), dropout_op=nn.Dropout3d, dropout_op_kwargs={"p": 0.5}),
            (1, 1, 8, 8, 8),
        ),
    ],
    ids=lambda value: value.__class__.__name__ if isinstance(value, nn.Module) else str(value),
)
def test_logits_agree_with_float64(network, shape, caplog):
    largest, mean = errors(network, tile_of(*shape))
    assert not caplog.messages
    assert largest < LARGEST_ERROR
    assert mean < MEAN_ERROR


def test_convolutions_without_normalisation_keep_their_bias(caplog):
    network = unet((32, 64), norm_op=None, norm_op_kwargs=None)
    for layer in network.modules():
        if isinstance(layer, nn.Conv3d):
            nn.init.normal_(layer.bias, 0.0, 0.5)
    largest, mean = errors(network, tile_of(1, 1, 8, 12, 20))
    assert not caplog.messages
    assert largest < LARGEST_ERROR
    assert mean < MEAN_ERROR


def test_kernels_that_are_too_large_to_transform_are_multiplied_directly(monkeypatch):
    monkeypatch.setattr(program, "LARGEST_TRANSFORMED", 0)
    largest, mean = errors(unet(), tile_of(1, 1, 16, 24, 32))
    assert largest < LARGEST_ERROR / 3
    assert mean < MEAN_ERROR / 3


def test_air_is_normalised_like_by_torch():
    """A million equal voxels must not be rounded in one direction a million times."""
    tile = torch.full((1, 1, 40, 64, 64), -2.5)
    tile[:, :, 10:20, 20:40, 20:40] = tile_of(10, 20, 20)
    largest, mean = errors(unet((32, 64)), tile)
    assert largest < LARGEST_ERROR
    assert mean < MEAN_ERROR


@pytest.mark.parametrize("offset", [100.0, 10_000.0])
@pytest.mark.parametrize("kernels", [1, 3])
def test_features_far_from_zero_are_normalised_like_by_torch(kernels, offset):
    """Their variance is a small difference of large numbers; 1x1x1 kernels see no border."""
    network = unet((32, 64), kernels=kernels)
    tile = offset + torch.tensor([0.0, 0.1, 0.2, 0.4]).repeat(1, 1, 12, 16, 6)
    with inference_settings(CPU):
        logits = run_by_torch(network, tuple(tile.shape))(tile).double()
        exact = network.double()(tile.double())
        network.float()
    torchs = ((logits - exact).abs().max() / exact.std()).item()
    largest, _ = errors(network, tile)
    assert largest < max(LARGEST_ERROR, 3 * torchs)


def test_the_number_of_threads_changes_no_bit(monkeypatch):
    network, tile = unet(), tile_of(1, 1, 20, 28, 36)
    logits = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(module, "layer_threads", lambda threads=threads: threads)
        with inference_settings(CPU):
            logits.append(run_by_winograd(network, tuple(tile.shape))(tile))
    assert all(torch.equal(logits[0], other) for other in logits[1:])


def test_results_do_not_depend_on_earlier_tiles_or_a_release():
    network, tiles = unet((32, 64)), [tile_of(1, 1, 12, 16, 20, seed=seed) for seed in range(2)]
    with inference_settings(CPU):
        forward = run_by_winograd(network, tuple(tiles[0].shape))
        first = [forward(tile).clone() for tile in tiles]
        forward(torch.full_like(tiles[0], float("nan")))
        assert torch.equal(forward(tiles[0]), first[0])
        forward.release()
        assert torch.equal(forward(tiles[1]), first[1])
        flipped = torch.flip(tiles[0], (2, 4))
        assert torch.equal(forward(flipped), forward(flipped.clone()))
        assert torch.equal(forward(tiles[0].permute(0, 1, 2, 3, 4)), first[0])


@pytest.mark.parametrize(
    "tile",
    [
        torch.zeros(1, 1, 8, 8, 8),
        torch.zeros(1, 2, 12, 16, 20),
        torch.zeros(2, 1, 12, 16, 20),
        torch.zeros(1, 1, 12, 16, 20, dtype=torch.float16),
        torch.zeros(1, 1, 12, 16, 20, dtype=torch.float64),
        torch.zeros(1, 1, 0, 16, 20),
    ],
    ids=lambda tile: f"{tuple(tile.shape)} {tile.dtype}",
)
def test_tiles_of_another_shape_or_kind_are_refused(tile):
    forward = run_by_winograd(unet((32, 64)), (1, 1, 12, 16, 20))
    with pytest.raises(ValueError, match="prepared for float32"):
        forward.body(tile)


@pytest.mark.parametrize(
    ("network", "shape", "error"),
    [
        (unet((32, 64)), (7, 9, 11), "Sizes of tensors"),
        (residual((32, 64)), (8, 8, 7), "must match the size"),
        (residual((32, 64), strides=[2, 2]), (7, 8, 8), "must match the size"),
    ],
)
def test_sizes_that_strides_do_not_divide_are_left_to_torch(network, shape, error, caplog):
    with inference_settings(CPU):
        forward = run_by_winograd(network, (1, 1, *shape))
        with pytest.raises(RuntimeError, match=error):
            forward(tile_of(1, 1, *shape))
    assert "because of its strides" in caplog.text


def test_after_an_interruption_no_thread_writes_and_the_next_result_is_right():
    network, tile = unet((32, 64)), tile_of(1, 1, 40, 64, 64)
    running = []
    with inference_settings(CPU):
        forward = run_by_winograd(network, tuple(tile.shape))
        expected = forward(tile).clone()
        for moment in range(12):
            timer = threading.Timer(0.002 + 0.004 * moment, _thread.interrupt_main)
            timer.start()
            try:
                forward.body(tile)
                time.sleep(1)
            except KeyboardInterrupt:
                before = [array.copy() for array in forward.body._memory]
                time.sleep(0.02)
                same = map(np.array_equal, before, forward.body._memory, [True] * len(before))
                running.append(not all(same))
            timer.join()
            assert torch.equal(forward(tile), expected)
    assert running
    assert not any(running)


def test_an_error_in_one_thread_is_raised_after_all_have_ended():
    both, ended, first = threading.Barrier(2, timeout=10), [], []

    def call(work):
        both.wait()
        first.append(work)
        if first[0] is work:
            raise MemoryError
        time.sleep(0.2)
        ended.append(True)

    with pytest.raises(MemoryError):
        module.run_in_threads(call, 2, 16, owners=None)
    assert ended == [True]


def test_a_thread_that_begins_after_an_interruption_does_nothing():
    program_ = run_by_winograd(unet((32, 64)), (1, 1, 12, 16, 20)).body
    program_(tile_of(1, 1, 12, 16, 20))
    before = [array.copy() for array in program_._memory]
    counter, scratch = np.full(1, module.NO_MORE), np.zeros(program_._floats, np.float32)
    work = Work(counter=counter.ctypes.data, scratch=scratch.ctypes.data)
    for step in program_._steps:
        step.bind(program_._memory, 0, 0)(work)
    assert all(map(np.array_equal, before, program_._memory))


def test_without_a_compiler_torch_runs_with_a_warning(monkeypatch, caplog):
    monkeypatch.setattr(numba.config, "DISABLE_JIT", True)
    network, tile = unet((32, 64)), tile_of(1, 1, 8, 8, 8)
    with inference_settings(CPU):
        logits = run_by_winograd(network, tuple(tile.shape))(tile)
        assert torch.equal(logits, run_by_torch(network, tuple(tile.shape))(tile))
    assert "NUMBA_DISABLE_JIT" in caplog.text


def test_a_value_that_is_no_number_is_not_hidden():
    tile = tile_of(1, 1, 12, 16, 20)
    tile[0, 0, 5, 5, 5] = float("nan")
    with inference_settings(CPU):
        assert run_by_winograd(unet((32, 64)), tuple(tile.shape))(tile).isnan().any()


def test_the_weights_are_copied():
    network, tile = unet((32, 64)), tile_of(1, 1, 8, 8, 8)
    with inference_settings(CPU):
        forward = run_by_winograd(network, tuple(tile.shape))
        before = forward(tile).clone()
        for parameter in network.parameters():
            parameter.data.zero_()
        assert torch.equal(forward(tile), before)
    assert not keeps_weights(run_by_winograd)
    assert not keeps_weights(run_fastest)


@pytest.mark.parametrize("width", [16, 37, 64])
@pytest.mark.parametrize("classes", [2, 118])
@pytest.mark.skipif(not CONVERTS_HALVES, reason="the processor does not convert float16")
def test_weighted_logits_are_added_as_by_torch(width, classes):
    generator = torch.Generator().manual_seed(width)
    layer = nn.Conv3d(32, classes, 1)
    tile = torch.randn(5, 6, width, 32, generator=generator).permute(3, 0, 1, 2)
    weights = torch.rand(5, 6, width, generator=generator).half()
    around = torch.ones(classes, 7, 9, width + 5, dtype=torch.half)
    sums = around[:, 1:-1, 2:-1, 3:-2]
    with torch.inference_mode():
        logits = layer.double()(tile[None].double())[0]
        layer.float()
        expected = 1 + logits * weights
        last_layer(layer).add_to(sums, tile, weights)
    assert (sums - expected).abs().max() < 2**-9  # half of the distance of numbers below 4
    sums[:] = 1
    assert (around == 1).all()


def test_a_window_gives_the_same_sums_with_a_separate_last_layer():
    layer = nn.Conv3d(32, 5, 1)
    output = TileOutput(
        head=last_layer(layer),
        features=tile_of(1, 6, 7, 40, 32).permute(0, 4, 1, 2, 3),
    )
    separate = TileOutput(head=LastLayer(layer), features=output.features)
    weights = torch.rand(6, 7, 40).half()
    with inference_settings(CPU):
        rows = [sums.clone() for _, sums in output.weighted(weights)]
        (_, whole), *_ = separate.weighted(weights)
    assert torch.cat(rows, dim=1).shape == whole.shape
    assert (torch.cat(rows, dim=1) - whole).abs().max() < 2**-9


def test_features_that_are_in_use_have_memory_of_their_own():
    sizes, lasts = (8, 8, 1, 8, 2), (1, 4, 3, 4, 5)
    some = [features.Features(Shape(1, 1, size), 1, 1.0) for size in sizes]
    pieces = features.assign_places(list(map(features.Use, some, lasts)))
    for number, (one, last) in enumerate(zip(some, lasts, strict=True)):
        assert pieces[one.place] >= one.size
        for later, other in enumerate(some[number + 1 :], number + 1):
            assert later > last or other.place != one.place
    assert len(pieces) == 3


@pytest.mark.parametrize(
    "network",
    [
        unet((32, 64), norm_op=nn.BatchNorm3d),
        residual((32, 64), norm_op=nn.BatchNorm3d),
        residual((32, 64), block=BottleneckD, bottleneck_channels=16),
        without_stem(residual((1, 64))),
        unet((32, 64), nonlin=nn.GELU, nonlin_kwargs={}),
        unet((32, 64), nonlin_first=True),
        nn.Sequential(nn.Conv3d(1, 3, 3, padding=1)).eval(),
    ],
    ids=lambda network: type(network).__name__,
)
def test_other_networks_run_by_torch_with_a_warning(network, caplog):
    tile = tile_of(1, 1, 8, 8, 8)
    with inference_settings(CPU):
        logits = run_by_winograd(network, tuple(tile.shape))(tile)
        assert torch.equal(logits, run_by_torch(network, tuple(tile.shape))(tile))
    (message,) = caplog.messages
    assert message.startswith("Backend winograd can't run ")


def test_a_network_with_few_features_runs_by_another_backend_without_a_word(monkeypatch, caplog):
    monkeypatch.setattr("totalfast.backends.fastest.openvino_is_installed", lambda: False)
    tile = tile_of(1, 1, 8, 8, 8)
    with caplog.at_level(logging.INFO, logger="totalfast"), inference_settings(CPU):
        few, many = (unet((count, 32)) for count in (4, 8))
        assert torch.equal(run_fastest(few, tuple(tile.shape))(tile), few(tile))
        assert type(run_fastest(many, tuple(tile.shape)).body) is program.Program
    assert not caplog.messages


def test_the_registers_of_processors_are_known():
    assert lanes_of(frozenset({"avx512f", "avx2", "fma"})) == 16
    assert lanes_of(frozenset({"avx2", "fma"})) == 8
    assert lanes_of(frozenset({"avx2"})) == 4
    assert lanes_of(frozenset({"neon"})) == 4


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names x86 processors")
@pytest.mark.parametrize(
    ("processor", "lanes"),
    [("haswell +avx2,+fma,+avx,+f16c,+bmi,+bmi2,+sse4.2", 8), ("nehalem +sse4.2,+popcnt", 4)],
)
def test_loops_are_right_on_processors_with_smaller_registers(processor, lanes, tmp_path):
    name, instructions = processor.split()
    program = """
        import torch
        from tests.unit.test_winograd import errors, tile_of, unet
        from totalfast.backends.winograd.vectors import LANES
        print(LANES, *errors(unet((32, 64)), tile_of(1, 1, 10, 12, 22)))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env={
            **os.environ,
            "NUMBA_CPU_NAME": name,
            "NUMBA_CPU_FEATURES": instructions,
            "NUMBA_CACHE_DIR": str(tmp_path),
        },
        capture_output=True,
        text=True,
        check=True,
    )
    used, largest, mean = map(float, done.stdout.split())
    assert used == lanes
    assert largest < LARGEST_ERROR
    assert mean < MEAN_ERROR
