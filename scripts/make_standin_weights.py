"""Write stand-ins for TotalSegmentator's models: official folders and networks, synthetic weights.

Measurements of speed and parity need models of the official shape whose label maps look like
anatomy, also where the public weights cannot be downloaded. All layers except the last are random
filters with a fixed seed. The last 1x1x1 convolution is fitted to the labels of a synthetic
phantom, by regularised multinomial regression. The labels are not a correct segmentation, but they
are smooth, reproducible, and have many classes.

    python scripts/make_standin_weights.py HOME             # official sizes, one minute per model
    python scripts/make_standin_weights.py HOME --tiny      # the same layout, for tests
"""

from __future__ import annotations

import argparse
import json
import time
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from totalfast.demo.phantom import make_phantom

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import torch

Labels = NDArray[np.uint8]
Mask = NDArray[np.bool_]

FIELD_OF_VIEW_MM = (375.0, 300.0, 375.0)
"""Size of the phantom's standard volume, (x, y, z)."""
TINY_DRAWN_AT_MM = 6.0
"""Tiny models learn a small patient, drawn at this spacing for every model. A life-size patient
would fill hundreds of tiny tiles, and a small scan would contain few of the classes."""
FIT_SEED, CHECK_SEED = 1, 2
"""Seeds of the phantoms for fitting and for measuring."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Intensities:
    """Foreground statistics for nnU-Net's CT normalisation, in HU."""

    low: float
    high: float
    mean: float
    std: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """Properties of one model that upstream's tables do not contain."""

    classes: tuple[str, str]
    patch_zyx: tuple[int, int, int]
    stages: int = 6
    last_stride: tuple[int, int, int] = (2, 2, 2)
    base_features: int = 32
    intensities: Intensities | None = None
    spacing_xyz_mm: tuple[float, float, float] | None = None
    """For tasks whose images nnU-Net resamples; None: the spacing of TotalSegmentator's table."""
    folds: int = 1


_ORGANS = Intensities(low=-1024, high=276, mean=-370.00039267657144, std=436.5998675471528)
_VERTEBRAE = Intensities(low=-96, high=1514, mean=367.32929817099546, std=320.8587389393513)
_CARDIAC = Intensities(low=-101, high=813, mean=142.1977119916391, std=154.74032651622053)
_MUSCLES = Intensities(low=-197, high=1729, mean=174.82106003593222, std=362.496044938386)
_RIBS = Intensities(low=-110, high=1302, mean=291.98966240726804, std=261.53174290110513)
_WHOLE = Intensities(low=-1004, high=1588, mean=-50.38697721419439, std=503.39235619144)

_PARTS = {
    "organs": _ORGANS,
    "vertebrae": _VERTEBRAE,
    "cardiac": _CARDIAC,
    "muscles": _MUSCLES,
    "ribs": _RIBS,
}
_CUBE_128, _CUBE_64 = (128, 128, 128), (64, 64, 64)


def _ct(table: str, key: str, patch: tuple[int, int, int] = _CUBE_128, stages: int = 6) -> Model:
    return Model(classes=(table, key), patch_zyx=patch, stages=stages, intensities=_WHOLE)


def _mr(table: str, key: str, patch: tuple[int, int, int] = _CUBE_128, stages: int = 6) -> Model:
    return Model(classes=(table, key), patch_zyx=patch, stages=stages)


def _total_parts(first_id: int, table: str) -> dict[int, Model]:
    return {
        first_id + k: replace(_ct(table, f"class_map_part_{part}"), intensities=intensities)
        for k, (part, intensities) in enumerate(_PARTS.items())
    }


