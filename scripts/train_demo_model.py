"""Train the small model of ``totalfast demo`` on synthetic phantoms.

    python scripts/train_demo_model.py WORK [--output totalfast/demo/model]

WORK is a folder for files that a second call uses again: the phantoms (about 800 MB) and the
trained layers below full resolution. The result has the layout of TotalSegmentator's 3 mm model (id
297, 118 channels), but its network is 30 times smaller. The training takes half an hour on two
cores. Equal seeds give equal weights on equal machines. The printed log is stored in
scripts/results.

The labels are those of the 1.5 mm phantom. The loss of each step uses some thousand voxels, chosen
so that small structures have enough weight. The training has four parts:

1. The layers below half resolution. A step is cheap, and the network learns the layout of the body.
2. The layers below full resolution, with features interpolated at the chosen voxels. 3. The
full-resolution layers alone, which learn the borders. Their kernels are one voxel, so they are
computed at the chosen voxels only, most of which lie at borders. 4. The biases, which get the
frequencies of the classes, because the choice of voxels changed them.

The logits are interpolated as in ``--export linear``.

Other options than the default ones train networks for ``measure_guided.py``: on coarser voxels, or
on tiles that hold a part of a phantom, or on whole bodies.
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from numpy.typing import NDArray

    from totalfast.demo.phantom import Phantom

Untyped: TypeAlias = Any  # nnU-Net has no types

MODEL_ID, CLASSES = 297, 118
FIRST_SEED = 1000
"""First seed of the phantoms for training; the shown and scored ones have lower seeds."""
FEATURES = (16, 32, 48, 52, 56, 48)
"""Features per stage. oneDNN pads them to whole vectors: 20 need twice the memory of 16."""
CONVOLUTIONS = (1, 1, 1, 1, 2, 1)
DECODER_CONVOLUTIONS = (1, 1, 1, 1, 2)
LOW_HU, HIGH_HU, MEAN_HU, STD_HU = -1004.0, 1588.0, -50.38697721419439, 503.39235619144
"""The foreground statistics of the official 3 mm model."""
KEPT_POINTS, COARSE_POINTS, FULL_POINTS = 64_000, 24_000, 12_000
"""Number of voxels that are kept per phantom, and used per step in parts 1 and 2, and 3."""
RARITY = 0.6
"""The number of points of a class is proportional to its voxels ** RARITY."""
BORDER = 5.0
"""Factor for the probability of voxels at borders."""
STATISTICS_VOXELS = 24_000
"""Number of voxels for the mean and the variance of a full-resolution layer."""
RAMPS_HU = (-950, -500, -150, -100, -40, 10, 40, 65, 90, 115, 140, 175, 220, 300, 420, 650)
"""Kinks of the first layer's channels; close together for soft tissue."""
VALIDATION_SEEDS = (2000, 2001)
CHECKED_SHARE = 0.04
SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
"""Candidate factors for the log frequencies in the biases."""
KERNEL_SHARES = {"quarter": 0.08, "half": 0.05}
"""Maximum share of a kernel's norm that one step changes."""
REPORT_STEPS = 20


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the network sees a phantom.

    Parameters
    ----------
    spacing_mm
        Of its voxels.
    padded
        Shape (z, y, x) to which the phantom is padded.
    patch
        Tile size (z, y, x).
    field_mm
        Size of the phantom, (z, y, x).
    drawn_mm
        Spacing with which it is drawn.
    """

    spacing_mm: float = 3.0
    padded: tuple[int, int, int] = (128, 112, 128)
    patch: tuple[int, int, int] = (128, 112, 128)
    field_mm: tuple[float, float, float] = (375.0, 300.0, 375.0)
    drawn_mm: float = 1.5

    @property
    def shape(self) -> list[int]:
        """Shape (z, y, x) of a phantom."""
        return [round(mm / self.spacing_mm) for mm in self.field_mm]

    def phantom(self, seed: int) -> Phantom:
        """Draw a phantom."""
        from totalfast.demo.phantom import make_phantom

        z, y, x = (round(mm / self.drawn_mm) for mm in self.field_mm)
        return make_phantom(seed, shape_xyz=(x, y, z), spacing_mm=self.drawn_mm)

    @property
    def crops(self) -> int:
        """Number of tiles that are taken of each phantom."""
        return 1 if self.patch == self.padded else CROPS

    @property
    def below(self) -> NDArray[np.int64]:
        """Voxels (z, y, x) of padding before a phantom."""
        return (np.array(self.padded) - self.shape) // 2

    def in_air(self, tile: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return a phantom without its padding, and with ``AROUND`` voxels of air in plane."""
        z, y, x = (slice(first, first + n) for first, n in zip(self.below, self.shape, strict=True))
        around = [(n, n) for n in AROUND]
        return np.pad(tile[z, y, x], around, constant_values=tile.min())


