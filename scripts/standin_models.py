"""Properties of the stand-in models, and the JSON files of their folders."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

FIELD_OF_VIEW_MM = (375.0, 300.0, 375.0)
"""Size of the phantom's standard volume, (x, y, z)."""


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