# Patch sizes, stages and intensities are the published ones or, if there are none, those of a
# similar model. Models without a row come from ``_plain_model``.
MODELS: dict[int, Model] = {
    **_total_parts(291, "class_map_5_parts"),
    297: _ct("class_map", "total", (112, 112, 128), 5),
    298: _ct("class_map", "total", _CUBE_64, 5),
    **_total_parts(831, "class_map_5_parts_total_v3"),
    836: _ct("class_map", "total_v3", (112, 112, 128), 5),
    837: _ct("class_map", "total_v3", _CUBE_64, 5),
    850: replace(
        _mr("class_map_parts_mr", "class_map_part_organs", (112, 128, 160)), last_stride=(1, 2, 2)
    ),
    851: replace(
        _mr("class_map_parts_mr", "class_map_part_muscles", (112, 128, 160)), last_stride=(1, 2, 2)
    ),
    852: _mr("class_map", "total_mr", (96, 112, 128), 5),
    853: _mr("class_map", "total_mr", (48, 56, 64), 4),
    299: _ct("class_map", "body"),
    300: _ct("class_map", "body", _CUBE_64, 5),
    597: _mr("class_map", "body_mr"),
    598: _mr("class_map", "body_mr", _CUBE_64, 5),
    756: _mr("class_map", "vertebrae_mr"),
    305: _ct("class_map", "vertebrae_body"),
    527: _ct("class_map", "breasts"),
    343: _ct("class_map", "trunk_cavities"),
    570: _ct("class_map", "liver_segments"),
    591: _ct("class_map", "liver_lesions"),
    952: _ct("class_map", "abdominal_muscles"),
    778: _ct("class_map_parts_headneck_muscles", "class_map_part_muscles_1"),
    779: _ct("class_map_parts_headneck_muscles", "class_map_part_muscles_2"),
    # Spacings are not public, so these are plausible ones. The brain's is so coarse in z that
    # nnU-Net resamples z separately.
    258: replace(_ct("class_map", "lung_vessels_LEGACY"), spacing_xyz_mm=(0.8, 0.8, 1.25)),
    8: replace(_ct("class_map", "liver_vessels"), spacing_xyz_mm=(0.8, 0.8, 1.5)),
    150: replace(_ct("class_map", "cerebral_bleed"), spacing_xyz_mm=(0.6, 0.6, 5.0)),
    260: replace(_ct("class_map", "hip_implant"), spacing_xyz_mm=(1.0, 1.0, 1.5)),
    315: replace(
        _ct("class_map", "pleural_pericard_effusion"), spacing_xyz_mm=(1.1, 1.1, 2.0), folds=2
    ),
    301: replace(_ct("class_map", "heartchambers_highres"), spacing_xyz_mm=(0.9, 0.9, 1.25)),
}

TINY_PATCH_ZYX = (72, 72, 64)
TINY_STAGES, TINY_BASE_FEATURES = 3, 8
TINY_COARSENING = 2.5
"""Factor for the spacing of tiny models whose images nnU-Net resamples, so that tiles are few."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A model with its entries in upstream's tables."""

    task_id: int
    folder: str
    trainer: str
    configuration: str
    spacing_xyz_mm: tuple[float, float, float]
    class_names: tuple[str, ...]
    model: Model
    tiny: bool
    shown_as: Mapping[str, str]
    """Class to the structure of the phantom that replaces it, for ``--exchange``."""

    @property
    def strides(self) -> list[list[int]]:
        """Stride of each stage, first to last."""
        middle = [[2, 2, 2]] * (self.model.stages - 2)
        return [[1, 1, 1], *middle, list(self.model.last_stride)]


