"""A very small nnU-Net model folder in the new or the old format of plans, to be damaged."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch

from totalfast.engine.predict import queue_part
from totalfast.engine.source_image import SourceImage
from totalfast.engine.tiles import Tiling
from totalfast.geometry import Grid
from totalfast.models.loading import load_model
from totalfast.models.model_summary import ModelSummary

_RESAMPLING = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}
_STATISTICS = {"mean": 0.0, "std": 1.0, "percentile_00_5": -900.0, "percentile_99_5": 900.0}
_NETWORK = "dynamic_network_architectures.architectures.unet.PlainConvUNet"


def architecture() -> dict[str, Any]:
    return {
        "network_class_name": _NETWORK,
        "arch_kwargs": {
            "n_stages": 2,
            "features_per_stage": [2, 3],
            "conv_op": "torch.nn.modules.conv.Conv3d",
            "kernel_sizes": [[3, 3, 3], [1, 3, 3]],
            "strides": [[1, 1, 1], [2, 2, 2]],
            "n_conv_per_stage": [1, 1],
            "n_conv_per_stage_decoder": [1],
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


def old_architecture() -> dict[str, Any]:
    return {
        "UNet_class_name": "PlainConvUNet",
        "UNet_base_num_features": 2,
        "unet_max_num_features": 3,
        "n_conv_per_stage_encoder": [1, 1],
        "n_conv_per_stage_decoder": [1],
        "num_pool_per_axis": [1, 1, 1],
        "pool_op_kernel_sizes": [[1, 1, 1], [2, 2, 2]],
        "conv_kernel_sizes": [[3, 3, 3], [1, 3, 3]],
    }


def plans(*, old: bool = False) -> dict[str, Any]:
    configuration = {
        "preprocessor_name": "DefaultPreprocessor",
        "patch_size": [8, 8, 8],
        "spacing": [3.0, 3.0, 3.0],
        "normalization_schemes": ["CTNormalization"],
        "use_mask_for_norm": [False],
    }
    for name in ("data", "seg", "probabilities"):
        configuration[f"resampling_fn_{name}"] = "resample_data_or_seg_to_shape"
        configuration[f"resampling_fn_{name}_kwargs"] = dict(_RESAMPLING)
    network = old_architecture() if old else {"architecture": architecture()}
    return {
        "dataset_name": "Dataset001_Small",
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {
            "base": configuration,
            "3d_fullres": {"inherits_from": "base", **network},
        },
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": dict(_STATISTICS)},
    }


def dataset() -> dict[str, Any]:
    return {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "liver": 1, "spleen": 2},
        "numTraining": 2,
        "file_ending": ".nii.gz",
    }


def checkpoint(network: dict[str, Any] | None = None) -> dict[str, Any]:
    """Content of a checkpoint with random weights for a network, by default ``architecture()``."""
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    network = network or architecture()
    torch.manual_seed(0)
    built = get_network_from_plans(
        network["network_class_name"],
        network["arch_kwargs"],
        network["_kw_requires_import"],
        1,
        3,
        deep_supervision=False,
    )
    return {
        "network_weights": built.state_dict(),
        "trainer_name": "nnUNetTrainer",
        "init_args": {"configuration": "3d_fullres", "fold": 0},
        "inference_allowed_mirroring_axes": [0, 1, 2],
    }


def write(
    folder: Path,
    plans_json: object,
    dataset_json: object | None = None,
    content: object | None = None,
) -> Path:
    """Write a model folder; files that are None are those of the undamaged model."""
    (folder / "fold_0").mkdir(parents=True, exist_ok=True)
    (folder / "plans.json").write_text(json.dumps(plans_json))
    (folder / "dataset.json").write_text(json.dumps(dataset_json or dataset()))
    content = checkpoint() if content is None else content
    torch.save(content, folder / "fold_0/checkpoint_final.pth")
    return folder


def undamaged_files() -> list[dict[str, Any]]:
    """Return a plain network with labels, and a residual one with regions."""
    plain = {
        "plans": plans(),
        "old plans": plans(old=True),
        "dataset": dataset(),
        "checkpoint": checkpoint(),
    }
    residual = copy.deepcopy(plain)
    network = residual["plans"]["configurations"]["3d_fullres"]["architecture"]
    kwargs = network["arch_kwargs"]
    kwargs["n_blocks_per_stage"] = kwargs.pop("n_conv_per_stage")
    network["network_class_name"] = network["network_class_name"].replace(
        "PlainConv", "ResidualEncoder"
    )
    residual["old plans"] = copy.deepcopy(residual["plans"])
    residual["dataset"]["labels"] |= {"liver": [1, 2], "vessel": 3}
    residual["dataset"]["regions_class_order"] = [1, 2, 3]
    residual["checkpoint"] = checkpoint(network)
    return [plain, residual]


def summarise(folder: Path) -> None:
    """Read what the memory plan needs."""
    task: Any = SimpleNamespace(folds=None, configuration="3d_fullres")
    with mock.patch("totalfast.models.model_summary.find_part", return_value=folder):
        summary = ModelSummary.of(task, task)
    grid = Grid(shape=(9, 10, 8), affine=np.diag([3.0, 3.0, 2.0, 1.0]))
    assert summary.summing(grid) + summary.logits(grid) + summary.image(grid) + summary.answer > 0


def predict(folder: Path) -> np.ndarray | None:
    """Load a model and segment a small image; images whose size explodes are left out."""
    summarise(folder)
    model = load_model(folder, folds=(0,), device=torch.device("cpu"))
    if min(model.configuration.spacing) < 0.3 or max(model.patch_size) > 64:
        return None
    if len(model.dataset.get("channel_names") or model.dataset["modality"]) != 1:
        return None
    axes = tuple(model.mirroring_axes or ())
    voxels = np.random.default_rng(0).normal(0, 300, (9, 10, 8)).astype(np.float32)
    labels = queue_part(
        SourceImage(voxels[None], spacing_mm=(3.0, 3.0, 2.0)),
        model=model,
        tiling=Tiling(step=0.5, mirror_axes=axes),
        memory=None,
        on_tile=lambda: None,
    )()
    assert labels.shape == voxels.shape
    return labels
