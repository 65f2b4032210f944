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
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from label_map_facts import label_map_facts
from standin_models import MODELS, Recipe, all_ids, dataset_json, plans_json, recipe_for
from standin_network import build_network, fit_last_layer, randomise
from standin_targets import Labels, make_case

if TYPE_CHECKING:
    from numpy.typing import NDArray

FIT_SEED, CHECK_SEED = 1, 2
"""Seeds of the phantoms for fitting and for measuring."""


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