def label_map_facts(labels: NDArray[Any]) -> tuple[int, float]:
    """Measure how structured a label map is.

    Parameters
    ----------
    labels
        Integers, 3-D; 0 is background.

    Returns
    -------
        The number of foreground classes present, and the share of 2x2x2 voxel cells that hold
        more than one label: about 0.05 for anatomy, close to 1 for noise.

    Raises
    ------
    ValueError
        If the map is not 3-D or thinner than two voxels.
    """
    if labels.ndim != 3 or min(labels.shape) < 2:
        message = f"labels have shape {labels.shape}; expected 3-D with at least 2 voxels per axis."
        raise ValueError(message)
    low = high = labels
    for axis in range(3):
        head: list[slice] = [slice(None)] * 3
        tail: list[slice] = [slice(None)] * 3
        head[axis], tail[axis] = slice(None, -1), slice(1, None)
        low = np.minimum(low[tuple(head)], low[tuple(tail)])
        high = np.maximum(high[tuple(head)], high[tuple(tail)])
    classes = int(np.count_nonzero(np.unique(labels)))
    return classes, float(np.mean(low != high))


def recipe_for(task_id: int, *, tiny: bool, shown_as: Mapping[str, str]) -> Recipe:
    """Combine a row of ``MODELS`` with upstream's folder, trainer, spacing and class names."""
    from totalsegmentator import map_to_binary
    from totalsegmentator.map_tasks_config import TASK_ID_WEIGHTS_CONFIGS

    task, config = _task_config(task_id)
    model = MODELS.get(task_id) or _plain_model(task, config)
    spacing = np.broadcast_to(np.asarray(model.spacing_xyz_mm or config["resample"], float), 3)
    if tiny and model.spacing_xyz_mm:
        spacing = TINY_COARSENING * spacing
    table, key = model.classes
    names: dict[int, str] = getattr(map_to_binary, table)[key]
    if tiny:
        model = replace(
            model,
            patch_zyx=TINY_PATCH_ZYX,
            stages=TINY_STAGES,
            base_features=TINY_BASE_FEATURES,
        )
    return Recipe(
        task_id=task_id,
        folder=TASK_ID_WEIGHTS_CONFIGS[task_id]["foldername"],
        trainer=config["trainer"],
        configuration=config.get("model", "3d_fullres"),
        spacing_xyz_mm=(float(spacing[0]), float(spacing[1]), float(spacing[2])),
        class_names=tuple(names[label] for label in sorted(names)),
        model=model,
        tiny=tiny,
        shown_as=shown_as,
    )


def _configurations() -> Iterator[tuple[str, dict[str, Any], list[int]]]:
    """Yield name, configuration and models of each task and resolution in upstream's table."""
    from totalsegmentator.map_tasks_config import DEFAULT_CONFIG, TASK_CONFIGS

    for name, task in TASK_CONFIGS.items():
        for config in task.get("sub_modes", {"default": task}).values():
            ids = config["task_id"]
            yield name, DEFAULT_CONFIG | config, ids if isinstance(ids, list) else [ids]


def all_ids() -> list[int]:
    """Return the models of all tasks that have a folder of weights."""
    from totalsegmentator.map_tasks_config import TASK_ID_WEIGHTS_CONFIGS

    ids = {model_id for _, _, task_ids in _configurations() for model_id in task_ids}
    return sorted(ids & TASK_ID_WEIGHTS_CONFIGS.keys())


def _task_config(task_id: int) -> tuple[str, dict[str, Any]]:
    """Return the first task of upstream's table with the model, and its configuration."""
    for name, config, ids in _configurations():
        if task_id in ids:
            return name, config
    message = f"TotalSegmentator's TASK_CONFIGS has no task with model {task_id}."
    raise ValueError(message)


def _plain_model(task: str, config: dict[str, Any]) -> Model:
    """Return the properties of a model without a row: those of the 1.5 mm models."""
    from totalsegmentator.registry import task_modality

    make = _mr if task_modality(task) == "MR" else _ct
    return replace(make("class_map", task), folds=len(config["folds"] or (0, 1)))


def dataset_json(recipe: Recipe) -> dict[str, Any]:
    """Return the content of ``dataset.json``."""
    labels = {"background": 0} | {name: k for k, name in enumerate(recipe.class_names, 1)}
    return {
        "name": recipe.folder.split("_", 1)[1],
        "description": "Stand-in with synthetic weights",
        "channel_names": {"0": "CT" if recipe.model.intensities else "MR"},
        "labels": labels,
        "numTraining": 0,
        "file_ending": ".nii.gz",
        "overwrite_image_reader_writer": "NibabelIOWithReorient",
    }


