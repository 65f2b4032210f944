"""Write stand-in weights for HD-BET, MRSegmentator and MOOSE, where each looks for its own.

    HOME=FOLDER MRSEG_WEIGHTS_PATH=FOLDER python scripts/make_client_weights.py

Run it with a Python that imports the three programs; the folders come from their modules. MOOSE's
folder is inside its package. The networks are small, with random filters and a last layer that is
fitted to a synthetic phantom, as in scripts/make_standin_weights.py. Class names come from
TotalSegmentator.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from make_standin_weights import FIT_SEED, save
from standin_models import (
    MODELS,
    TINY_BASE_FEATURES,
    TINY_PATCH_ZYX,
    TINY_STAGES,
    Model,
    Recipe,
)
from standin_network import build_network, fit_last_layer, randomise
from standin_targets import make_case

SEED = 0
READER = "SimpleITKIO"
"""The programs' models use nnU-Net's default reader."""

MRSEGMENTATOR_CLASSES = 40
MOOSE_MODEL, MOOSE_CLASSES = "clin_ct_organs", 24
MOOSE_TRAINER = "nnUNetTrainer_2000_epochs_DA5NoMirroring"
"""A trainer that MOOSE copies into nnU-Net's folder when it runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A model, and where a program looks for it."""

    recipe: Recipe
    folder: Path
    fold: str = "0"
    old_plans: bool = False
    """Whether the plans have the format of nnU-Net before 2.3, like models that are that old."""


def recipe(
    number: int,
    names: tuple[str, ...],
    spacing_mm: float,
    *,
    trainer: str = "nnUNetTrainer",
    ct: bool = False,
) -> Recipe:
    """Return the recipe of a small model."""
    return Recipe(
        task_id=number,
        folder=f"Dataset{number}_StandIn",
        trainer=trainer,
        configuration="3d_fullres",
        spacing_xyz_mm=(spacing_mm,) * 3,
        class_names=names,
        model=Model(
            classes=("class_map", "total"),
            patch_zyx=TINY_PATCH_ZYX,
            stages=TINY_STAGES,
            base_features=TINY_BASE_FEATURES,
            intensities=MODELS[297].intensities if ct else None,
        ),
        tiny=True,
        shown_as={"brain": "liver"},
    )


def places() -> list[Place]:
    """Return the models of the three programs."""
    from HD_BET.paths import folder_with_parameter_files
    from moosez.models import MODEL_METADATA
    from moosez.system import MODELS_DIRECTORY_PATH
    from mrsegmentator.config import get_model_dir
    from totalsegmentator.map_to_binary import class_map

    mr_names = tuple(class_map["total_mr"].values())[:MRSEGMENTATOR_CLASSES]
    ct_names = tuple(class_map["total"].values())[:MOOSE_CLASSES]
    moose = recipe(902, ct_names, 1.5, trainer=MOOSE_TRAINER, ct=True)
    dataset = Path(MODELS_DIRECTORY_PATH, MODEL_METADATA[MOOSE_MODEL]["folder_name"])
    return [
        Place(
            recipe=recipe(900, ("brain",), 1.0),
            folder=Path(folder_with_parameter_files),
            fold="all",
        ),
        Place(recipe=recipe(901, mr_names, 1.5), folder=get_model_dir("base"), old_plans=True),
        Place(recipe=moose, folder=dataset / f"{MOOSE_TRAINER}__nnUNetPlans__3d_fullres"),
    ]


def make(place: Place) -> None:
    """Make a model and write its folder."""
    network = build_network(place.recipe)
    randomise(network, SEED + place.recipe.task_id)
    fit_last_layer(network, place.recipe, make_case(place.recipe, FIT_SEED), SEED)
    with tempfile.TemporaryDirectory() as scratch:
        made = save(network, place.recipe, Path(scratch), SEED)
        (made / "fold_0").rename(made / f"fold_{place.fold}")
        plans = json.loads((made / "plans.json").read_text())
        plans["image_reader_writer"] = READER
        if not place.old_plans:
            plans["configurations"] = new_format(plans["configurations"])
        (made / "plans.json").write_text(json.dumps(plans, indent=4))
        dataset = json.loads((made / "dataset.json").read_text())
        del dataset["overwrite_image_reader_writer"]
        (made / "dataset.json").write_text(json.dumps(dataset, indent=4))
        shutil.rmtree(place.folder, ignore_errors=True)
        shutil.copytree(made, place.folder)


def new_format(configurations: dict[str, Any]) -> dict[str, Any]:
    """Return configurations with the key ``architecture`` of nnU-Net 2.3 and later."""
    from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected old nnU-Net plans format")
        return {
            name: ConfigurationManager(configuration).configuration
            for name, configuration in configurations.items()
        }


def mark_versions() -> None:
    """Write the files with which the programs recognise that a model needs no download."""
    from moosez.models import MODEL_METADATA
    from moosez.system import MODELS_DIRECTORY_PATH
    from mrsegmentator.config import MODEL_REGISTRY, get_model_dir

    version = {"weights_version": MODEL_REGISTRY["base"]["version"]}
    (get_model_dir("base") / "version.json").write_text(json.dumps(version))
    moose = MODEL_METADATA[MOOSE_MODEL]
    dataset = Path(MODELS_DIRECTORY_PATH, moose["folder_name"])
    (dataset / "model_version.json").write_text(json.dumps({"url": moose["url"]}))


def main() -> None:
    """Command line."""
    argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0]).parse_args()
    for place in places():
        make(place)
        print(f"{len(place.recipe.class_names)} classes: {place.folder}", flush=True)
    mark_versions()


if __name__ == "__main__":
    main()
