from __future__ import annotations

import gc
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet

import totalfast
from tests.mapped_files import resident_kb
from totalfast import OptionError, backends
from totalfast.backends import choose_backend, compiled, openvino, resolve_backend, winograd
from totalfast.backends.forward import run_by_torch
from totalfast.backends.norms import normalised_in_place
from totalfast.engine.sliding_window import inference_settings, predict_labels
from totalfast.engine.tiles import Tiling
from totalfast.models.loading import load_model
from totalfast.options import Options
from totalfast.system.cache_folder import FOLDER_VARIABLE

CPU = torch.device("cpu")
TILE = (1, 1, 16, 16, 16)

needs_openvino = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="OpenVINO is not installed"
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv(FOLDER_VARIABLE, str(folder))
    return folder


@pytest.fixture(scope="module")
def folder(standin_home):
    return next((standin_home / "nnunet/results").glob("Dataset297*/*"))


@pytest.fixture
def installed(monkeypatch):
    """A switch: whether OpenVINO seems to be installed."""
    return lambda there: monkeypatch.setattr(backends, "openvino_is_installed", lambda: there)


def small_network(dimensions: int = 3) -> torch.nn.Module:
    torch.manual_seed(dimensions)
    network = PlainConvUNet(
        input_channels=1,
        n_stages=2,
        features_per_stage=(4, 8),
        conv_op=(torch.nn.Conv2d, torch.nn.Conv3d)[dimensions - 2],
        kernel_sizes=3,
        strides=(1, 2),
        n_conv_per_stage=1,
        num_classes=5,
        n_conv_per_stage_decoder=1,
        conv_bias=True,
        norm_op=(torch.nn.InstanceNorm2d, torch.nn.InstanceNorm3d)[dimensions - 2],
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=torch.nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
    )
    return network.eval()


def logits_of_both(backend, network, tile):
    """A tile's logits from torch and from another backend."""
    with inference_settings(CPU):
        forward = backend(network, tuple(tile.shape))
        logits = forward(tile)
        forward.release()
        return run_by_torch(network, tuple(tile.shape))(tile), logits


@pytest.mark.parametrize("dimensions", [2, 3])
def test_torch_drops_skip_connections_after_reading_and_changes_no_bit(dimensions):
    network = small_network(dimensions)
    tile = torch.randn((1, 1, *[16] * dimensions), generator=torch.Generator().manual_seed(1))
    given, left = [], []
    network.decoder.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0]))
    network.decoder.stages[-1].register_forward_pre_hook(
        lambda module, inputs: left.append(list(given[-1]))
    )
    with inference_settings(CPU):
        expected, logits = network(tile), run_by_torch(network, tuple(tile.shape))(tile)
    assert torch.equal(logits, expected)
    plain, forgetful = left
    assert [answer is None for answer in plain] == [False, False]
    assert forgetful == [None, None]


@pytest.mark.parametrize("kind", [torch.nn.InstanceNorm2d, torch.nn.InstanceNorm3d])
@pytest.mark.parametrize("affine", [True, False])
def test_normalisation_in_place_gives_identical_bits(kind, affine):
    generator = torch.Generator().manual_seed(0)
    network = torch.nn.Sequential(kind(8, affine=affine)).eval()
    with torch.inference_mode():
        for parameter in network.parameters():
            parameter.normal_(generator=generator)
        sizes = [20] * (2 if kind is torch.nn.InstanceNorm2d else 3)
        image = 5 * torch.randn(1, 8, *sizes, generator=generator) + 3
        expected = network(image)
        before = image.clone()
        other = normalised_in_place(network)
        assert other(image) is image
        assert torch.equal(image, expected)
        assert torch.equal(network(before), expected)
        # A batch of two images uses torch's own normalisation.
        pair = torch.cat([before, 2 * before])
        assert torch.equal(other(pair), network(pair))


@pytest.mark.parametrize(
    ("fast", "there", "name", "told"),
    [
        (True, True, "run_fastest", "Winograd's convolutions"),
        (True, False, "run_fastest", "Winograd's convolutions"),
        (False, True, "run_by_openvino", "OpenVINO"),
        (False, False, "run_by_torch", None),
    ],
)
def test_auto_is_the_fastest_on_cpus_and_logs_this(
    fast, there, name, told, installed, monkeypatch, caplog
):
    monkeypatch.delenv(backends.DEFAULT_VARIABLE)
    monkeypatch.setattr(winograd, "is_fast_here", lambda: fast)
    installed(there)
    with caplog.at_level(logging.INFO, logger="totalfast"):
        assert choose_backend("auto", torch.device("cuda")) is run_by_torch
        assert choose_backend("auto", torch.device("mps")) is run_by_torch
        assert choose_backend("torch", CPU) is run_by_torch
        assert not caplog.messages
        assert choose_backend("auto", CPU).__name__ == name
    if told is None:
        assert not caplog.messages
    else:
        (message,) = caplog.messages
        assert told in message
        assert "--backend torch" in message