def plans_json(recipe: Recipe) -> dict[str, Any]:
    """Return the content of ``plans.json``, in the flat format of nnU-Net before 2.3."""
    model, strides = recipe.model, recipe.strides
    spacing_zyx = list(reversed(recipe.spacing_xyz_mm))
    field_zyx = np.array(FIELD_OF_VIEW_MM)[::-1]
    shape_zyx = [int(n) for n in np.rint(field_zyx / np.array(spacing_zyx))]
    resample = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    configuration = {
        "data_identifier": f"nnUNetPlans_{recipe.configuration}",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": list(model.patch_zyx),
        "median_image_size_in_voxels": [float(n) for n in shape_zyx],
        "spacing": spacing_zyx,
        "normalization_schemes": [
            "CTNormalization" if model.intensities else "ZScoreNormalization"
        ],
        "use_mask_for_norm": [False],
        "UNet_class_name": "PlainConvUNet",
        "UNet_base_num_features": model.base_features,
        "n_conv_per_stage_encoder": [2] * model.stages,
        "n_conv_per_stage_decoder": [2] * (model.stages - 1),
        "num_pool_per_axis": [sum(s[axis] == 2 for s in strides) for axis in range(3)],
        "pool_op_kernel_sizes": strides,
        "conv_kernel_sizes": [[3, 3, 3]] * model.stages,
        "unet_max_num_features": 320,
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": resample,
        "resampling_fn_seg_kwargs": resample | {"is_seg": True, "order": 1},
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": resample | {"order": 1},
        "batch_dice": False,
    }
    intensities = model.intensities or Intensities(low=0, high=1500, mean=350, std=300)
    return {
        "dataset_name": recipe.folder,
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": spacing_zyx,
        "original_median_shape_after_transp": shape_zyx,
        "image_reader_writer": "NibabelIOWithReorient",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {recipe.configuration: configuration},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {
            "0": {
                "max": intensities.high * 2,
                "mean": intensities.mean,
                "median": intensities.mean,
                "min": intensities.low,
                "percentile_00_5": intensities.low,
                "percentile_99_5": intensities.high,
                "std": intensities.std,
            }
        },
    }


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A phantom on a model's grid: the normalised image and the target labels, (z, y, x)."""

    image: NDArray[np.float32]
    labels: Labels


@lru_cache(maxsize=4)
def _phantom_zyx(
    seed: int, spacing_xyz_mm: tuple[float, float, float]
) -> tuple[NDArray[np.int16], Labels]:
    """Return CT and ``total`` labels, (z, y, x), drawn at the finest spacing and resampled."""
    from scipy import ndimage

    finest = min(spacing_xyz_mm)
    shape = tuple(round(f / finest) for f in FIELD_OF_VIEW_MM)
    phantom = make_phantom(seed, shape_xyz=(shape[0], shape[1], shape[2]), spacing_mm=finest)
    ct, labels = phantom.ct, phantom.labels
    if max(spacing_xyz_mm) > finest:
        zoom = [finest / s for s in spacing_xyz_mm]
        ct = ndimage.zoom(ct, zoom, order=1)
        labels = ndimage.zoom(labels, zoom, order=0)
    return ct.transpose(2, 1, 0), labels.transpose(2, 1, 0)


