"""Train the small model that ``totalfast demo`` shows, on made phantoms only.

    python scripts/train_demo_model.py WORK [--output totalfast/demo/model]

WORK is a folder for what a second call reuses: the drawn phantoms (about 800 MB), and the layers
below full resolution once they are trained. The result has the layout of TotalSegmentator's 3 mm
model (id 297, 118 channels) with a network of a thirtieth of its size. It takes half an hour on two
cores; equal seeds give equal weights on equal machines. What is printed is the log that is kept in
scripts/results.

How it learns a lot from little: the labels are those of the 1.5 mm phantom, and each step's loss
looks at some thousand of its voxels, chosen so that small structures count. First the layers below
half resolution are trained, where a step is cheap and the layout is learnt, then those below full
resolution, their features interpolated at those places. Then the full-resolution layers alone learn
where borders are: their kernels are one voxel, so that they are computed only where they are looked
at, and borders are looked at most. At last the frequencies of classes, which the choice hid, go
into the biases. Logits are interpolated as ``--export linear`` does it.
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from numpy.typing import NDArray

MODEL_ID, SPACING_MM, DRAWN_MM, CLASSES = 297, 3.0, 1.5, 118
PATCH_ZYX = (128, 112, 128)
"""One tile holds the phantom's 125x100x125 voxels."""
FIRST_SEED = 1000
"""Phantoms for training; those shown and scored have seeds below."""
FEATURES = (16, 32, 48, 52, 56, 48)
"""oneDNN pads channels to whole vectors: 16 take half the memory of 20, and 32 the time of 24."""
CONVOLUTIONS = (1, 1, 1, 1, 2, 1)
DECODER_CONVOLUTIONS = (1, 1, 1, 1, 2)
LOW_HU, HIGH_HU, MEAN_HU, STD_HU = -1004.0, 1588.0, -50.38697721419439, 503.39235619144
"""The foreground statistics of the official 3 mm model."""
KEPT_POINTS, COARSE_POINTS, FULL_POINTS = 64_000, 24_000, 12_000
"""Voxels of a phantom that are ever looked at, and in a step of either part."""
RARITY = 0.6
"""A class of n voxels gets n ** RARITY of the points."""
BORDER = 5.0
"""How many times likelier a voxel at a border is chosen."""
STATISTICS_VOXELS = 24_000
"""Voxels that mean and deviation of a full-resolution layer are estimated from."""
RAMPS_HU = (-950, -500, -150, -100, -40, 10, 40, 65, 90, 115, 140, 175, 220, 300, 420, 650)
"""Where the first layer's channels bend: soft tissues lie close together."""
VALIDATION_SEEDS = (2000, 2001)
CHECKED_SHARE = 0.04
SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
"""Shares of the log frequencies that are tried in the biases."""
KERNEL_SHARES = {"quarter": 0.08, "half": 0.05}
"""Of a kernel, that a step changes at most."""
REPORT_STEPS = 20


