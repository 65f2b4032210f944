"""The networks of stand-in models: random filters, and a last layer that is fitted to labels."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

import numpy as np
from label_map_facts import label_map_facts
from standin_models import Recipe, plans_json
from standin_targets import Case, Labels

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch
    from numpy.typing import NDArray


def build_network(recipe: Recipe) -> torch.nn.Module:
    """Build the network from its plans, as nnU-Net does."""
    import warnings

    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
    from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected old nnU-Net plans format")
        configuration = plans_json(recipe)["configurations"][recipe.configuration]
        manager = ConfigurationManager(deepcopy(configuration))
    network: torch.nn.Module = get_network_from_plans(
        manager.network_arch_class_name,
        manager.network_arch_init_kwargs,
        manager.network_arch_init_kwargs_req_import,
        1,
        len(recipe.class_names) + 1,
        deep_supervision=False,
    )
    return network.eval()


SMOOTH_STAGES = 2
"""Number of stages, from full resolution, whose filters blur, so that noise is suppressed."""
SKIP_GAIN = 0.2
"""Weight of the skip connection relative to the deep features; small gives smooth regions."""
ROUGH = 0.15
"""Share of the random filter in a smooth filter."""
NORM_BIAS = 0.5
"""Standard deviation of the norms' biases, which moves the ReLU kinks, so that features differ."""


def randomise(network: Any, seed: int) -> None:
    """Fill all weights with random filters that give smooth last features."""
    import torch

    random = torch.Generator().manual_seed(seed)
    encoder, decoder = network.encoder, network.decoder
    for depth, stage in enumerate(encoder.stages):
        for conv in _convolutions(stage):
            _fill(conv, random, smooth=depth < SMOOTH_STAGES)
    for depth, (up, stage) in enumerate(zip(decoder.transpconvs, decoder.stages, strict=True)):
        # Equal taps are nearest-neighbour upsampling, which gives no checkerboard.
        taps = torch.randn(*up.weight.shape[:2], 1, 1, 1, generator=random)
        up.weight.data = (taps / up.weight.shape[0] ** 0.5).expand_as(up.weight).clone()
        up.bias.data.zero_()
        level = len(encoder.stages) - 2 - depth
        for index, conv in enumerate(_convolutions(stage)):
            _fill(conv, random, smooth=level < SMOOTH_STAGES)
            if index == 0:
                conv.weight.data[:, up.weight.shape[1] :] *= SKIP_GAIN
    for norm in (m for m in network.modules() if isinstance(m, torch.nn.InstanceNorm3d)):
        norm.weight.data.fill_(1.0)
        norm.bias.data = NORM_BIAS * torch.randn(norm.bias.shape, generator=random)
    for head in decoder.seg_layers:
        _fill(head, random, smooth=False)


def _convolutions(stage: Any) -> list[Any]:
    import torch

    seen = {id(m): m for m in stage.modules() if isinstance(m, torch.nn.Conv3d)}
    return list(seen.values())


def _fill(conv: Any, random: torch.Generator, *, smooth: bool) -> None:
    import torch

    shape = conv.weight.shape
    weight = torch.randn(shape, generator=random) * (2 / shape[1:].numel()) ** 0.5
    if smooth:
        ramp = torch.tensor([1.0, 2.0, 1.0]) / 4
        blur = ramp[:, None, None] * ramp[None, :, None] * ramp[None, None, :]
        mix = torch.randn(*shape[:2], 1, 1, 1, generator=random) / shape[1] ** 0.5
        weight = mix * blur * 2 + ROUGH * weight
    conv.weight.data = weight
    conv.bias.data.zero_()


def _tiles(shape: Sequence[int], patch: Sequence[int], step: float) -> list[tuple[slice, ...]]:
    from nnunetv2.inference.sliding_window_prediction import compute_steps_for_sliding_window

    corners = compute_steps_for_sliding_window(tuple(shape), tuple(patch), step)
    grid = np.stack(np.meshgrid(*corners, indexing="ij"), axis=-1).reshape(-1, 3)
    return [
        tuple(slice(int(c), int(c) + p) for c, p in zip(corner, patch, strict=True))
        for corner in grid
    ]