def make_case(recipe: Recipe, seed: int) -> Case:
    """Draw a phantom for a model, and normalise it like nnU-Net."""
    drawn_at_mm = recipe.spacing_xyz_mm
    if recipe.tiny:
        drawn_at_mm = (TINY_DRAWN_AT_MM,) * 3
    ct, total = _phantom_zyx(seed, drawn_at_mm)
    image = ct.astype(np.float32)
    intensities = recipe.model.intensities
    if intensities:
        image = np.clip(image, intensities.low, intensities.high)
        image = (image - intensities.mean) / intensities.std
    else:
        image = (image - image.mean()) / max(float(image.std()), 1e-8)
    image = np.ascontiguousarray(image, np.float32)
    names = [recipe.shown_as.get(name, name) for name in recipe.class_names]
    return Case(image=image, labels=Targets(ct, total, names, drawn_at_mm).labels())


BALL_MM = 16.0
"""Radius of the ball that replaces a class that the phantom lacks."""
COLLECTIVE_NAMES = {
    "vertebrae": ("vertebrae_", ""),
    "lung": ("lung_", ""),
    "lung_left": ("lung_", "left"),
    "lung_right": ("lung_", "right"),
}
"""Names of classes that combine several CT classes: start and end of the CT names."""


class Targets:
    """The target labels of a model, from the phantom's labels or its geometry."""

    def __init__(
        self,
        ct: NDArray[np.int16],
        total: Labels,
        class_names: Sequence[str],
        spacing_xyz_mm: Sequence[float],
    ) -> None:
        from totalsegmentator.map_to_binary import class_map

        self.total = total
        self.names = class_names
        self.ids = {name: label for label, name in class_map["total"].items()}
        self.ct = ct
        self.spacing_zyx_mm = np.array(spacing_xyz_mm)[::-1]

    def labels(self) -> Labels:
        """Return the target labels, uint8, (z, y, x)."""
        derived: dict[str, Callable[[], Mask]] = {
            "vertebrae_body": self._vertebral_bodies,
            "intervertebral_discs": self._discs,
            "body_trunc": self._body,
            "body_extremities": self._flanks,
            "breast": self._breasts,
            "abdominal_cavity": self._abdomen,
            "thoracic_cavity": self._chest,
            "mediastinum": self._mediastinum,
            "pericardium": lambda: self._grown(self._structures("heart"), 5.0),
        }
        names = self.names
        table = np.zeros(256, np.uint8)
        for label, name in enumerate(names, 1):
            if name in self.ids:
                table[self.ids[name]] = label
        result = table[self.total]
        for label, name in enumerate(names, 1):
            if name in derived:
                result[derived[name]()] = label
            elif name in COLLECTIVE_NAMES:
                result[self._structures(name)] = label
        absent = sorted(set(range(1, len(names) + 1)) - set(np.unique(result).tolist()))
        return self._with_stand_ins(result, absent)

    def _with_stand_ins(self, result: Labels, absent: Sequence[int]) -> Labels:
        """Add a ball of unlabelled tissue for each class that the phantom lacks (brain, C1)."""
        from scipy import ndimage

        free = np.argwhere(ndimage.binary_erosion(self._body() & (result == 0)))
        if not absent or not len(free):
            return result
        random = np.random.default_rng(len(absent))
        radii = np.maximum(BALL_MM / self.spacing_zyx_mm, 1.5)
        for label in absent:
            centre = free[random.integers(len(free))]
            low = np.maximum(np.floor(centre - radii).astype(int), 0)
            high = np.minimum(np.ceil(centre + radii).astype(int) + 1, result.shape)
            box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
            axes = np.ogrid[box]
            distance = sum(((x - c) / r) ** 2 for x, c, r in zip(axes, centre, radii, strict=True))
            result[box][(distance < 1) & (result[box] == 0)] = label
        return result

    def _structures(self, name: str) -> Mask:
        """Return the mask of a structure, or of all structures of a collective name."""
        start, end = COLLECTIVE_NAMES.get(name, (name, name))
        chosen = np.zeros(256, bool)
        for structure, label in self.ids.items():
            chosen[label] = structure.startswith(start) and structure.endswith(end)
        return chosen[self.total]

    def _grown(self, mask: Mask, mm: float) -> Mask:
        from scipy import ndimage

        steps = max(1, round(mm / float(self.spacing_zyx_mm.min())))
        return np.asarray(ndimage.binary_dilation(mask, iterations=steps))

    def _vertebral_bodies(self) -> Mask:
        """Return the thick part of the vertebrae; an opening removes the processes."""
        from scipy import ndimage

        bones = self._structures("vertebrae")
        core = ndimage.distance_transform_edt(bones, sampling=self.spacing_zyx_mm) > 5.5
        return np.asarray(bones & self._grown(core, 6.0))

    def _discs(self) -> Mask:
        from scipy import ndimage

        bodies = self._vertebral_bodies()
        steps = max(1, round(6.0 / float(self.spacing_zyx_mm[0])))
        column = np.zeros((2 * steps + 1, 1, 1), bool)
        column[:] = True
        return np.asarray(ndimage.binary_closing(bodies, column)) & (self.total == 0)

    def _body(self) -> Mask:
        from scipy import ndimage

        dense = ndimage.binary_opening(self.ct > -300, iterations=1)
        parts, _ = ndimage.label(dense | (self.total > 0))
        largest = parts == np.argmax(np.bincount(parts.ravel())[1:]) + 1
        filled = [ndimage.binary_fill_holes(section) for section in largest]
        return np.stack(filled)

    def _across(self) -> NDArray[np.float64]:
        """Return the distance from the midsagittal plane in mm, (1, 1, x)."""
        columns = np.flatnonzero(self._body().any(axis=(0, 1)))
        middle = columns.mean() if len(columns) else self.total.shape[2] / 2
        offset = np.arange(self.total.shape[2]) - middle
        return np.asarray(np.abs(offset * self.spacing_zyx_mm[2]))[None, None, :]

    def _flanks(self) -> Mask:
        """Return the outer flanks, which replace the arms, because those are outside the image."""
        body, across = self._body(), self._across()
        return body & (across > 0.84 * np.max(across * body.any(axis=(0, 1))))

    def _chest_slices(self) -> Mask:
        return np.asarray(self._structures("lung").any(axis=(1, 2)))[:, None, None]

    def _breasts(self) -> Mask:
        body, across = self._body(), self._across()
        depth = np.cumsum(body[:, ::-1], axis=1)[:, ::-1] * self.spacing_zyx_mm[1]
        middle = (across > 20) & (across < 115)
        front = np.arange(body.shape[1])[None, :, None] > 0.5 * body.shape[1]
        return body & self._chest_slices() & middle & front & (depth < 32)

    def _cavity(self) -> Mask:
        """Return the body without its wall of skin, fat and muscle."""
        from scipy import ndimage

        return np.asarray(
            ndimage.distance_transform_edt(self._body(), sampling=self.spacing_zyx_mm) > 26
        )

    def _chest(self) -> Mask:
        lungs = self._structures("lung")
        return self._cavity() & lungs.any(axis=1)[:, None, :] & self._chest_slices() | lungs

    def _abdomen(self) -> Mask:
        lungs = self._structures("lung")
        above = np.cumsum(lungs, axis=0) > 0
        return self._cavity() & ~above & ~self._structures("heart")

    def _mediastinum(self) -> Mask:
        lungs, cavity = self._structures("lung"), self._cavity()
        near = self._across() < 45
        bones = self._structures("vertebrae") | self._structures("spinal_cord")
        heart = self._grown(self._structures("heart"), 5.0)
        organs = self._structures("liver") | self._structures("stomach")
        return cavity & near & self._chest_slices() & ~lungs & ~bones & ~heart & ~organs


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