def test_the_environment_variable_changes_auto_only(installed, monkeypatch):
    installed(True)
    monkeypatch.setenv(backends.DEFAULT_VARIABLE, "compile")
    assert choose_backend("auto", CPU).__name__ == "run_compiled"
    assert choose_backend("torch", CPU) is run_by_torch
    monkeypatch.setenv(backends.DEFAULT_VARIABLE, "fastest")
    with pytest.raises(
        OptionError, match="one of auto, torch, compile, openvino, winograd, not 'f"
    ):
        resolve_backend("auto")


def test_unusable_backends_are_refused_before_any_work(installed):
    installed(False)
    with pytest.raises(OptionError, match=r"pip install 'totalfast\[cpu\]'"):
        totalfast.segment("scan.nii.gz", backend="openvino")
    installed(True)
    with pytest.raises(OptionError, match="on device 'cpu' only, not cuda"):
        choose_backend("openvino", torch.device("cuda", 0))
    with pytest.raises(OptionError, match="not mps"):
        choose_backend("compile", torch.device("mps"))


@pytest.mark.parametrize("usable", [True, False])
def test_torchs_compiled_code_is_in_a_private_folder(cache, monkeypatch, tmp_path, usable):
    monkeypatch.delenv(compiled.PLACE_VARIABLE, raising=False)
    if not usable:
        cache.mkdir(mode=0o777)
        cache.chmod(0o777)
    compiled._temporary_folder.cache_clear()
    compiled.run_compiled(torch.nn.Conv3d(1, 2, 1), TILE)
    place = Path(os.environ[compiled.PLACE_VARIABLE])
    assert place.stat().st_mode & 0o077 == 0
    assert (place.parent == cache) is usable
    shutil.rmtree(place)
    compiled._temporary_folder.cache_clear()
    monkeypatch.setenv(compiled.PLACE_VARIABLE, str(tmp_path / "own"))
    compiled.run_compiled(torch.nn.Conv3d(1, 2, 1), TILE)
    assert os.environ[compiled.PLACE_VARIABLE] == str(tmp_path / "own")


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch needs a C++ compiler")
def test_compiled_network_agrees(caplog):
    network = torch.nn.Sequential(
        torch.nn.Conv3d(1, 4, 3), torch.nn.InstanceNorm3d(4), torch.nn.LeakyReLU(0.1)
    )
    tile = torch.randn(TILE, generator=torch.Generator().manual_seed(0))
    torch._dynamo.reset()
    expected, logits = logits_of_both(choose_backend("compile", CPU), network, tile)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert "runs uncompiled" not in caplog.text


