"""Time tiles of the official networks with one setting of torch or cuDNN.

    python measure_network.py SETTING DEVICE LABELS

One process per setting: cuDNN keeps a plan once chosen, so a search after a run without one would
search nothing. The networks have random weights and a smooth input. The argmax is written to the
folder LABELS, as ``MODEL.npy``; labels of the first setting that are there already are compared.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from measuring import SCRIPTS, answer, my_turn, peak_mb, synchronised, torch_device

sys.path.insert(0, str(SCRIPTS))

import numpy as np
import torch
from standin_models import recipe_for
from standin_network import build_network, randomise

MODELS = {"3 mm, 118 classes": 297, "1.5 mm, 25 classes": 291}
REPEATS = 8


class NormPerChannel(torch.nn.Module):
    """Instance norm from elementary operations, which keep the layout "channels last"."""

    def __init__(self, norm: torch.nn.InstanceNorm3d) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise each channel of (batch, channels, z, y, x), with statistics in float32."""
        variance, mean = torch.var_mean(x.float(), dim=(2, 3, 4), correction=0, keepdim=True)
        weight, bias = (p.view(1, -1, 1, 1, 1) for p in (self.norm.weight, self.norm.bias))
        scale = weight * torch.rsqrt(variance + self.norm.eps)
        return x * scale.to(x.dtype) + (bias - mean * scale).to(x.dtype)


def with_own_norms(module: torch.nn.Module) -> torch.nn.Module:
    """Replace all instance norms, in place. Blocks hold a norm under two names."""
    for name, child in list(module.named_children()):
        if isinstance(child, torch.nn.InstanceNorm3d):
            setattr(module, name, NormPerChannel(child))
        elif not isinstance(child, NormPerChannel):
            with_own_norms(child)
    return module


def smooth_input(patch: tuple[int, ...]) -> torch.Tensor:
    """A smooth random image of one tile, (1, 1, z, y, x)."""
    random = torch.Generator().manual_seed(1)
    coarse = torch.randn(1, 1, *(max(n // 8, 2) for n in patch), generator=random)
    return torch.nn.functional.interpolate(coarse, patch, mode="trilinear")


def prepared(setting: str, network: Any, tile: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """Apply a setting; return a function that runs the network, and its input."""
    words = setting.split(", ")
    torch.backends.cudnn.benchmark = "search" in words
    torch.backends.cudnn.deterministic = "deterministic" in words
    if "batch 2" in words:
        tile = tile.repeat(2, 1, 1, 1, 1)
    if "channels last" in words:
        network = with_own_norms(network).to(memory_format=torch.channels_last_3d)
        tile = tile.to(memory_format=torch.channels_last_3d)
    if "compile" in words:
        network = torch.compile(network, dynamic=False)
    if "CUDA graph" in words and tile.is_cuda:
        return captured(network, tile), tile
    return network, tile


def captured(network: Any, tile: torch.Tensor) -> Any:
    """Record the kernels of one tile; return a function that runs them again."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            network(tile)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = network(tile)

    def replay(_: torch.Tensor) -> torch.Tensor:
        graph.replay()
        return result

    return replay


def measure(setting: str, number: int, device: torch.device, stored: Path) -> dict[str, Any]:
    """Seconds of the first tile, milliseconds of later ones, peak memory, differing labels."""
    recipe = recipe_for(number, tiny=device.type == "cpu", shown_as={})
    network = build_network(recipe)
    randomise(network, number)
    network = network.to(device).eval()
    tile = smooth_input(recipe.model.patch_zyx).to(device)
    began = synchronised()
    network, tile = prepared(setting, network, tile)
    logits = network(tile)
    row: dict[str, Any] = {"first_tile_s": round(synchronised() - began, 3)}
    network(tile)
    began = synchronised()
    for _ in range(REPEATS):
        network(tile)
    seconds = (synchronised() - began) / REPEATS / len(tile)
    row |= {"ms_per_tile": round(1e3 * seconds, 2), "peak_mb": peak_mb()}
    labels = logits[0].float().argmax(0).to(torch.uint8).cpu().numpy()
    path = stored / f"{number}.npy"
    if path.exists():
        row["differing"] = int(np.count_nonzero(labels != np.load(path)))
    else:
        np.save(path, labels)
    return row | {"voxels": labels.size, "classes": len(np.unique(labels))}


def main() -> None:
    """Measure both networks."""
    setting, device, stored = sys.argv[1], torch_device(sys.argv[2]), Path(sys.argv[3])
    my_turn()
    rows = {}
    with torch.inference_mode(), torch.autocast("cuda", enabled=device.type == "cuda"):
        if device.type == "cuda":
            torch.nn.Conv3d(1, 1, 1).to(device)(torch.zeros(1, 1, 8, 8, 8, device=device))
        for name, number in MODELS.items():
            rows[name] = measure(setting, number, device, stored)
            answer(rows)
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    main()