def save(network: Any, recipe: Recipe, results: Path, seed: int) -> Path:
    """Write the model folder and return its path."""
    import torch

    plans, dataset = plans_json(recipe), dataset_json(recipe)
    folder = results / recipe.folder / f"{recipe.trainer}__nnUNetPlans__{recipe.configuration}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plans.json").write_text(json.dumps(plans, indent=4))
    (folder / "dataset.json").write_text(json.dumps(dataset, indent=4))
    checkpoint = {
        "network_weights": network.state_dict(),
        "optimizer_state": _optimizer_state(network, recipe, seed),
        "grad_scaler_state": {
            "scale": 65536.0,
            "growth_factor": 2.0,
            "backoff_factor": 0.5,
            "growth_interval": 2000,
            "_growth_tracker": 0,
        },
        "logging": _training_log(len(recipe.class_names)),
        "_best_ema": np.float64(0.9),
        "current_epoch": 1000,
        "init_args": {
            "plans": plans,
            "configuration": recipe.configuration,
            "fold": 0,
            "dataset_json": dataset,
            "unpack_dataset": True,
            "device": torch.device("cuda"),
        },
        "trainer_name": recipe.trainer,
        "inference_allowed_mirroring_axes": (
            None if recipe.trainer.endswith("NoMirroring") else (0, 1, 2)
        ),
    }
    random = torch.Generator().manual_seed(seed)
    head = network.decoder.seg_layers[-1].weight.data
    for fold in range(recipe.model.folds):
        (folder / f"fold_{fold}").mkdir(exist_ok=True)
        checkpoint["init_args"]["fold"] = fold
        torch.save(checkpoint, folder / f"fold_{fold}" / "checkpoint_final.pth")
        head *= 1 + 0.05 * torch.randn(head.shape, generator=random)  # the folds differ
    return folder