def test_a_session_can_compile_more_networks_than_torchs_default(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for _ in range(9):
        network = torch.nn.Sequential(torch.nn.Conv3d(1, 2, 3))
        expected, logits = logits_of_both(choose_backend("compile", CPU), network, torch.ones(TILE))
        assert torch.equal(logits, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 9


def test_without_a_compiler_a_network_runs_uncompiled(monkeypatch, caplog):
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    monkeypatch.setattr(config, "force_disable_caches", True)
    network = torch.nn.Sequential(torch.nn.Conv3d(1, 3, 3), torch.nn.ELU(0.123))
    torch._dynamo.reset()
    expected, logits = logits_of_both(choose_backend("compile", CPU), network, torch.ones(TILE))
    assert torch.equal(logits, expected)
    assert len([m for m in caplog.messages if "runs uncompiled" in m]) == 1


class Unsupported(torch.nn.Module):
    """A network with an operation that OpenVINO does not have."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv3d(1, 2, 1)

    def forward(self, tile):
        return torch.special.bessel_j0(self.layer(tile))


@needs_openvino
@pytest.mark.parametrize("dimensions", [2, 3])
def test_openvino_agrees_in_float32_and_does_not_change_the_process(dimensions):
    tile = torch.randn(TILE[: dimensions + 2], generator=torch.Generator().manual_seed(0))
    expected, logits = logits_of_both(
        choose_backend("openvino", CPU), small_network(dimensions), tile
    )
    # The error of bfloat16, the default on some CPUs, is a hundred times larger.
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    subnormal = torch.full((100000,), 1e-40)
    assert torch.all(subnormal * 1.0 > 0)
    assert np.float32(1e-40) * np.float32(0.5) > 0
    if hasattr(os, "sched_getaffinity"):
        assert len(os.sched_getaffinity(0)) > 1 or os.cpu_count() == 1


@needs_openvino
def test_openvino_normalises_scans_with_much_air_like_torch():
    network = torch.nn.Sequential(torch.nn.Conv3d(1, 16, 3), torch.nn.InstanceNorm3d(16)).eval()
    tile = torch.full((1, 1, 100, 100, 100), -1.2)
    tile[..., 40:60, 40:60, 40:60] = torch.randn(20, generator=torch.Generator().manual_seed(0))
    expected, logits = logits_of_both(choose_backend("openvino", CPU), network, tile)
    # The error of OpenVINO's own normalisation is more than a hundred times larger.
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()


@needs_openvino
def test_openvino_computes_in_float32():
    forward = choose_backend("openvino", CPU)(small_network(), TILE)
    (run,) = forward.body.args
    assert run.compiled.get_property("INFERENCE_PRECISION_HINT").to_string() == "f32"
    assert run.compiled.get_property("CPU_DENORMALS_OPTIMIZATION") is False


@needs_openvino
def test_bfloat16_is_used_only_if_it_is_asked_for(caplog):
    network = small_network()
    tile = torch.randn(TILE, generator=torch.Generator().manual_seed(1))
    with caplog.at_level(logging.INFO, logger="totalfast"):
        backend = choose_backend(backends.BFLOAT16, CPU)
    (message,) = caplog.messages
    expected, logits = logits_of_both(backend, network, tile)
    error = (logits - expected).abs().max() / expected.std()
    if openvino.has_bfloat16():
        assert "compute in bfloat16" in message
        assert 1e-4 < error < 0.2
    else:
        assert "no bfloat16" in message
        assert error < 1e-4
    assert not backends.keeps_weights(backend)


def test_precision_needs_openvino_and_a_cpu(installed):
    installed(True)
    assert Options(precision="bf16").network_backend == backends.BFLOAT16
    assert Options(backend="winograd").network_backend == "winograd"
    with pytest.raises(OptionError, match="precision bf16 is OpenVINO's; .* backend 'torch'"):
        Options(precision="bf16", backend="torch")
    with pytest.raises(OptionError, match="must be 'f32' or 'bf16'"):
        Options(precision="f16")
    with pytest.raises(OptionError, match="does not exist; precision 'bf16' asks for it"):
        Options(backend=backends.BFLOAT16)
    with pytest.raises(OptionError, match="precision bf16 runs on device 'cpu' only, not cuda"):
        choose_backend(backends.BFLOAT16, torch.device("cuda"))
    installed(False)
    with pytest.raises(OptionError, match="precision bf16 needs OpenVINO"):
        choose_backend(backends.BFLOAT16, CPU)


@needs_openvino
def test_openvino_neither_joins_features_nor_transposes_its_output():
    forward = choose_backend("openvino", CPU)(small_network(), TILE)
    (run,) = forward.body.args
    model = run.compiled.get_runtime_model()
    kinds = [node.get_rt_info()["layerType"].astype(str) for node in model.get_ops()]
    assert kinds.count("Convolution") == 4  # two in the encoder, two halves in the decoder
    assert "Concatenation" not in kinds
    assert "Transpose" not in kinds


@needs_openvino
@pytest.mark.parametrize("dimensions", [2, 3])
def test_openvinos_outputs_stay_valid_after_the_next_tile_and_a_release(dimensions):
    network = small_network(dimensions)
    tile = torch.randn(TILE[: dimensions + 2], generator=torch.Generator().manual_seed(0))
    with inference_settings(CPU):
        forward = choose_backend("openvino", CPU)(network, tuple(tile.shape))
        first = forward(tile)
        kept = first.clone()
        other = forward(-tile)
        forward.release()
        again = forward(tile)
    assert torch.equal(first, kept)
    assert not torch.equal(other, kept)
    assert torch.equal(again, kept)


@needs_openvino
def test_labels_agree_with_torchs_and_a_second_load_converts_nothing(folder, cache, monkeypatch):
    from totalfast.backends import openvino

    torchs = load_model(folder, folds=(0,), device=CPU)
    first = load_model(folder, folds=(0,), device=CPU, backend=choose_backend("openvino", CPU))
    monkeypatch.setattr(
        openvino, "convert_network", lambda *_, **__: pytest.fail("converted again")
    )
    second = load_model(folder, folds=(0,), device=CPU, backend=choose_backend("openvino", CPU))
    assert len(list(cache.iterdir())) == 1
    image = torch.randn((1, 90, 60, 70), generator=torch.Generator().manual_seed(0))
    expected, labels, again = (
        predict_labels(model, image, Tiling(step=0.8)) for model in (torchs, first, second)
    )
    assert torch.equal(labels, again)
    assert (labels != expected).float().mean() < 1e-3


@pytest.mark.parametrize("mirror_axes", [(), (0, 2)])
def test_winograds_labels_agree_with_torchs_on_several_tiles(folder, mirror_axes):
    image = torch.randn((1, 40, 70, 50), generator=torch.Generator().manual_seed(3))
    labels = []
    for backend in (run_by_torch, winograd.run_by_winograd):
        model = load_model(folder, folds=[0], device=CPU, backend=backend)
        labels.append(predict_labels(model, image, Tiling(step=0.5, mirror_axes=mirror_axes)))
    assert labels[0].unique().numel() > 3
    assert (labels[0] != labels[1]).sum() <= 0.0005 * labels[0].numel()


@needs_openvino
def test_an_entry_that_is_removed_before_it_is_read_is_converted_again(cache, monkeypatch, caplog):
    from totalfast.backends import openvino

    found = openvino.cached_folder

    def removed(*arguments):
        folder = found(*arguments)
        shutil.rmtree(folder)
        return folder

    monkeypatch.setattr(openvino, "cached_folder", removed)
    tile = torch.ones(TILE)
    expected, logits = logits_of_both(choose_backend("openvino", CPU), small_network(), tile)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert "can't run" not in caplog.text


@needs_openvino
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
def test_openvino_keeps_neither_the_trace_nor_the_weights_file_in_memory(cache):
    from totalfast.backends.openvino import run_by_openvino

    gc.collect()
    gc.disable()  # it could free the weights by chance
    try:
        network = small_network()
        weights = [weakref.ref(tensor) for tensor in network.parameters()]
        forward = run_by_openvino(network, TILE)
        del network
        assert not any(tensor() is not None for tensor in weights)
    finally:
        gc.enable()
    assert list(cache.glob("*/model.bin"))
    assert resident_kb(cache) == 0
    assert forward(torch.zeros(TILE)).shape == (1, 5, *TILE[2:])


@needs_openvino
def test_unsupported_networks_run_by_torch_and_are_not_cached(cache, caplog):
    expected, logits = logits_of_both(
        choose_backend("openvino", CPU), Unsupported(), torch.ones(TILE)
    )
    assert torch.equal(logits, expected)
    (message,) = caplog.messages
    assert message.startswith("OpenVINO can't run Unsupported, so torch does: ")
    assert "bessel_j0" in message
    assert not cache.exists()


WATCHED = """
import sys

asked = []


def watch(event, arguments):
    # OpenVINO's telemetry connects from forked processes.
    if event.startswith(("socket.getaddrinfo", "socket.gethostby", "socket.connect", "os.fork")):
        asked.append((event, arguments))
        raise OSError(f"not allowed: {event} {arguments}")


sys.addaudithook(watch)
import torch
from totalfast.backends.openvino import run_by_openvino

network = torch.nn.Conv3d(1, 2, 3).eval()
forward = run_by_openvino(network, (1, 1, 8, 8, 8))
with torch.inference_mode():
    assert torch.allclose(forward(torch.ones(1, 1, 8, 8, 8)), network(torch.ones(1, 1, 8, 8, 8)))
assert type(forward.body).__name__ == "partial", "torch ran it"
assert "openvino" in sys.modules
loaded = [name for name in sys.modules if name.startswith("openvino_telemetry")]
assert not asked, asked
assert not loaded, loaded
"""


@needs_openvino
def test_openvino_opens_no_connection(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    # OpenVINO sends no telemetry in CI, which it detects by these variables.
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("CI", "TF_BUILD", "JENKINS_URL")
    } | {"HOME": str(home), "USERPROFILE": str(home), "XDG_CACHE_HOME": str(home / "cache")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WATCHED],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [path.name for path in home.iterdir() if path.name != "cache"] == []
