"""Time the backend winograd against torch and OpenVINO: layers, and whole tiles of a model.

    python scripts/benchmark_winograd.py --json FILE [--repeats 5] [--processor haswell]

All programs run in turn on the same random numbers; the best of several repeats counts. Weights are
random: the time does not depend on them. The networks are those of TotalSegmentator's models of
3 mm (112x112x128 voxels, 5 stages) and 1.5 mm (128x128x128, 6 stages), and nnU-Net's residual
encoder U-Net in its size L on the latter tiles.

- Layers: torch's convolution alone; winograd's with the normalisation and leaky ReLU of its input.
  A layer "32+32" reads two features, one after the other.
- Tiles: without the last layer. The steps of winograd's tile are listed with their share of the
  processor's peak, where "work" counts the multiplications of the method itself.
- Errors: of the logits against float64, as a share of their standard deviation, on a small tile.

``--processor haswell`` times winograd as on processors with AVX2 only; torch is limited too, and
OpenVINO is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.benchmark_command import machine

LIMITS = {
    "haswell": {
        "NUMBA_CPU_NAME": "haswell",
        "NUMBA_CPU_FEATURES": "+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+sse4.2,+popcnt,+lzcnt",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
    }
}
"""Name of a processor to the environment variables that limit libraries to its instructions."""

LAYERS = (
    ((32,), 32, (112, 112, 128)),
    ((32, 32), 32, (112, 112, 128)),
    ((64,), 64, (56, 56, 64)),
    ((64, 64), 64, (56, 56, 64)),
    ((128,), 128, (28, 28, 32)),
    ((256,), 256, (16, 16, 16)),
)
"""Inputs, outputs, and voxels."""

MODELS = {
    "3 mm": ((32, 64, 128, 256, 320), (112, 112, 128)),
    "1.5 mm": ((32, 64, 128, 256, 320, 320), (128, 128, 128)),
    "residual": ((32, 64, 128, 256, 320, 320), (128, 128, 128)),
}
"""Name to the features of its stages, and the voxels of its tiles."""

RESIDUAL_BLOCKS = (1, 3, 4, 6, 6, 6)
"""Per stage of the model "residual" (nnU-Net's ResEncUNetPlanner)."""


def network(name: str) -> Any:
    """Build a model's network with random weights."""
    import torch
    from dynamic_network_architectures.architectures import unet

    torch.manual_seed(0)
    features, kind, blocks = MODELS[name][0], unet.PlainConvUNet, {"n_conv_per_stage": 2}
    if name == "residual":
        kind, blocks = unet.ResidualEncoderUNet, {"n_blocks_per_stage": RESIDUAL_BLOCKS}
    return kind(
        input_channels=1,
        n_stages=len(features),
        features_per_stage=features,
        conv_op=torch.nn.Conv3d,
        kernel_sizes=3,
        strides=[1] + [2] * (len(features) - 1),
        num_classes=25,
        n_conv_per_stage_decoder=1 if name == "residual" else 2,
        conv_bias=True,
        norm_op=torch.nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=torch.nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        **blocks,
    ).eval()


def best(functions: dict[str, Any], repeats: int) -> dict[str, float]:
    """Best time of each function; they run in turn, after one call that is not timed."""
    for function in functions.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - began)
    return {name: round(min(each), 4) for name, each in times.items()}


def peak_gflops() -> float:
    """Most floating-point operations per second of products whose numbers are all in a cache."""
    import numba
    import numpy as np

    from totalfast.backends.winograd.products import BLOCK, ROWS, multiply
    from totalfast.backends.winograd.threads import layer_threads, run_in_threads

    terms, times = 64, 20_000

    @numba.njit(nogil=True)
    def many(a: int, b: int, c: int) -> None:
        for _ in range(times):
            multiply(a, terms * 4, b, c, BLOCK * 4, ROWS, BLOCK, terms, True)

    arrays = [np.ones(size, dtype=np.float32) for size in (ROWS * terms, terms * BLOCK)]
    targets = [np.ones(ROWS * BLOCK + 32, dtype=np.float32) for _ in range(layer_threads())]

    def run() -> None:
        free = list(targets)
        run_in_threads(
            lambda work: many(*(one.ctypes.data for one in (*arrays, free.pop()))),
            len(targets),
            1,
            owners=None,
        )

    seconds = best({"products": run}, 5)["products"]
    return 2e-9 * ROWS * BLOCK * terms * times * len(targets) / seconds


def time_layers(repeats: int) -> list[dict[str, Any]]:
    """Time single convolutions of stride 1."""
    import numpy as np
    import torch

    from totalfast.backends.winograd import program
    from totalfast.backends.winograd.features import Features
    from totalfast.backends.winograd.layers import PIECES, Shape
    from totalfast.backends.winograd.network import Convolution
    from totalfast.backends.winograd.threads import layer_threads, run_in_threads

    found = []
    for inputs, outputs, voxels in LAYERS:
        layer = torch.nn.Conv3d(sum(inputs), outputs, 3, padding=1)
        image = torch.randn(1, sum(inputs), *voxels)
        convolution = Convolution(
            weight=layer.weight.detach().numpy(),
            bias=np.zeros(outputs, dtype=np.float32),
            stride=(1, 1, 1),
            padding=(1, 1, 1),
            normalisation=None,
            slope=0.01,
        )
        sources = tuple(Features(Shape(*voxels), count, 0.01) for count in inputs)
        step = program._convolution(convolution, sources, Shape(*voxels))
        memory = []
        for number, each in enumerate((*sources, step.target)):
            each.place = number
            memory.append(np.random.default_rng(number).random(each.size, dtype=np.float32))
        sums = np.zeros((PIECES, 2, outputs))
        call = step.bind(memory, 0, sums.ctypes.data)

        def winograd(call: Any = call, scratch: int = step.scratch) -> None:
            run_in_threads(call, layer_threads(), scratch, owners=None)

        def by_torch(layer: Any = layer, image: Any = image) -> None:
            layer(image)

        seconds = best({"torch": by_torch, "winograd": winograd}, repeats)
        work = 2e-9 * 27 * sum(inputs) * outputs * np.prod(voxels)
        found.append(
            {
                "inputs": "+".join(map(str, inputs)),
                "outputs": outputs,
                "voxels": voxels,
                "seconds": seconds,
                "torch_over_winograd": round(seconds["torch"] / seconds["winograd"], 2),
                "gflop_of_a_direct_convolution": round(float(work), 1),
            }
        )
        print(found[-1], flush=True)
    return found