def _optimizer_state(network: Any, recipe: Recipe, seed: int) -> dict[str, Any]:
    """Return the state of SGD; official files contain the momentum, which doubles their size."""
    import torch

    random = torch.Generator().manual_seed(seed)
    parameters = list(network.parameters())
    momentum: dict[int, dict[str, torch.Tensor]] = {}
    if not recipe.tiny:
        momentum = {
            k: {"momentum_buffer": 1e-3 * torch.randn(p.shape, generator=random)}
            for k, p in enumerate(parameters)
        }
    group = {
        "lr": 1e-5,
        "momentum": 0.99,
        "dampening": 0,
        "weight_decay": 3e-5,
        "nesterov": True,
        "maximize": False,
        "foreach": None,
        "differentiable": False,
        "initial_lr": 0.01,
        "params": list(range(len(parameters))),
    }
    return {"state": momentum, "param_groups": [group]}


def _training_log(classes: int, epochs: int = 100) -> dict[str, list[Any]]:
    curve = [np.float64(0.9 - 0.5 / (k + 1)) for k in range(epochs)]
    return {
        "mean_fg_dice": curve,
        "ema_fg_dice": curve,
        "dice_per_class_or_region": [[value] * classes for value in curve],
        "train_losses": [np.float64(-value) for value in curve],
        "val_losses": [np.float64(-value) for value in curve],
        "lrs": [0.01 * (1 - k / epochs) ** 0.9 for k in range(epochs)],
        "epoch_start_timestamps": [1.7e9 + 60.0 * k for k in range(epochs)],
        "epoch_end_timestamps": [1.7e9 + 60.0 * k + 59 for k in range(epochs)],
    }


CHECK_STEP = 0.8
"""TotalSegmentator's tile step for tasks with many classes."""


def predict(folder: Path, image: NDArray[np.float32]) -> Labels:
    """Return the labels of nnU-Net's predictor for a normalised image, (z, y, x)."""
    import contextlib
    import io
    import warnings

    import torch
    import totalsegmentator.nnunet  # noqa: F401 - registers its trainers in nnU-Net
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    # nnU-Net prints a message about its fallback to the CPU for every model.
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        predictor = nnUNetPredictor(
            tile_step_size=CHECK_STEP,
            use_mirroring=False,
            device=torch.device("cpu"),
            allow_tqdm=False,
            perform_everything_on_device=False,
        )
        predictor.initialize_from_trained_model_folder(str(folder), use_folds=(0,))
        logits = predictor.predict_sliding_window_return_logits(torch.from_numpy(image)[None])
    return np.asarray(torch.as_tensor(logits).argmax(0).to(torch.uint8).numpy())


