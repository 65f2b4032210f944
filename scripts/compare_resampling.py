"""Compare time and accuracy of the resampling in nnU-Net's plans, with both programs.

    python scripts/compare_resampling.py --json scripts/results/resampling.json [--readme]

The demonstration model is used as a plain nnU-Net model. A synthetic phantom, whose true labels are
known at 1.5 mm, is resampled to 3 mm and predicted once. nnU-Net and totalfast export the same
logits, with nnU-Net's default resampling and with its torch resampling in the plans. The results
are seconds and the mean Dice of structures of 1 ml or more. nnU-Net's planners without resampling
are not compared, because they train another model, at the spacings of the scans, and resample
nothing.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import TYPE_CHECKING, Any

import numpy as np
from on_phantoms import main

if TYPE_CHECKING:
    from numpy.typing import NDArray

SEEDS = (1, 2, 3)
TORCH_RESAMPLING = "resample_torch_fornnunet"
TORCH_OPTIONS = {"is_seg": False, "force_separate_z": False, "memefficient_seg_resampling": False}
NNUNET = "nnU-Net"
WAYS = {
    (NNUNET, "default"): "nnU-Net, default plans",
    (NNUNET, "torch"): "nnU-Net, torch plans",
    ("auto", "default"): "totalfast, default plans",
    ("auto", "torch"): "totalfast, torch plans",
    ("nearest", "default"): "totalfast `--export nearest`, any plans",
    ("linear", "torch"): "totalfast `--export linear`, any plans",
}
"""The exporting program or method and the resampling in the plans, to the title of the row."""


def measure_seed(seed: int) -> list[dict[str, Any]]:
    """Return one row per export: seconds, and mean Dice with the true labels."""
    import torch
    from nnunetv2.inference.export_prediction import (
        convert_predicted_logits_to_segmentation_with_correct_shape,
    )

    from totalfast.cli.demo import MODEL
    from totalfast.demo.phantom import make_phantom
    from totalfast.demo.score import score
    from totalfast.nnunet import ArgmaxPredictor
    from totalfast.nnunet.export import segmentation_from_logits
    from totalfast.upstream import CLASS_MAPS

    phantom = make_phantom(seed)
    spacing_mm = float(phantom.affine[0, 0])
    predictor = ArgmaxPredictor(device=torch.device("cpu"), allow_tqdm=False)
    (folder,) = MODEL.glob("Dataset297*/*__3d_fullres")
    predictor.initialize_from_trained_model_folder(str(folder), (0,))
    (case,) = predictor.get_data_iterator_from_raw_npy_data(
        phantom.ct.transpose(2, 1, 0)[None], None, {"spacing": [spacing_mm] * 3}, None
    )
    logits = predictor.predict_logits_from_preprocessed_data(case["data"])
    plans = predictor.plans_manager
    truth = phantom.labels.transpose(2, 1, 0)

    def exported(way: str, configuration: Any) -> NDArray[np.unsignedinteger]:
        if way == NNUNET:
            segmentation: NDArray[np.unsignedinteger] = (
                convert_predicted_logits_to_segmentation_with_correct_shape(
                    logits, plans, configuration, predictor.label_manager, case["data_properties"]
                )
            )
            return segmentation
        return segmentation_from_logits(
            logits,
            case["data_properties"],
            configuration,
            plans,
            predictor.label_manager,
            method=way,
        )

    exported("linear", predictor.configuration_manager)  # compiles
    rows = []
    for way, resampling in WAYS:
        configuration = with_resampling(predictor.configuration_manager, resampling)
        began = time.perf_counter()
        labels = exported(way, configuration)
        seconds = time.perf_counter() - began
        scores = score(labels, truth, CLASS_MAPS["total"], voxel_ml=spacing_mm**3 / 1000)
        dice = statistics.mean(row.dice for row in scores)
        rows.append({"seed": seed, "way": WAYS[way, resampling], "seconds": seconds, "dice": dice})
        print(rows[-1], flush=True)
    return rows


def with_resampling(configuration: Any, resampling: str) -> Any:
    """Return a copy of a configuration with the named resampling of probabilities."""
    if resampling == "torch":  # as nnUNetPlannerResEncL_torchres
        function, options = TORCH_RESAMPLING, TORCH_OPTIONS
    else:
        function = "resample_data_or_seg_to_shape"
        options = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}
    changed = {
        "resampling_fn_probabilities": function,
        "resampling_fn_probabilities_kwargs": options,
    }
    return type(configuration)(configuration.configuration | changed)


def table(rows: list[dict[str, Any]]) -> str:
    """Return the medians over the phantoms as Markdown."""
    lines = ["| export | time in s | mean Dice |", "|---|---|---|"]
    for way in WAYS.values():
        way_rows = [row for row in rows if row["way"] == way]
        seconds, dice = (
            statistics.median(row[key] for row in way_rows) for key in ("seconds", "dice")
        )
        lines.append(f"| {way} | {seconds:.{1 if seconds < 10 else 0}f} | {dice:.3f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(__file__, __doc__ or "", seeds=SEEDS, measure=measure_seed, table=table))