def draw(seed: int, *, folder: Path) -> Path:
    """Draw one phantom: its scan as the network gets it, and labelled places in it.

    The file holds ``tile``, float32 (z, y, x), normalised and padded; ``places``, (points, 3) in
    voxels of the tile; their ``labels``; and the voxels ``counts`` of each class.
    """
    import nibabel as nib

    from totalfast.demo.phantom import make_phantom
    from totalfast.files.read import read_image
    from totalfast.resampling.model_grid import to_model_grid

    path = folder / f"{seed}.npz"
    if path.exists():
        return path
    phantom = make_phantom(seed)
    scan = read_image(nib.Nifti1Image(phantom.ct, phantom.affine))
    image = to_model_grid(scan, spacing_mm=(SPACING_MM,) * 3, order=1, threads=1).voxels
    labels = phantom.labels.transpose(2, 1, 0)
    counts = np.bincount(labels.ravel(), minlength=CLASSES)
    wanted = np.where(counts > 0, counts.astype(np.float64) ** RARITY, 0)
    chance = np.minimum(KEPT_POINTS * wanted / wanted.sum() / np.maximum(counts, 1), 1)
    border = _borders(labels)
    chosen = chance[labels] * np.where(border, BORDER, 1) / (1 + (BORDER - 1) * border.mean())
    random = np.random.default_rng(seed)
    picked = np.flatnonzero(random.random(labels.size) < chosen.ravel())
    places = tile_places(np.stack(np.unravel_index(picked, labels.shape), axis=1), labels.shape)
    margins = [p - n for n, p in zip(image.shape, PATCH_ZYX, strict=True)]
    tile = (np.clip(image, LOW_HU, HIGH_HU) - np.float32(MEAN_HU)) / np.float32(STD_HU)
    tile = np.pad(tile, [(m // 2, m - m // 2) for m in margins])
    part = path.with_suffix(".part.npz")
    np.savez(part, tile=tile, places=places.astype(np.float32), labels=labels.ravel()[picked],
             counts=counts)  # fmt: skip
    part.replace(path)
    return path


def tile_places(voxels: NDArray[np.integer[Any]], shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Where voxels (n, 3) of a phantom of ``shape`` lie in the padded tile, in its voxels.

    The model grid's corner voxels coincide with the scan's.
    """
    sizes = [round(n * DRAWN_MM / SPACING_MM) for n in shape]
    scale = [(m - 1) / (n - 1) for n, m in zip(shape, sizes, strict=True)]
    below = [(p - m) // 2 for p, m in zip(PATCH_ZYX, sizes, strict=True)]
    return voxels * scale + np.array(below, dtype=np.float64)


def _borders(labels: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Voxels with a neighbour of another label."""
    border = np.zeros(labels.shape, bool)
    for axis in range(3):
        ahead, behind = [slice(None)] * 3, [slice(None)] * 3
        ahead[axis], behind[axis] = slice(1, None), slice(None, -1)
        changes = labels[tuple(ahead)] != labels[tuple(behind)]
        border[tuple(ahead)] |= changes
        border[tuple(behind)] |= changes
    return border


def architecture() -> dict[str, Any]:
    """The network as nnU-Net's plans describe it."""
    stages = len(FEATURES)
    return {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "n_stages": stages,
            "features_per_stage": list(FEATURES),
            "conv_op": "torch.nn.modules.conv.Conv3d",
            # At full resolution the kernels are 1x1x1: cheap, and enough to sharpen borders.
            "kernel_sizes": [[1, 1, 1]] + [[3, 3, 3]] * (stages - 1),
            "strides": [[1, 1, 1]] + [[2, 2, 2]] * (stages - 2) + [[2, 1, 2]],
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


def plans(dataset_name: str) -> dict[str, Any]:
    """Content of plans.json."""
    resample = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    shape = [125, 100, 125]
    seen = {"max": HIGH_HU, "min": LOW_HU, "mean": MEAN_HU, "median": MEAN_HU, "std": STD_HU}
    return {
        "dataset_name": dataset_name,
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [SPACING_MM] * 3,
        "original_median_shape_after_transp": shape,
        "image_reader_writer": "NibabelIOWithReorient",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {
            "3d_fullres": {
                "data_identifier": "nnUNetPlans_3d_fullres",
                "preprocessor_name": "DefaultPreprocessor",
                "batch_size": 1,
                "patch_size": list(PATCH_ZYX),
                "median_image_size_in_voxels": shape,
                "spacing": [SPACING_MM] * 3,
                "normalization_schemes": ["CTNormalization"],
                "use_mask_for_norm": [False],
                "resampling_fn_data": "resample_data_or_seg_to_shape",
                "resampling_fn_seg": "resample_data_or_seg_to_shape",
                "resampling_fn_data_kwargs": resample,
                "resampling_fn_seg_kwargs": resample | {"is_seg": True, "order": 1},
                "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
                "resampling_fn_probabilities_kwargs": resample | {"order": 1},
                "architecture": architecture(),
                "batch_dice": False,
            }
        },
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {
            "0": seen | {"percentile_00_5": LOW_HU, "percentile_99_5": HIGH_HU}
        },
    }


def dataset() -> dict[str, Any]:
    """Content of dataset.json."""
    from totalfast.upstream import CLASS_MAPS

    names = CLASS_MAPS["total"]
    return {
        "name": "totalfast demonstration model",
        "description": "Trained on made phantoms by scripts/train_demo_model.py. Not one of "
        "TotalSegmentator's models; of no use for patients.",
        "channel_names": {"0": "CT"},
        "labels": {"background": 0} | {names[label]: label for label in sorted(names)},
        "numTraining": 0,
        "file_ending": ".nii.gz",
    }


def build_network() -> Any:  # noqa: ANN401 - nnU-Net is untyped
    """Build the network from its plans, as nnU-Net does."""
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    described = architecture()
    return get_network_from_plans(
        described["network_class_name"],
        described["arch_kwargs"],
        described["_kw_requires_import"],
        1,
        CLASSES,
        allow_init=True,
        deep_supervision=False,
    )


def set_ramps(network: Any, tile: torch.Tensor) -> None:  # noqa: ANN401
    """Fix the first layer, a function of one voxel: leaky ramps, each of unit deviation.

    A norm of one channel's intensities undoes whatever else a 1x1x1 convolution could learn; drawn
    by chance, all channels would bend at the same HU.
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


def decoded(network: Any, tile: torch.Tensor, *, left_out: int = 1) -> torch.Tensor:  # noqa: ANN401
    """Features of the decoder without its last ``left_out`` stages: (1, features, z, y, x)."""
    import torch

    skips, decoder = network.encoder(tile), network.decoder
    features = skips[-1]
    for stage in range(len(decoder.stages) - left_out):
        features = decoder.transpconvs[stage](features)
        features = decoder.stages[stage](torch.cat((features, skips[-(stage + 2)]), 1))
    return features


class Example:
    """One phantom as a step sees it.

    Parameters
    ----------
    path
        What ``draw`` wrote.
    random
        Decides gain and offset of the intensities.
    """

    def __init__(self, path: Path, random: np.random.Generator) -> None:
        import torch

        with np.load(path) as data:
            tile = data["tile"] * np.float32(1 + random.normal(0, 0.02))
            self.places, self.labels, self.counts = data["places"], data["labels"], data["counts"]
        self.tile = torch.from_numpy(tile + np.float32(random.normal(0, 0.015)))


def logits_at(
    network: Any,  # noqa: ANN401
    tile: torch.Tensor,
    below: torch.Tensor,
    places: NDArray[np.floating[Any]],
    random: np.random.Generator,
) -> torch.Tensor:
    """The network's logits, interpolated at places of a tile.

    Parameters
    ----------
    network
        Its full-resolution layers have kernels of one voxel.
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
    network: Any,  # noqa: ANN401
    tile: torch.Tensor,
    below: torch.Tensor,
    voxels: NDArray[np.int64],
    *,
    blocks: int | None = None,
    raw: bool = False,
) -> torch.Tensor:
    """Features of the last stage at some voxels; the last of them give the norms' statistics.

    Only the first ``blocks`` are run; with ``raw`` also the convolution of the next.
    """
    import torch

    linear = torch.nn.functional.linear
    half = np.array(tile.shape) // 2
    z, y, x = voxels.T
    values = tile.flatten()[torch.from_numpy((z * tile.shape[1] + y) * tile.shape[2] + x)]
    parent = torch.from_numpy(((z // 2) * half[1] + y // 2) * half[2] + x // 2)
    # A transposed convolution of stride 2 has one matrix for each of the eight children.
    up = network.decoder.transpconvs[-1]
    matrices = up.weight.flatten(2).permute(2, 1, 0)
    child = torch.from_numpy((z % 2) * 4 + (y % 2) * 2 + x % 2)
    order = torch.argsort(child)
    groups = torch.split(below[parent[order]].float(), torch.bincount(child, minlength=8).tolist())
    risen = torch.cat([linear(g, m) for g, m in zip(groups, matrices, strict=True)])
    risen = risen[torch.argsort(order)] + up.bias

    (first,) = _blocks(network.encoder.stages[0])
    seen = linear(values[:, None], first.conv.weight.flatten(1), first.conv.bias)
    mean, deviation = tile.mean(), tile.var(unbiased=False)
    weight = first.conv.weight.flatten()
    centre = weight * mean + first.conv.bias
    seen = _normed(seen, first.norm, centre, weight.square() * deviation)
    features = torch.cat([risen, seen], 1)
    for depth, block in enumerate(_blocks(network.decoder.stages[-1])):
        if depth == blocks and not raw:
            break
        features = linear(features, block.conv.weight.flatten(1), block.conv.bias)
        if depth == blocks:
            break
        sample = features[-STATISTICS_VOXELS:]
        features = _normed(features, block.norm, sample.mean(0), sample.var(0, unbiased=False))
    return features


def _blocks(stage: Any) -> list[Any]:  # noqa: ANN401
    """The convolution blocks of a stage."""
    return [module for module in stage.modules() if hasattr(module, "conv")]


def _normed(
    features: torch.Tensor,
    norm: Any,  # noqa: ANN401
    mean: torch.Tensor,
    variance: torch.Tensor,
) -> torch.Tensor:
    """Instance norm with given statistics, and the leaky ReLU that follows it."""
    import torch

    scaled = norm.weight * (features - mean) / torch.sqrt(variance + norm.eps) + norm.bias
    return torch.nn.functional.leaky_relu(scaled, 0.01)


def train_coarse(
    network: Any,  # noqa: ANN401
    files: list[Path],
    name: str,
    left_out: int,
    steps: int,
    share: float,
    random: np.random.Generator,
) -> None:
    """Train the network without the decoder's last stages, and a head for what it then gives."""
    import torch

    decoder = network.decoder
    head = decoder.seg_layers[-1 - left_out]
    stages = [decoder.transpconvs[:-left_out], decoder.stages[:-left_out]]
    scale = 2**left_out

    def logits_and_target(turn: int) -> tuple[torch.Tensor, torch.Tensor]:
        example = Example(files[turn], random)
        features = decoded(network, example.tile[None, None], left_out=left_out)
        chosen = random.integers(len(example.labels), size=COARSE_POINTS)
        last = np.array(features.shape[2:]) - 1
        places = 2 * ((example.places[chosen] + 0.5) / scale - 0.5) / last - 1
        grid = torch.from_numpy(places[:, ::-1].astype(np.float32))[None, :, None, None]
        found = torch.nn.functional.grid_sample(
            features, grid, mode="bilinear", padding_mode="border", align_corners=True
        )[0, :, :, 0, 0].T
        target = torch.from_numpy(example.labels[chosen].astype(np.int64))
        return torch.nn.functional.linear(found, head.weight.flatten(1), head.bias), target

    layers = [network.encoder, *stages, head]
    _run(
        name, layers, logits_and_target, len(files), steps, random, kernel_share=share
    )  # fmt: skip


def train_full(network: Any, files: list[Path], steps: int, random: np.random.Generator) -> None:  # noqa: ANN401
    """Train the full-resolution layers, which begin by handing on what they get."""
    import torch

    ready = []
    with torch.no_grad():
        for path in files:
            example = Example(path, random)
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
    _run("full resolution", layers, logits_and_target, len(files), steps, random, rate=5e-3)


def _hand_on(
    network: Any,  # noqa: ANN401
    tile: torch.Tensor,
    below: torch.Tensor,
    random: np.random.Generator,
) -> None:
    """Make the full-resolution stage copy its input, and its head that of the stage below."""
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
    """Momentum whose steps are orthogonalised: in few steps it learns what AdamW needs many for.

    K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024. A step
    changes a kernel, as a matrix with a row for each output, by a share of its norm, and the norm
    stays: an instance norm follows and undoes scale.
    """

    MOMENTUM = 0.9
    NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
    """Coefficients that drive all singular values of a matrix near 1, in five iterations."""

    def __init__(self, kernels: list[torch.Tensor]) -> None:
        import torch

        self.kernels = kernels
        self._momenta = [torch.zeros_like(kernel) for kernel in kernels]
        self._norms = [float(kernel.detach().norm()) for kernel in kernels]

    def step(self, share: float) -> None:
        """Use and forget the gradients."""
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
    """Take steps: every phantom in turn, then by chance.

    ``rate`` is AdamW's, ``kernel_share`` the share of a kernel that Muon changes in a step (None:
    AdamW does kernels too); both at their highest.
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


def shift_biases(network: Any, files: list[Path], checks: list[Path]) -> None:  # noqa: ANN401
    """Add some share of the log frequencies to the biases: what does best on other phantoms."""
    import torch

    counts = sum(np.load(path)["counts"].astype(np.float64) for path in files)
    logs = torch.from_numpy(np.log(np.maximum(counts, 1) / counts.sum())).float()
    dice = np.mean([_dice_of_shifts(network, path, logs) for path in checks], axis=0)
    for shift, value in zip(SHARES, dice, strict=True):
        print(f"log frequencies times {shift}: estimated Dice {value:.3f}")
    best = SHARES[int(np.argmax(dice))]
    print(f"kept {best}", flush=True)
    with torch.no_grad():
        network.decoder.seg_layers[-1].bias += best * logs


def _dice_of_shifts(network: Any, path: Path, logs: torch.Tensor) -> list[float]:  # noqa: ANN401
    """Mean Dice of the classes of 1 ml or more, for each of ``SHARES``.

    Estimated from some of the phantom's voxels, evenly spread.
    """
    import torch

    from totalfast.demo.phantom import make_phantom

    random = np.random.default_rng(0)
    example = Example(path, random)
    labels = make_phantom(int(path.stem)).labels.transpose(2, 1, 0)
    voxels = np.flatnonzero(random.random(labels.size) < CHECKED_SHARE)
    truth = labels.ravel()[voxels]
    places = tile_places(np.stack(np.unravel_index(voxels, labels.shape), axis=1), labels.shape)
    found: list[list[NDArray[np.int64]]] = [[] for _ in SHARES]
    with torch.no_grad():
        below = decoded(network, example.tile[None, None])[0].flatten(1).T.contiguous()
        for part in np.array_split(places, 1 + len(places) // 50_000):
            logits = logits_at(network, example.tile, below, part, random)
            for shift, answers in zip(SHARES, found, strict=True):
                answers.append((logits + shift * logs).argmax(1).numpy())
    scored = np.flatnonzero(example.counts * 0.001 * DRAWN_MM**3 >= 1)[1:]
    result = []
    for answers in found:
        answer = np.concatenate(answers)
        both = np.bincount(truth[answer == truth], minlength=CLASSES)
        sizes = np.bincount(answer, minlength=CLASSES) + np.bincount(truth, minlength=CLASSES)
        result.append(float(np.mean(2 * both[scored] / np.maximum(sizes[scored], 1))))
    return result


def save(network: Any, output: Path) -> Path:  # noqa: ANN401
    """Write the model folder; return the checkpoint."""
    import torch

    from totalfast.upstream import TASK_ID_WEIGHTS_CONFIGS

    name = TASK_ID_WEIGHTS_CONFIGS[MODEL_ID]["foldername"]
    trainer = "nnUNetTrainer_4000epochs_NoMirroring"
    folder = output / name / f"{trainer}__nnUNetPlans__3d_fullres"
    (folder / "fold_0").mkdir(parents=True, exist_ok=True)
    for file, content in (("plans.json", plans(name)), ("dataset.json", dataset())):
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
    parser.add_argument("work", type=Path, help="folder for the drawn phantoms")
    parser.add_argument("--output", type=Path, default=Path("totalfast/demo/model"))
    parser.add_argument("--phantoms", type=int, default=120)
    parser.add_argument("--steps-quarter", type=int, default=200)
    parser.add_argument("--steps-half", type=int, default=440)
    parser.add_argument("--steps-full", type=int, default=2400)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    seeds = [*range(FIRST_SEED, FIRST_SEED + options.phantoms), *VALIDATION_SEEDS]
    ready = sum((options.work / f"{seed}.npz").exists() for seed in seeds)
    with ProcessPoolExecutor(2) as pool:
        files = list(pool.map(partial(draw, folder=options.work), seeds))
    print(
        f"{len(files) - ready} phantoms drawn, {ready} were there: "
        f"{time.perf_counter() - began:.0f} s",
        flush=True,
    )
    files, checks = files[: options.phantoms], files[options.phantoms :]

    import torch

    torch.manual_seed(options.seed)
    random = np.random.default_rng(options.seed)
    network = build_network().train()
    set_ramps(network, Example(files[0], random).tile)
    print(f"{sum(p.numel() for p in network.parameters())} parameters", flush=True)
    coarse = (options.seed, options.phantoms, options.steps_quarter, options.steps_half)
    below = options.work / f"below_{'_'.join(str(n) for n in coarse)}.pt"
    if below.exists():
        network.load_state_dict(torch.load(below, weights_only=True))
        print(f"layers below full resolution taken from {below.name}", flush=True)
    else:
        for name, left_out, steps in (
            ("quarter", 2, options.steps_quarter), ("half", 1, options.steps_half),
        ):  # fmt: skip
            train_coarse(
                network, files, f"{name} resolution", left_out, steps, KERNEL_SHARES[name], random
            )
        torch.save(network.state_dict(), below)
    # A second call, which takes the layers below from the file, must go on in the same way.
    torch.manual_seed(options.seed)
    random = np.random.default_rng((options.seed, 1))
    train_full(network, files, options.steps_full, random)
    shift_biases(network, files, checks)
    path = save(network.eval(), options.output)
    print(f"{path.stat().st_size} bytes in {path.name}")
    print(f"{time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()