def _padded(array: NDArray[Any], patch: Sequence[int], value: int) -> NDArray[Any]:
    """Pad to the patch like the sliding window: half below, the rest above."""
    missing = [max(p - n, 0) for n, p in zip(array.shape, patch, strict=True)]
    return np.pad(array, [(m // 2, m - m // 2) for m in missing], constant_values=value)


FIT_TILES, TINY_FIT_TILES = 3, 8
SAMPLES_A_CLASS, BACKGROUND_SAMPLES = 700, 6000
"""Maximum number of voxels from each tile, per class and for the background."""
BALANCE = 1.0
"""0 gives all voxels the same weight, and small structures disappear. 1 gives all classes the same
weight, and small structures grow. The fit uses this value; ``_calmed`` then reduces it."""
PROBE_VOXELS = 48
"""Edge of the cube in the middle of each tile in which boundaries and classes are counted."""
CLASSES_KEPT, BOUNDARY_LIMIT = 22, 0.22
"""A map keeps this many classes, or all, if the share of boundary cells is below the limit."""
BOUNDARY_GOAL = 0.17
"""Target share of boundary cells. The phantom has 3 to 13 %, and 20 % at 6 mm."""
SAMPLES, TINY_SAMPLES = 25_000, 6_000
"""Maximum number of voxels in the regression, whose time is proportional to it."""
RIDGE, FIT_STEPS = 1e-4, 40


def fit_last_layer(network: Any, recipe: Recipe, case: Case, seed: int) -> None:
    """Fit the last 1x1x1 convolution to the labels of a case."""
    import torch

    random = np.random.default_rng(seed)
    features: list[torch.Tensor] = []
    wanted: list[torch.Tensor] = []
    weights: list[torch.Tensor] = []
    probes: list[torch.Tensor] = []
    for image, labels in _fit_tiles(recipe, case, random):
        maps = penultimate(network, image)
        middle = [
            slice(max(n - PROBE_VOXELS, 0) // 2, (n + PROBE_VOXELS) // 2) for n in image.shape
        ]
        probes.append(maps[:, middle[0], middle[1], middle[2]].clone())
        voxels, weight = _sample(labels.reshape(-1), len(recipe.class_names) + 1, random)
        features.append(maps.reshape(maps.shape[0], -1)[:, torch.from_numpy(voxels)].T)
        wanted.append(torch.from_numpy(labels.reshape(-1)[voxels].astype(np.int64)))
        weights.append(torch.from_numpy(weight))
    head = network.decoder.seg_layers[-1]
    x, y, w = torch.cat(features), torch.cat(wanted), torch.cat(weights)
    limit = TINY_SAMPLES if recipe.tiny else SAMPLES
    if len(y) > limit:
        chosen = torch.from_numpy(np.sort(random.permutation(len(y))[:limit]))
        x, y, w = x[chosen], y[chosen], w[chosen]
    classes = head.weight.shape[0]
    class_voxels = torch.zeros(classes).index_add_(0, y, w)
    kernel, offsets = _regress(x, y, w, class_voxels)
    offsets = _calmed(kernel, offsets, class_voxels, probes)
    head.weight.data = kernel[:, :, None, None, None].contiguous()
    head.bias.data = offsets


def _fit_tiles(
    recipe: Recipe, case: Case, random: np.random.Generator
) -> Iterator[tuple[NDArray[np.float32], Labels]]:
    """Yield image and labels of some random tiles."""
    patch = recipe.model.patch_zyx
    image, labels = _padded(case.image, patch, 0), _padded(case.labels, patch, 0)
    tiles = _tiles(image.shape, patch, 0.5)
    count = min(TINY_FIT_TILES if recipe.tiny else FIT_TILES, len(tiles))
    for index in sorted(random.permutation(len(tiles))[:count]):
        yield image[tiles[index]], labels[tiles[index]]


def penultimate(network: Any, image: NDArray[np.float32]) -> torch.Tensor:
    """Return the input of the last layer, (channels, z, y, x)."""
    import torch

    caught: list[torch.Tensor] = []

    def catch(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        caught.append(inputs[0])

    hook = network.decoder.seg_layers[-1].register_forward_pre_hook(catch)
    try:
        with torch.inference_mode():
            network(torch.from_numpy(np.ascontiguousarray(image))[None, None])
    finally:
        hook.remove()
    return caught[0][0].clone()


def _sample(
    labels: Labels, classes: int, random: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return indices of sampled voxels, and for each the number of voxels that it represents."""
    voxels, weights = [], []
    for label in range(classes):
        members = np.flatnonzero(labels == label)
        limit = SAMPLES_A_CLASS if label else BACKGROUND_SAMPLES
        chosen = members if len(members) <= limit else random.choice(members, limit, replace=False)
        voxels.append(chosen)
        weights.append(np.full(len(chosen), len(members) / max(len(chosen), 1), np.float32))
    return np.concatenate(voxels), np.concatenate(weights)


def _regress(
    features: torch.Tensor,
    wanted: torch.Tensor,
    weights: torch.Tensor,
    class_voxels: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fit a weighted multinomial regression; return weight (classes, channels) and bias."""
    import torch

    mean, std = features.mean(0), features.std(0).clamp_min(1e-4)
    inputs = (features - mean) / std
    classes = len(class_voxels)
    weights = weights * class_voxels.clamp_min(1)[wanted] ** -BALANCE
    weights = weights / weights.sum()
    weight = torch.zeros(classes, inputs.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias], max_iter=FIT_STEPS, history_size=12, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        solver.zero_grad()
        logits = torch.addmm(bias, inputs, weight.T)
        losses = torch.nn.functional.cross_entropy(logits, wanted, reduction="none")
        value = (losses * weights).sum() + RIDGE * weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    solver.step(loss)  # type: ignore[no-untyped-call]
    weight, bias = weight.detach(), bias.detach()
    # Otherwise a class without voxels wins where the other classes have low logits.
    bias[class_voxels == 0] = -12.0
    weight = weight / std
    return weight, bias - weight @ mean


def _calmed(
    weight: torch.Tensor,
    bias: torch.Tensor,
    class_voxels: torch.Tensor,
    probes: Sequence[torch.Tensor],
) -> torch.Tensor:
    """Shift the bias towards common classes until the share of boundary cells is like anatomy's.

    A shift of d log(voxels) equals a fit with a ``BALANCE`` that is smaller by d. The shift ends
    early if classes would be lost and the share is below the limit.
    """
    import torch

    sizes = class_voxels.clamp_min(1).log()
    logits = [torch.addmm(bias, p.reshape(len(p), -1).T, weight.T) for p in probes]
    best, best_share, wanted = bias, 1.0, 0
    for shift in np.arange(0, BALANCE + 0.01, 0.03):
        seen: set[int] = set()
        shares = []
        for probe, raw in zip(probes, logits, strict=True):
            labels = (raw + float(shift) * sizes).argmax(1).reshape(probe.shape[1:]).numpy()
            seen |= set(np.unique(labels).tolist()) - {0}
            shares.append(label_map_facts(labels)[1])
        wanted = wanted or min(len(seen), CLASSES_KEPT)
        if len(seen) < wanted and best_share <= BOUNDARY_LIMIT:
            break
        best, best_share = bias + float(shift) * sizes, float(np.mean(shares))
        if best_share <= BOUNDARY_GOAL:
            break
    return best
