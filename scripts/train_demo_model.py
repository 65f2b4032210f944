"""Train the small model that ``totalfast demo`` shows, on made phantoms only.

    python scripts/train_demo_model.py WORK [--output totalfast/demo/model]

WORK is a folder for the drawn phantoms (about 1.7 GB), which a second call reuses. The result has
the layout of TotalSegmentator's 3 mm model (id 297, 118 channels) with a network of a thirtieth of
its size. It takes half an hour on two cores; equal seeds give equal weights on equal machines. What
is printed is the log that is kept in scripts/results.

How it learns a lot from little: the labels are those of the 1.5 mm phantom, and each step's loss
looks at some 40,000 of its voxels, chosen so that small structures count. The decoder's features
are interpolated there; as the last layer is linear, that equals interpolating the logits, which is
what ``--export linear`` does. First everything below full resolution is trained, then the
full-resolution stage alone, which begins as a copy of the stage below.
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
    import torch
    from numpy.typing import NDArray

MODEL_ID, SPACING_MM, CLASSES = 297, 3.0, 118
PATCH_ZYX = (128, 112, 128)
"""One tile holds the phantom's 125x100x125 voxels."""
FIRST_SEED = 1000
"""Phantoms for training; those shown and scored have seeds below."""
FEATURES = (24, 24, 48, 56, 56, 48)
CONVOLUTIONS = (1, 1, 1, 1, 2, 1)
LOW_HU, HIGH_HU, MEAN_HU, STD_HU = -1004.0, 1588.0, -50.38697721419439, 503.39235619144
"""The foreground statistics of the official 3 mm model."""
POINTS = 40_000
RARITY = 0.6
"""A class of n voxels gets n ** RARITY of the points."""
REPORT_STEPS = 20


def draw(seed: int, *, folder: Path) -> Path:
    """Draw one phantom: its scan at the model's spacing, its labels as drawn; (z, y, x)."""
    import nibabel as nib

    from totalfast.demo.phantom import make_phantom
    from totalfast.stages.read import read_image
    from totalfast.stages.resample import to_model_grid

    path = folder / f"{seed}.npz"
    if not path.exists():
        phantom = make_phantom(seed)
        scan = read_image(nib.Nifti1Image(phantom.ct, phantom.affine))
        model = to_model_grid(scan, spacing_mm=(SPACING_MM,) * 3, order=1, threads=1)
        part = path.with_suffix(".part.npz")
        np.savez(part, image=np.asarray(model.voxels), labels=phantom.labels.transpose(2, 1, 0))
        part.replace(path)
    return path


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
            "n_conv_per_stage_decoder": [1] * (stages - 1),
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


def decoder_features(network: Any, image: torch.Tensor, *, below: int) -> torch.Tensor:  # noqa: ANN401
    """Features of the decoder ``below`` stages under full resolution: (1, features, z, y, x)."""
    import torch

    skips, decoder = network.encoder(image), network.decoder
    features = skips[-1]
    for stage in range(len(decoder.stages) - below):
        features = decoder.transpconvs[stage](features)
        features = decoder.stages[stage](torch.cat((features, skips[-(stage + 2)]), 1))
    return features