def time_steps(run: Any, tile: Any) -> list[dict[str, Any]]:
    """Time the steps of one tile, the last of two."""
    from totalfast.backends.winograd import program

    times: list[float] = []
    original = program.Program._run

    def timed(self: Any, call: Any, owners: Any) -> None:
        began = time.perf_counter()
        original(self, call, owners)
        times.append(time.perf_counter() - began)

    program.Program._run = timed
    try:
        run(tile)
        times.clear()
        run(tile)
    finally:
        program.Program._run = original
    steps = [
        {
            "inputs": "+".join(str(source.count) for source in step.sources) or "image",
            "outputs": step.target.count,
            "voxels": tuple(step.target.shape),
            "seconds": round(seconds, 4),
        }
        for step, seconds in zip(run._steps, times, strict=False)
    ]
    return [*steps, {"last normalisation": True, "seconds": round(times[-1], 4)}]


def time_tiles(repeats: int, *, with_openvino: bool) -> dict[str, Any]:
    """Time whole tiles without the last layer."""
    import torch

    from totalfast.backends.forward import run_by_torch
    from totalfast.backends.openvino import run_by_openvino, run_in_bfloat16
    from totalfast.backends.winograd import run_by_winograd

    found: dict[str, Any] = {}
    for name, (_, voxels) in MODELS.items():
        unet, shape = network(name), (1, 1, *voxels)
        tile = torch.randn(shape)
        backends = {"torch": run_by_torch, "winograd": run_by_winograd}
        if with_openvino:
            backends |= {"openvino": run_by_openvino, "openvino in bfloat16": run_in_bfloat16}
        runs = {backend: run(unet, shape).body for backend, run in backends.items()}
        seconds = best({key: partial(run, tile) for key, run in runs.items()}, repeats)
        found[name] = {
            "seconds": seconds,
            "winograd_over": {
                other: round(seconds["winograd"] / seconds[other], 3)
                for other in seconds
                if other != "winograd"
            },
            "megabytes_of_features": round(sum(runs["winograd"]._sizes) * 4 / 1e6),
            "steps": time_steps(runs["winograd"], tile),
        }
        print(name, found[name]["seconds"], found[name]["winograd_over"], flush=True)
    return found


def find_errors(*, with_openvino: bool) -> dict[str, Any]:
    """Compare the logits of a small tile of the 3 mm model with float64."""
    import torch

    from totalfast.backends.forward import run_by_torch
    from totalfast.backends.openvino import run_by_openvino, run_in_bfloat16
    from totalfast.backends.winograd import run_by_winograd

    unet, tile = network("3 mm"), torch.randn(1, 1, 64, 64, 64)
    backends = {"torch": run_by_torch, "winograd": run_by_winograd}
    if with_openvino:
        backends |= {"openvino": run_by_openvino, "openvino in bfloat16": run_in_bfloat16}
    logits = {name: run(unet, tuple(tile.shape))(tile).double() for name, run in backends.items()}
    exact = unet.double()(tile.double())
    found = {}
    for name, each in logits.items():
        error = (each - exact) / exact.std()
        found[name] = {
            "largest": error.abs().max().item(),
            "mean": error.square().mean().sqrt().item(),
            "labels_that_differ": int((each.argmax(1) != exact.argmax(1)).sum()),
            "labels": exact[0, 0].numel(),
        }
    return found


def measure(repeats: int, processor: str | None) -> dict[str, Any]:
    """Time everything in this process."""
    import torch

    from totalfast.backends.winograd.vectors import LANES
    from totalfast.system.cores import network_threads

    torch.set_num_threads(network_threads())
    with torch.inference_mode():
        return {
            "weights": "random",
            "limited_to": processor,
            "floats_in_a_register": LANES,
            "threads": network_threads(),
            "peak_gflops": round(peak_gflops()),
            "errors_of_logits": find_errors(with_openvino=processor is None),
            "layers": time_layers(repeats),
            "tiles": time_tiles(repeats, with_openvino=processor is None),
            "machine": machine(),
        }


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, required=True, help="write the results to this file")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--processor", choices=sorted(LIMITS), help="limit the instructions")
    args = parser.parse_args()
    limits = LIMITS.get(args.processor, {})
    if limits and os.environ.get("NUMBA_CPU_NAME") != limits["NUMBA_CPU_NAME"]:
        command = [sys.executable, *sys.argv]
        return subprocess.run(command, env={**os.environ, **limits}, check=False).returncode
    args.json.write_text(json.dumps(measure(args.repeats, args.processor), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
