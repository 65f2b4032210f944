"""Synthetic nnU-Net models: the official folder layout, small random networks, any labels."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from scipy import ndimage


@dataclasses.dataclass(frozen=True, kw_only=True)
class SyntheticModel:
    """One model and its images."""

    dims: int = 3
    channels: int = 1
    classes: int = 4
    regions: bool = False
    ignore: bool = False
    folds: int = 1
    mirroring: tuple[int, ...] | None = None
    spacing: tuple[float, ...] = (2.0, 1.5, 1.5)
    patch: tuple[int, ...] = (16, 24, 16)
    transpose: tuple[int, int, int] = (0, 1, 2)
    normalization: str = "ZScoreNormalization"
    use_mask: bool = False
    resampling: str = "resample_data_or_seg_to_shape"
    options: tuple[tuple[str, object], ...] = ()
    network: str = "PlainConvUNet"
    previous_stage: str | None = None
    reader: str = "SimpleITKIO"
    ending: str = ".nii.gz"

    @property
    def labels(self) -> dict:
        if self.regions:
            return {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "centre": 3}
        names = {"background": 0} | {f"organ {k}": k for k in range(1, self.classes)}
        return names | ({"ignore": self.classes} if self.ignore else {})

    @property
    def heads(self) -> int:
        return 3 if self.regions else self.classes

    @property
    def configuration(self) -> str:
        if self.previous_stage:
            return "3d_cascade_fullres"
        return "2d" if self.dims == 2 else "3d_fullres"

    def plans(self) -> dict:
        resampling = dict(self.options)
        if self.resampling == "resample_data_or_seg_to_shape":
            default = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}
            resampling = default | resampling
        data = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
        intensities = {"max": 900.0, "min": -900.0, "mean": 10.0, "median": 0.0, "std": 300.0}
        intensities |= {"percentile_00_5": -800.0, "percentile_99_5": 800.0}
        configuration = {
            "data_identifier": "data",
            "preprocessor_name": "DefaultPreprocessor",
            "batch_size": 2,
            "patch_size": list(self.patch),
            "median_image_size_in_voxels": list(self.patch),
            "spacing": list(self.spacing),
            "normalization_schemes": [self.normalization] * self.channels,
            "use_mask_for_norm": [self.use_mask] * self.channels,
            "resampling_fn_data": "resample_data_or_seg_to_shape",
            "resampling_fn_seg": "resample_data_or_seg_to_shape",
            "resampling_fn_data_kwargs": data,
            "resampling_fn_seg_kwargs": data | {"is_seg": True, "order": 1},
            "resampling_fn_probabilities": self.resampling,
            "resampling_fn_probabilities_kwargs": resampling,
            "architecture": self.architecture(),
            "batch_dice": False,
        }
        if self.resampling == "no_resampling_hack":
            for kind in ("data", "seg", "probabilities"):
                configuration[f"resampling_fn_{kind}"] = self.resampling
                configuration[f"resampling_fn_{kind}_kwargs"] = {}
        configurations = {self.configuration: configuration}
        if self.previous_stage:
            configuration["previous_stage"] = self.previous_stage
            configurations[self.previous_stage] = configuration | {"next_stage": "", "spacing": []}
            del configurations[self.previous_stage]["previous_stage"]
        backward = np.argsort(self.transpose).tolist()
        return {
            "dataset_name": "Dataset001_Synthetic",
            "plans_name": "nnUNetPlans",
            "original_median_spacing_after_transp": [2.0, 1.5, 1.5],
            "original_median_shape_after_transp": [30, 40, 40],
            "image_reader_writer": self.reader,
            "transpose_forward": list(self.transpose),
            "transpose_backward": backward,
            "configurations": configurations,
            "experiment_planner_used": "ExperimentPlanner",
            "label_manager": "LabelManager",
            "foreground_intensity_properties_per_channel": {
                str(k): intensities for k in range(self.channels)
            },
        }

    def architecture(self) -> dict:
        kind = f"{self.dims}d"
        block = "n_blocks_per_stage" if "Residual" in self.network else "n_conv_per_stage"
        folder = "dynamic_network_architectures.architectures.unet."
        return {
            "network_class_name": folder + self.network,
            "arch_kwargs": {
                "n_stages": 3,
                "features_per_stage": [6, 8, 10],
                "conv_op": f"torch.nn.modules.conv.Conv{kind}",
                "kernel_sizes": [[3] * self.dims] * 3,
                "strides": [[1] * self.dims] + [[2] * self.dims] * 2,
                block: [1, 1, 1],
                "n_conv_per_stage_decoder": [1, 1],
                "conv_bias": True,
                "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{kind}",
                "norm_op_kwargs": {"eps": 1e-05, "affine": True},
                "dropout_op": None,
                "dropout_op_kwargs": None,
                "nonlin": "torch.nn.LeakyReLU",
                "nonlin_kwargs": {"inplace": True},
            },
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        }

    def write(self, parent: Path) -> Path:
        """Write the model folder below ``parent``."""
        from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

        folder = parent / f"nnUNetTrainer__nnUNetPlans__{self.configuration}"
        folder.mkdir(parents=True)
        dataset = {
            "channel_names": {str(k): "CT" for k in range(self.channels)},
            "labels": self.labels,
            "numTraining": 2,
            "file_ending": self.ending,
        }
        if self.regions:
            dataset["regions_class_order"] = [1, 2, 3]
        (folder / "plans.json").write_text(json.dumps(self.plans()))
        (folder / "dataset.json").write_text(json.dumps(dataset))
        inputs = self.channels + (self.classes - 1 if self.previous_stage else 0)
        architecture = self.architecture()
        for fold in range(self.folds):
            torch.manual_seed(fold)
            network = get_network_from_plans(
                architecture["network_class_name"],
                architecture["arch_kwargs"],
                architecture["_kw_requires_import"],
                inputs,
                self.heads,
                deep_supervision=False,
            )
            (folder / f"fold_{fold}").mkdir()
            torch.save(
                {
                    "network_weights": network.state_dict(),
                    "trainer_name": "nnUNetTrainer",
                    "init_args": {"configuration": self.configuration, "fold": fold},
                    "inference_allowed_mirroring_axes": self.mirroring,
                },
                folder / f"fold_{fold}" / "checkpoint_final.pth",
            )
        return folder

    def write_images(self, folder: Path, cases: int = 2) -> Path:
        """Write cases of smooth noise with different sizes and spacings, and a border of zeros."""
        folder.mkdir()
        for case in range(cases):
            random = np.random.default_rng(case)
            shape = (41 + 6 * case, 36, 20 - 4 * case)
            affine = np.diag([1.1, 1.3, 2.7 - 0.4 * case, 1.0])
            for channel in range(self.channels):
                noise = ndimage.gaussian_filter(random.normal(size=shape), 2) * 4000
                noise[:4] = noise[:, -3:] = 0
                image = nib.Nifti1Image(noise.astype(np.int16), affine)
                nib.save(image, folder / f"case{case}_{channel:04d}{self.ending}")
        return folder

    def write_previous_stage(self, images: Path, folder: Path) -> Path | None:
        """Write labels like the first stage of a cascade."""
        if self.previous_stage is None:
            return None
        folder.mkdir()
        for path in sorted(images.glob("*_0000*")):
            image = nib.load(path)
            labels = np.clip(np.asarray(image.dataobj) // 300, 0, self.classes - 1)
            target = folder / path.name.replace("_0000", "")
            nib.save(nib.Nifti1Image(labels.astype(np.uint8), image.affine), target)
        return folder