class Sampler:
    """Gives a step's input tile, and places in it with their labels."""

    def __init__(self, files: list[Path], random: np.random.Generator) -> None:
        self.files = files
        self.random = random
        self.taken = 0

    def next(self) -> tuple[torch.Tensor, NDArray[np.float64], torch.Tensor]:
        """(1, 1, z, y, x) tile; (points, 3) places in its voxels; (points,) labels."""
        import torch

        # Every phantom once, then by chance.
        turn = self.taken if self.taken < len(self.files) else self.random.integers(len(self.files))
        self.taken += 1
        with np.load(self.files[turn]) as data:
            image, labels = data["image"], data["labels"]
        counts = np.bincount(labels.ravel(), minlength=CLASSES).astype(np.float64)
        wanted = np.where(counts > 0, counts**RARITY, 0.0)
        wanted = np.minimum(POINTS * wanted / wanted.sum(), counts)
        chance = (wanted / np.maximum(counts, 1)).astype(np.float32)
        flat = labels.ravel()
        chosen = np.flatnonzero(self.random.random(flat.size, dtype=np.float32) < chance[flat])
        places = np.stack(np.unravel_index(chosen, labels.shape), axis=1).astype(np.float64)
        # The model grid's corner voxels coincide with the scan's.
        places *= [(m - 1) / (n - 1) for n, m in zip(labels.shape, image.shape, strict=True)]
        margins = [p - n for n, p in zip(image.shape, PATCH_ZYX, strict=True)]
        places += [margin // 2 for margin in margins]
        image = (np.clip(image, LOW_HU, HIGH_HU) - MEAN_HU) / STD_HU
        image = image * (1 + self.random.normal(0, 0.02)) + self.random.normal(0, 0.015)
        tile = np.pad(image.astype(np.float32), [(m // 2, m - m // 2) for m in margins])
        target = torch.from_numpy(flat[chosen].astype(np.int64))
        return torch.from_numpy(tile)[None, None], places, target


def interpolate(features: torch.Tensor, places: NDArray[np.float64]) -> torch.Tensor:
    """Trilinear values of (1, features, z, y, x) at (points, 3): (points, features)."""
    import torch

    last = np.array(features.shape[2:]) - 1
    scaled = (2 * places / last - 1)[:, ::-1].astype(np.float32).copy()
    grid = torch.from_numpy(scaled)[None, :, None, None]
    found = torch.nn.functional.grid_sample(
        features, grid, mode="bilinear", padding_mode="border", align_corners=True
    )
    return found[0, :, :, 0, 0].T


def train(files: list[Path], *, coarse_steps: int, fine_steps: int, seed: int) -> Any:  # noqa: ANN401
    """Train the network; return it."""
    import torch

    torch.manual_seed(seed)
    sampler = Sampler(files, np.random.default_rng(seed))
    network = build_network().train()
    decoder = network.decoder
    head = torch.nn.Linear(FEATURES[1], CLASSES)
    trunk = [p for name, p in network.named_parameters() if "seg_layers" not in name]
    print(f"{sum(p.numel() for p in network.parameters())} parameters", flush=True)

    def run(steps: int, parameters: list[Any], rate: float, *, below: int) -> None:
        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=1e-4, betas=(0.9, 0.98))
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, rate, total_steps=steps, pct_start=0.15, final_div_factor=50
        )
        began, losses, hits = time.perf_counter(), [], []
        for step in range(1, steps + 1):
            tile, places, target = sampler.next()
            features = decoder_features(network, tile, below=below)
            logits = head(interpolate(features, places / 2 - 0.25 if below else places))
            loss = torch.nn.functional.cross_entropy(logits, target)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 2.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            hits.append(float((logits.argmax(1) == target).float().mean()))
            if step % REPORT_STEPS == 0 or step == steps:
                recent = slice(-REPORT_STEPS, None)
                print(
                    f"{'half' if below else 'full'} resolution, step {step}/{steps}: "
                    f"loss {np.mean(losses[recent]):.3f}, right {np.mean(hits[recent]):.3f}, "
                    f"{time.perf_counter() - began:.0f} s",
                    flush=True,
                )

    run(coarse_steps, [*trunk, *head.parameters()], 4e-3, below=1)
    with torch.no_grad():
        tile, _, _ = sampler.next()
        _copy_stage_below(decoder, decoder_features(network, tile, below=1))
    for parameter in network.parameters():
        parameter.requires_grad_(False)  # noqa: FBT003
    full = [*decoder.transpconvs[-1].parameters(), *decoder.stages[-1].parameters()]
    for parameter in full:
        parameter.requires_grad_(True)  # noqa: FBT003
    run(fine_steps, [*full, *head.parameters()], 2e-3, below=0)
    with torch.no_grad():
        for layer in decoder.seg_layers:  # the other stages' heads are never used
            layer.weight.zero_()
            layer.bias.zero_()
        decoder.seg_layers[-1].weight.copy_(head.weight[:, :, None, None, None])
        decoder.seg_layers[-1].bias.copy_(head.bias)
    return network.eval()


def _copy_stage_below(decoder: Any, below: torch.Tensor) -> None:  # noqa: ANN401
    """Make the full-resolution stage hand on what it gets, so that training begins from there."""
    import torch

    up, block = decoder.transpconvs[-1], decoder.stages[-1].convs[0]
    count = up.weight.shape[0]
    eye = torch.eye(count)[:, :, None, None, None]
    values = below[0].flatten(1)
    up.weight.copy_(eye.expand(count, count, 2, 2, 2))
    up.bias.zero_()
    block.conv.weight.normal_(0, 0.05)
    block.conv.weight[:, :count] = eye
    block.conv.bias.zero_()
    block.norm.weight.copy_(values.std(1))
    block.norm.bias.copy_(values.mean(1))


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
    parser.add_argument("--phantoms", type=int, default=90)
    parser.add_argument("--coarse-steps", type=int, default=250)
    parser.add_argument("--fine-steps", type=int, default=110)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    with ProcessPoolExecutor(2) as pool:
        seeds = range(FIRST_SEED, FIRST_SEED + options.phantoms)
        files = list(pool.map(partial(draw, folder=options.work), seeds))
    print(f"{len(files)} phantoms ready after {time.perf_counter() - began:.0f} s", flush=True)

    network = train(
        files,
        coarse_steps=options.coarse_steps,
        fine_steps=options.fine_steps,
        seed=options.seed,
    )
    path = save(network, options.output)
    print(f"{path.stat().st_size} bytes in {path}")
    print(f"{time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()
