"""A very small nnU-Net model folder in the new or the old format of plans, to be damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

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