CROPS = 4
AROUND = (0, 32, 32)
"""Voxels (z, y, x) of air on each side of a phantom of which tiles are taken."""
LEAST_POINTS = 2_000
"""Number of labelled places in a tile that is part of a phantom; emptier ones are not used."""


def draw(seed: int, *, folder: Path, sampling: Sampling) -> Path:
    """Draw one phantom, and write its network input and labelled places.

    The file holds ``tile``, float32 (z, y, x), normalised and padded; ``places``, (points, 3) in
    voxels of the tile; their ``labels``; and the voxels ``counts`` of each class.
    """
    import nibabel as nib

    from totalfast.files.read import read_image
    from totalfast.resampling.model_grid import to_model_grid

    path = folder / f"{seed}.npz"
    if path.exists():
        return path
    phantom = sampling.phantom(seed)
    scan = read_image(nib.Nifti1Image(phantom.ct, phantom.affine))
    image = to_model_grid(scan, spacing_mm=(sampling.spacing_mm,) * 3, order=1, threads=1).voxels
    labels = phantom.labels.transpose(2, 1, 0)
    counts = np.bincount(labels.ravel(), minlength=CLASSES)
    wanted = np.where(counts > 0, counts.astype(np.float64) ** RARITY, 0)
    chance = np.minimum(KEPT_POINTS * wanted / wanted.sum() / np.maximum(counts, 1), 1)
    border = _borders(labels)
    chosen = chance[labels] * np.where(border, BORDER, 1) / (1 + (BORDER - 1) * border.mean())
    random = np.random.default_rng(seed)
    picked = np.flatnonzero(random.random(labels.size) < chosen.ravel())
    voxels = np.stack(np.unravel_index(picked, labels.shape), axis=1)
    places = tile_places(voxels, labels.shape, sampling)
    margins = [p - n for n, p in zip(image.shape, sampling.padded, strict=True)]
    tile = (np.clip(image, LOW_HU, HIGH_HU) - np.float32(MEAN_HU)) / np.float32(STD_HU)
    tile = np.pad(tile, [(m // 2, m - m // 2) for m in margins])
    part = path.with_suffix(".part.npz")
    np.savez(
        part,
        tile=tile,
        places=places.astype(np.float32),
        labels=labels.ravel()[picked],
        counts=counts,
    )
    part.replace(path)
    return path


def tile_places(
    voxels: NDArray[np.integer[Any]], shape: tuple[int, ...], sampling: Sampling
) -> NDArray[np.float64]:
    """Return the places of a phantom's voxels (n, 3) in the padded tile, in voxels of the tile.

    ``shape`` is the shape of the phantom. The corner voxels of the model grid and of the scan have
    the same position.
    """
    sizes = [round(n * sampling.drawn_mm / sampling.spacing_mm) for n in shape]
    scale = [(m - 1) / (n - 1) for n, m in zip(shape, sizes, strict=True)]
    return voxels * scale + sampling.below


def _borders(labels: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Return a mask of the voxels that have a neighbour with another label."""
    border = np.zeros(labels.shape, bool)
    for axis in range(3):
        ahead, behind = [slice(None)] * 3, [slice(None)] * 3
        ahead[axis], behind[axis] = slice(1, None), slice(None, -1)
        changes = labels[tuple(ahead)] != labels[tuple(behind)]
        border[tuple(ahead)] |= changes
        border[tuple(behind)] |= changes
    return border


def architecture(sampling: Sampling) -> dict[str, Any]:
    """Return the network's entry in nnU-Net's plans."""
    stages = len(FEATURES)
    last = [2 if n % 2 ** (stages - 1) == 0 else 1 for n in sampling.patch]
    return {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "n_stages": stages,
            "features_per_stage": list(FEATURES),
            "conv_op": "torch.nn.modules.conv.Conv3d",
            # At full resolution, 1x1x1 kernels are cheap and sufficient to sharpen borders.
            "kernel_sizes": [[1, 1, 1]] + [[3, 3, 3]] * (stages - 1),
            "strides": [[1, 1, 1]] + [[2, 2, 2]] * (stages - 2) + [last],
            "n_conv_per_stage": list(CONVOLUTIONS),
            "n_conv_per_stage_decoder": list(DECODER_CONVOLUTIONS),
            "conv_bias": True,
            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
            "norm_op_kwargs": {"eps": 1e-05, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def plans(dataset_name: str, sampling: Sampling) -> dict[str, Any]:
    """Return the content of plans.json."""
    resample = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    shape, spacing_mm = sampling.shape, [sampling.spacing_mm] * 3
    intensities = {"max": HIGH_HU, "min": LOW_HU, "mean": MEAN_HU, "median": MEAN_HU, "std": STD_HU}
    return {
        "dataset_name": dataset_name,
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": spacing_mm,
        "original_median_shape_after_transp": shape,
        "image_reader_writer": "NibabelIOWithReorient",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {
            "3d_fullres": {
                "data_identifier": "nnUNetPlans_3d_fullres",
                "preprocessor_name": "DefaultPreprocessor",
                "batch_size": 1,
                "patch_size": list(sampling.patch),
                "median_image_size_in_voxels": shape,
                "spacing": spacing_mm,
                "normalization_schemes": ["CTNormalization"],
                "use_mask_for_norm": [False],
                "resampling_fn_data": "resample_data_or_seg_to_shape",
                "resampling_fn_seg": "resample_data_or_seg_to_shape",
                "resampling_fn_data_kwargs": resample,
                "resampling_fn_seg_kwargs": resample | {"is_seg": True, "order": 1},
                "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
                "resampling_fn_probabilities_kwargs": resample | {"order": 1},
                "architecture": architecture(sampling),
                "batch_dice": False,
            }
        },
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {
            "0": intensities | {"percentile_00_5": LOW_HU, "percentile_99_5": HIGH_HU}
        },
    }


def dataset() -> dict[str, Any]:
    """Return the content of dataset.json."""
    from totalfast.upstream import CLASS_MAPS

    names = CLASS_MAPS["total"]
    return {
        "name": "totalfast demonstration model",
        "description": "Trained on synthetic phantoms by scripts/train_demo_model.py. Not one of "
        "TotalSegmentator's models; of no use for patients.",
        "channel_names": {"0": "CT"},
        "labels": {"background": 0} | {names[label]: label for label in sorted(names)},
        "numTraining": 0,
        "file_ending": ".nii.gz",
    }


def build_network(sampling: Sampling) -> Untyped:
    """Build the network from its plans, as nnU-Net does."""
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    described = architecture(sampling)
    return get_network_from_plans(
        described["network_class_name"],
        described["arch_kwargs"],
        described["_kw_requires_import"],
        1,
        CLASSES,
        allow_init=True,
        deep_supervision=False,
    )


def set_ramps(network: Untyped, tile: torch.Tensor) -> None:
    """Set the first layer, a function of one voxel, to leaky ramps with unit variance.

    An instance norm of one channel cancels everything else that a 1x1x1 convolution could learn.
    With random weights, all channels would have their kink at the same HU.
    """
    import torch

    (first,) = _blocks(network.encoder.stages[0])
    bends = (torch.tensor(RAMPS_HU) - MEAN_HU) / STD_HU
    values = tile.flatten()[::97]
    ramps = torch.nn.functional.leaky_relu(values[:, None] - bends, 0.01)
    with torch.no_grad():
        first.conv.weight.fill_(1)
        first.conv.bias.zero_()
        first.norm.weight.copy_(tile.std() / ramps.std(0))
        first.norm.bias.copy_((tile.mean() - bends) / ramps.std(0))
    network.encoder.stages[0].requires_grad_(False)


def decoded(network: Untyped, tile: torch.Tensor, *, left_out: int = 1) -> torch.Tensor:
    """Return features of the decoder without its last stages, (1, features, z, y, x)."""
    import torch

    skips, decoder = network.encoder(tile), network.decoder
    features = skips[-1]
    for stage in range(len(decoder.stages) - left_out):
        features = decoder.transpconvs[stage](features)
        features = decoder.stages[stage](torch.cat((features, skips[-(stage + 2)]), 1))
    return features


class Example:
    """A tile of one phantom as a training step uses it.

    Parameters
    ----------
    path
        A file of ``draw``.
    random
        Chooses gain and offset of the intensities, and which part of the phantom it is.
    sampling
        Size of the tile.
    """

    def __init__(self, path: Path, random: np.random.Generator, sampling: Sampling) -> None:
        import torch

        with np.load(path) as data:
            tile = data["tile"] * np.float32(1 + random.normal(0, 0.02))
            places, labels, self.counts = data["places"], data["labels"], data["counts"]
        self._low, self._patch = np.zeros(3, dtype=np.int64), sampling.patch
        inside = np.ones(len(places), dtype=bool)
        if sampling.crops > 1:
            tile = sampling.in_air(tile)
        while tile.shape != sampling.patch:
            low = random.integers(0, np.array(tile.shape) - sampling.patch + 1)
            self._low = low + sampling.below - AROUND
            inside = self.contains(places)
            if inside.sum() >= LEAST_POINTS:
                z, y, x = (slice(a, a + n) for a, n in zip(low, sampling.patch, strict=True))
                tile = np.ascontiguousarray(tile[z, y, x])
        self.places, self.labels = self.in_tile(places[inside]), labels[inside]
        self.tile = torch.from_numpy(tile + np.float32(random.normal(0, 0.015)))

    def contains(self, places: NDArray[np.floating[Any]]) -> NDArray[np.bool_]:
        """Whether places (points, 3) of the padded phantom are in the tile."""
        inside: NDArray[np.bool_] = np.all(
            (places >= self._low) & (places <= self._low + self._patch - 1), axis=1
        )
        return inside

    def in_tile(self, places: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
        """Return places (points, 3) of the padded phantom in voxels of the tile."""
        return places - self._low.astype(places.dtype)


def logits_at(
    network: Untyped,
    tile: torch.Tensor,
    below: torch.Tensor,
    places: NDArray[np.floating[Any]],
    random: np.random.Generator,
) -> torch.Tensor:
    """Return the network's logits, interpolated at places of a tile.

    Parameters
    ----------
    network
        Network whose full-resolution layers have kernels of one voxel.
    tile
        (z, y, x).
    below
        ``decoded`` of it as (voxels, features), z slowest.
    places
        (points, 3), voxels.
    random
        Chooses the voxels for the norms' statistics.

    Returns
    -------
        (points, classes).
    """
    import torch

    shape = np.array(tile.shape)
    low = np.minimum(np.floor(places).astype(np.int64), shape - 2)
    rest = torch.from_numpy((places - low).astype(np.float32))
    steps = np.array(np.meshgrid(*[[0, 1]] * 3, indexing="ij")).reshape(3, 8).T
    corners = (low[None] + steps[:, None]).reshape(-1, 3)
    others = np.stack([random.integers(n, size=STATISTICS_VOXELS) for n in shape], axis=1)
    features = _full_resolution(network, tile, below, np.concatenate([corners, others]))
    features = features[: len(corners)].view(8, len(places), -1)
    weights = torch.stack(
        [torch.where(torch.from_numpy(step == 1), rest, 1 - rest).prod(1) for step in steps]
    )
    head = network.decoder.seg_layers[-1]
    mixed = (features * weights[..., None]).sum(0)
    return torch.nn.functional.linear(mixed, head.weight.flatten(1), head.bias)


def _full_resolution(
    network: Untyped,
    tile: torch.Tensor,
    below: torch.Tensor,
    voxels: NDArray[np.int64],
    *,
    blocks: int | None = None,
    raw: bool = False,
) -> torch.Tensor:
    """Return features of the last stage at some voxels; the last voxels give the norms' statistics.

    Runs only the first ``blocks`` blocks, and with ``raw`` also the convolution of the next block.
    """
    import torch

    linear = torch.nn.functional.linear
    half = np.array(tile.shape) // 2
    z, y, x = voxels.T
    values = tile.flatten()[torch.from_numpy((z * tile.shape[1] + y) * tile.shape[2] + x)]
    parent = torch.from_numpy(((z // 2) * half[1] + y // 2) * half[2] + x // 2)
    # A transposed convolution of stride 2 has one matrix per child voxel.
    up = network.decoder.transpconvs[-1]
    matrices = up.weight.flatten(2).permute(2, 1, 0)
    child = torch.from_numpy((z % 2) * 4 + (y % 2) * 2 + x % 2)
    order = torch.argsort(child)
    groups = torch.split(below[parent[order]].float(), torch.bincount(child, minlength=8).tolist())
    risen = torch.cat([linear(g, m) for g, m in zip(groups, matrices, strict=True)])
    risen = risen[torch.argsort(order)] + up.bias

    (first,) = _blocks(network.encoder.stages[0])
    skip = linear(values[:, None], first.conv.weight.flatten(1), first.conv.bias)
    mean, deviation = tile.mean(), tile.var(unbiased=False)
    weight = first.conv.weight.flatten()
    centre = weight * mean + first.conv.bias
    skip = _normed(skip, first.norm, centre, weight.square() * deviation)
    features = torch.cat([risen, skip], 1)
    for depth, block in enumerate(_blocks(network.decoder.stages[-1])):
        if depth == blocks and not raw:
            break
        features = linear(features, block.conv.weight.flatten(1), block.conv.bias)
        if depth == blocks:
            break
        sample = features[-STATISTICS_VOXELS:]
        features = _normed(features, block.norm, sample.mean(0), sample.var(0, unbiased=False))
    return features


def _blocks(stage: Untyped) -> list[Any]:
    """Return the convolution blocks of a stage."""
    return [module for module in stage.modules() if hasattr(module, "conv")]


def _normed(
    features: torch.Tensor,
    norm: Untyped,
    mean: torch.Tensor,
    variance: torch.Tensor,
) -> torch.Tensor:
    """Apply an instance norm with the given statistics, and a leaky ReLU."""
    import torch

    scaled = norm.weight * (features - mean) / torch.sqrt(variance + norm.eps) + norm.bias
    return torch.nn.functional.leaky_relu(scaled, 0.01)


def train_coarse(
    network: Untyped,
    files: list[Path],
    name: str,
    left_out: int,
    steps: int,
    share: float,
    random: np.random.Generator,
    sampling: Sampling,
) -> None:
    """Train the network without the decoder's last stages, with the head of that stage."""
    import torch

    decoder = network.decoder
    head = decoder.seg_layers[-1 - left_out]
    stages = [decoder.transpconvs[:-left_out], decoder.stages[:-left_out]]
    scale = 2**left_out

    def logits_and_target(turn: int) -> tuple[torch.Tensor, torch.Tensor]:
        example = Example(files[turn], random, sampling)
        features = decoded(network, example.tile[None, None], left_out=left_out)
        chosen = random.integers(len(example.labels), size=COARSE_POINTS)
        last = np.array(features.shape[2:]) - 1
        places = 2 * ((example.places[chosen] + 0.5) / scale - 0.5) / last - 1
        grid = torch.from_numpy(places[:, ::-1].astype(np.float32))[None, :, None, None]
        sampled = torch.nn.functional.grid_sample(
            features, grid, mode="bilinear", padding_mode="border", align_corners=True
        )[0, :, :, 0, 0].T
        target = torch.from_numpy(example.labels[chosen].astype(np.int64))
        return torch.nn.functional.linear(sampled, head.weight.flatten(1), head.bias), target

    layers = [network.encoder, *stages, head]
    _run(name, layers, logits_and_target, len(files), steps, random, kernel_share=share)


def train_full(
    network: Untyped,
    files: list[Path],
    steps: int,
    random: np.random.Generator,
    sampling: Sampling,
) -> None:
    """Train the full-resolution layers, which start as identity."""
    import torch

    ready = []
    with torch.no_grad():
        for path in files * sampling.crops:
            example = Example(path, random, sampling)
            features = decoded(network, example.tile[None, None])[0]
            ready.append((example, features.flatten(1).T.half().contiguous()))
        example, features = ready[0]
        _hand_on(network, example.tile, features.float(), random)
    print("features of all phantoms ready", flush=True)

    def logits_and_target(turn: int) -> tuple[torch.Tensor, torch.Tensor]:
        example, features = ready[turn]
        chosen = random.integers(len(example.labels), size=FULL_POINTS)
        target = torch.from_numpy(example.labels[chosen].astype(np.int64))
        return logits_at(network, example.tile, features, example.places[chosen], random), target

    decoder = network.decoder
    layers = [decoder.transpconvs[-1], decoder.stages[-1], decoder.seg_layers[-1]]
    _run("full resolution", layers, logits_and_target, len(ready), steps, random, rate=5e-3)


def _hand_on(
    network: Untyped,
    tile: torch.Tensor,
    below: torch.Tensor,
    random: np.random.Generator,
) -> None:
    """Initialise the full-resolution stage as identity, and its head from the stage below."""
    import torch

    decoder = network.decoder
    up, count = decoder.transpconvs[-1], FEATURES[0]
    copied = torch.eye(FEATURES[1], count)[:, :, None, None, None]
    up.weight.copy_(copied.expand(-1, -1, 2, 2, 2))
    up.bias.zero_()
    voxels = np.stack([random.integers(n, size=STATISTICS_VOXELS) for n in tile.shape], axis=1)
    for block in _blocks(decoder.stages[-1]):
        weight = block.conv.weight
        weight.normal_(0, 0.05)
        weight[:, :count, 0, 0, 0] += torch.eye(count)
        block.conv.bias.zero_()
    for depth, block in enumerate(_blocks(decoder.stages[-1])):
        before = _full_resolution(network, tile, below, voxels, blocks=depth, raw=True)
        block.norm.weight.copy_(before.std(0))
        block.norm.bias.copy_(before.mean(0))
    head, other = decoder.seg_layers[-1], decoder.seg_layers[-2]
    head.weight.copy_(other.weight[:, :count])
    head.bias.copy_(other.bias)


class Muon:
    """Momentum with orthogonalised steps, which needs fewer steps than AdamW.

    K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024. A step
    changes a kernel, as a matrix with one row per output, by a share of its norm. The norm is
    constant, because the following instance norm cancels the scale.
    """

    MOMENTUM = 0.9
    NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
    """Coefficients that move all singular values of a matrix near 1 in five iterations."""

    def __init__(self, kernels: list[torch.Tensor]) -> None:
        import torch

        self.kernels = kernels
        self._momenta = [torch.zeros_like(kernel) for kernel in kernels]
        self._norms = [float(kernel.detach().norm()) for kernel in kernels]

    def step(self, share: float) -> None:
        """Take one step, and delete the gradients."""
        import torch

        with torch.no_grad():
            every = zip(self.kernels, self._momenta, self._norms, strict=True)
            for kernel, momentum, norm in every:
                momentum.mul_(self.MOMENTUM).add_(kernel.grad)
                change = self._orthogonal(kernel.grad + self.MOMENTUM * momentum)
                kernel.sub_(change, alpha=share * norm / float(change.norm()))
                kernel.mul_(norm / float(kernel.norm()))
                kernel.grad = None

    def _orthogonal(self, change: torch.Tensor) -> torch.Tensor:
        a, b, c = self.NEWTON_SCHULZ
        matrix = change.flatten(1)
        wide = matrix if len(matrix) <= matrix.shape[1] else matrix.T
        wide = wide / (wide.norm() + 1e-12)
        for _ in range(5):
            square = wide @ wide.T
            wide = a * wide + (b * square + c * square @ square) @ wide
        return (wide if len(matrix) <= matrix.shape[1] else wide.T).reshape(change.shape)


def _run(
    name: str,
    layers: list[Any],
    logits_and_target: Callable[[int], tuple[torch.Tensor, torch.Tensor]],
    count: int,
    steps: int,
    random: np.random.Generator,
    *,
    rate: float = 4e-3,
    kernel_share: float | None = None,
) -> None:
    """Take training steps: first each phantom once, then random phantoms.

    ``rate`` is the maximum learning rate of AdamW. ``kernel_share`` is the maximum share of a
    kernel that Muon changes in one step; None trains the kernels with AdamW.
    """
    import torch

    parameters = [p for layer in layers for p in layer.parameters() if p.requires_grad]
    kernels = [p for p in parameters if kernel_share and p.ndim == 5 and p[0, 0].numel() > 1]
    others = [p for p in parameters if not any(p is kernel for kernel in kernels)]
    muon = Muon(kernels)
    adam = torch.optim.AdamW(others, lr=rate, weight_decay=1e-4, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        adam, rate, total_steps=steps, pct_start=0.15, final_div_factor=50
    )
    began, losses, hits = time.perf_counter(), [], []
    for step in range(1, steps + 1):
        turn = step - 1 if step <= count else int(random.integers(count))
        logits, target = logits_and_target(turn)
        loss = torch.nn.functional.cross_entropy(logits, target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(others, 2.0)
        muon.step((kernel_share or 0) * schedule.get_last_lr()[0] / rate)
        adam.step()
        adam.zero_grad()
        schedule.step()
        losses.append(loss.item())
        hits.append(float((logits.argmax(1) == target).float().mean()))
        if step % REPORT_STEPS == 0 or step == steps:
            recent = slice(-REPORT_STEPS, None)
            print(
                f"{name}, step {step}/{steps}: loss {np.mean(losses[recent]):.3f}, "
                f"right {np.mean(hits[recent]):.3f}, {time.perf_counter() - began:.0f} s",
                flush=True,
            )


def shift_biases(
    network: Untyped, files: list[Path], checks: list[Path], sampling: Sampling
) -> None:
    """Add the log frequencies to the biases, with the factor that is best on other phantoms."""
    import torch

    counts = sum(np.load(path)["counts"].astype(np.float64) for path in files)
    logs = torch.from_numpy(np.log(np.maximum(counts, 1) / counts.sum())).float()
    dice = np.mean([_dice_of_shifts(network, path, logs, sampling) for path in checks], axis=0)
    for shift, value in zip(SHARES, dice, strict=True):
        print(f"log frequencies times {shift}: estimated Dice {value:.3f}")
    best = SHARES[int(np.argmax(dice))]
    print(f"chosen: {best}", flush=True)
    with torch.no_grad():
        network.decoder.seg_layers[-1].bias += best * logs


def _dice_of_shifts(
    network: Untyped, path: Path, logs: torch.Tensor, sampling: Sampling
) -> list[float]:
    """Return the mean Dice of the classes of 1 ml or more, for each of ``SHARES``.

    The Dice is estimated from random voxels of the phantom, or of tiles of it.
    """
    import torch

    random = np.random.default_rng(0)
    labels = sampling.phantom(int(path.stem)).labels.transpose(2, 1, 0)
    voxels = np.flatnonzero(random.random(labels.size) < CHECKED_SHARE)
    whole = np.stack(np.unravel_index(voxels, labels.shape), axis=1)
    every = tile_places(whole, labels.shape, sampling)
    truths: list[NDArray[np.uint8]] = []
    labels_by_share: list[list[NDArray[np.int64]]] = [[] for _ in SHARES]
    with torch.no_grad():
        for _ in range(sampling.crops):
            example = Example(path, random, sampling)
            inside = example.contains(every)
            truths.append(labels.ravel()[voxels[inside]])
            places = example.in_tile(every[inside])
            below = decoded(network, example.tile[None, None])[0].flatten(1).T.contiguous()
            for part in np.array_split(places, 1 + len(places) // 50_000):
                logits = logits_at(network, example.tile, below, part, random)
                for shift, answers in zip(SHARES, labels_by_share, strict=True):
                    answers.append((logits + shift * logs).argmax(1).numpy())
    scored = np.flatnonzero(example.counts * 0.001 * sampling.drawn_mm**3 >= 1)[1:]
    truth, result = np.concatenate(truths), []
    for answers in labels_by_share:
        answer = np.concatenate(answers)
        both = np.bincount(truth[answer == truth], minlength=CLASSES)
        sizes = np.bincount(answer, minlength=CLASSES) + np.bincount(truth, minlength=CLASSES)
        result.append(float(np.mean(2 * both[scored] / np.maximum(sizes[scored], 1))))
    return result


def save(network: Untyped, output: Path, sampling: Sampling) -> Path:
    """Write the model folder; return the path of the checkpoint."""
    import torch

    from totalfast.upstream import TASK_ID_WEIGHTS_CONFIGS

    name = TASK_ID_WEIGHTS_CONFIGS[MODEL_ID]["foldername"]
    trainer = "nnUNetTrainer_4000epochs_NoMirroring"
    folder = output / name / f"{trainer}__nnUNetPlans__3d_fullres"
    (folder / "fold_0").mkdir(parents=True, exist_ok=True)
    for file, content in (
        ("plans.json", plans(name, sampling)),
        ("dataset.json", dataset()),
    ):
        (folder / file).write_text(json.dumps(content, indent=1) + "\n")
    with torch.no_grad():
        for layer in network.decoder.seg_layers[:-1]:  # these heads are never used
            layer.weight.zero_()
            layer.bias.zero_()
    halves: dict[int, torch.Tensor] = {}  # the decoder lists the encoder's weights a second time
    weights = {
        key: halves.setdefault(tensor.data_ptr(), tensor.half())
        for key, tensor in network.state_dict().items()
    }
    path = folder / "fold_0" / "checkpoint_final.pth"
    torch.save(
        {
            "network_weights": weights,
            "trainer_name": trainer,
            "init_args": {"configuration": "3d_fullres", "fold": 0},
            "inference_allowed_mirroring_axes": None,
        },
        path,
    )
    return path


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "work", type=Path, help="folder for the phantoms and the partly trained network"
    )
    parser.add_argument("--output", type=Path, default=Path("totalfast/demo/model"))
    parser.add_argument("--phantoms", type=int, default=120)
    parser.add_argument("--steps-quarter", type=int, default=200)
    parser.add_argument("--steps-half", type=int, default=440)
    parser.add_argument("--steps-full", type=int, default=2400)
    parser.add_argument("--seed", type=int, default=0)
    default = Sampling()
    parser.add_argument("--spacing-mm", type=float, default=default.spacing_mm)
    parser.add_argument(
        "--padded", type=int, nargs=3, default=default.padded, help="shape (z, y, x) of a phantom"
    )
    parser.add_argument(
        "--patch", type=int, nargs=3, help="tile size (z, y, x); by default the whole phantom"
    )
    parser.add_argument(
        "--field-mm", type=float, nargs=3, default=default.field_mm, help="phantom size (z, y, x)"
    )
    parser.add_argument("--drawn-mm", type=float, default=default.drawn_mm)
    options = parser.parse_args()
    sampling = Sampling(
        spacing_mm=options.spacing_mm,
        field_mm=tuple(options.field_mm),
        drawn_mm=options.drawn_mm,
        padded=tuple(options.padded),
        patch=tuple(options.patch or options.padded),
    )
    options.work.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    seeds = [*range(FIRST_SEED, FIRST_SEED + options.phantoms), *VALIDATION_SEEDS]
    ready = sum((options.work / f"{seed}.npz").exists() for seed in seeds)
    with ProcessPoolExecutor(2) as pool:
        files = list(pool.map(partial(draw, folder=options.work, sampling=sampling), seeds))
    print(
        f"{len(files) - ready} phantoms drawn, {ready} reused: {time.perf_counter() - began:.0f} s",
        flush=True,
    )
    files, checks = files[: options.phantoms], files[options.phantoms :]

    import torch

    torch.manual_seed(options.seed)
    random = np.random.default_rng(options.seed)
    network = build_network(sampling).train()
    set_ramps(network, Example(files[0], random, sampling).tile)
    print(f"{sum(p.numel() for p in network.parameters())} parameters", flush=True)
    coarse = (options.seed, options.phantoms, options.steps_quarter, options.steps_half)
    below = options.work / f"below_{'_'.join(str(n) for n in coarse)}.pt"
    if below.exists():
        network.load_state_dict(torch.load(below, weights_only=True))
        print(f"layers below full resolution taken from {below.name}", flush=True)
    else:
        parts = (("quarter", 2, options.steps_quarter), ("half", 1, options.steps_half))
        for name, left_out, steps in parts:
            train_coarse(
                network,
                files,
                f"{name} resolution",
                left_out,
                steps,
                KERNEL_SHARES[name],
                random,
                sampling,
            )
        torch.save(network.state_dict(), below)
    # A second call, which reads the layers below from the file, must have the same random state.
    torch.manual_seed(options.seed)
    random = np.random.default_rng((options.seed, 1))
    train_full(network, files, options.steps_full, random, sampling)
    shift_biases(network, files, checks, sampling)
    path = save(network.eval(), options.output, sampling)
    print(f"{path.stat().st_size} bytes in {path.name}")
    print(f"{time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()
