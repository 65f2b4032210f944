"""A client that predicts in spawned child processes, one image each.

    python spawning.py MODEL IMAGES TARGETS

Prints the module of the method that the child processes call.
"""

from __future__ import annotations

import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor


def segment(model: str, image: str, target: str) -> str:
    """Segment one image in a process of the pool."""
    torch.set_num_threads(1)
    predictor = nnUNetPredictor(
        use_mirroring=False,
        perform_everything_on_device=False,
        device=torch.device("cpu"),
        allow_tqdm=False,
    )
    predictor.initialize_from_trained_model_folder(model, use_folds=(0,))
    predictor.predict_from_files(
        [[image]],
        [target],
        save_probabilities=False,
        overwrite=True,
        num_processes_preprocessing=1,
        num_processes_segmentation_export=1,
    )
    return nnUNetPredictor.predict_from_data_iterator.__module__


def main() -> None:
    """Segment all images of a folder, two at a time."""
    model, images, targets = sys.argv[1:4]
    Path(targets).mkdir()
    names = sorted(path.name for path in Path(images).iterdir())
    jobs = [
        (model, str(Path(images, name)), str(Path(targets, name.removesuffix(".nii.gz"))))
        for name in names
    ]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        modules = list(pool.map(segment, *zip(*jobs, strict=True)))
    print(f"method of {' '.join(sorted(set(modules)))}")


if __name__ == "__main__":
    main()