def make_model(recipe: Recipe, results: Path, *, seed: int, fitted: bool, whole: bool) -> str:
    """Make, write, load and measure one model; return a summary."""
    started_s = time.perf_counter()
    network = build_network(recipe)
    randomise(network, seed + recipe.task_id)
    if fitted:
        fit_last_layer(network, recipe, make_case(recipe, FIT_SEED), seed)
    folder = save(network, recipe, results, seed)
    made_s = time.perf_counter() - started_s
    case = make_case(recipe, CHECK_SEED)
    image, labels = case.image, case.labels
    if not whole:
        tile = tuple(
            slice(max(n - p, 0) // 2, max(n - p, 0) // 2 + p)
            for n, p in zip(image.shape, recipe.model.patch_zyx, strict=True)
        )
        image, labels = np.ascontiguousarray(image[tile]), labels[tile]
    classes, boundary = label_map_facts(predict(folder, image))
    drawn, drawn_boundary = label_map_facts(labels)
    parameters = sum(p.numel() for p in network.parameters())
    return (
        f"{folder.parent.name}: {parameters / 1e6:.1f} M parameters, made in {made_s:.1f} s; "
        f"{classes} of {len(recipe.class_names)} classes (phantom {drawn}), "
        f"boundary {100 * boundary:.1f} % (phantom {100 * drawn_boundary:.1f} %), "
        f"{'x'.join(str(n) for n in image.shape)} voxels"
    )


def write_config(home: Path) -> None:
    """Write TotalSegmentator's configuration for silent runs without internet."""
    home.mkdir(parents=True, exist_ok=True)
    config = {
        "totalseg_id": "totalseg_OFFLINE1",
        "send_usage_stats": False,
        "prediction_counter": 0,
        "statistics_disclaimer_shown": True,
    }
    (home / "config.json").write_text(json.dumps(config, indent=4))


def main() -> None:
    """Command line."""
    from totalsegmentator.map_to_binary import class_map

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("home", type=Path, help="folder to write, used as TOTALSEG_HOME_DIR")
    parser.add_argument(
        "--tiny", action="store_true", help="networks with few features and small patches"
    )
    parser.add_argument(
        "--ids",
        type=int,
        nargs="+",
        metavar="ID",
        help="models to make; default: those in MODELS, with --tiny all models of TotalSegmentator",
    )
    parser.add_argument("--random", action="store_true", help="do not fit the last layer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--whole", action="store_true", help="measure on a whole phantom, not on one tile"
    )
    parser.add_argument(
        "--exchange",
        nargs=2,
        action="append",
        default=[],
        metavar=("A", "B"),
        help="exchange the classes A and B in the phantom",
    )
    options = parser.parse_args()
    all_names = {name for names in class_map.values() for name in names.values()}
    for name in (name for pair in options.exchange for name in pair):
        if name not in all_names:
            parser.error(f"--exchange: no task has a class {name}.")
    ids = options.ids or (all_ids() if options.tiny else sorted(MODELS))
    shown_as = {a: b for pair in options.exchange for a, b in (pair, pair[::-1])}
    write_config(options.home)
    results = options.home / "nnunet" / "results"
    # Models of the same spacing are consecutive, so their phantom is drawn once.
    recipes = [recipe_for(task_id, tiny=options.tiny, shown_as=shown_as) for task_id in ids]
    for recipe in sorted(recipes, key=lambda r: (r.spacing_xyz_mm, r.task_id)):
        line = make_model(
            recipe,
            results,
            seed=options.seed,
            fitted=not options.random,
            whole=options.whole or options.tiny,
        )
        print(line, flush=True)


if __name__ == "__main__":
    main()
