"""A client with subclasses of nnU-Net's predictor; each changes the labels.

    python subclassing.py MODEL IMAGES TARGETS

Writes one folder per class: ``nnUNetPredictor`` itself, ``Transposed`` and ``Favoured``. Prints the
module of the method of nnU-Net's class.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor


class Transposed(nnUNetPredictor):
    """Predicts each tile twice, the second time with two axes exchanged."""

    def _internal_maybe_mirror_and_predict(self, x: torch.Tensor) -> torch.Tensor:
        prediction = super()._internal_maybe_mirror_and_predict(x)
        if x.shape[2] != x.shape[3]:
            raise ValueError("the tile isn't square")
        exchanged = super()._internal_maybe_mirror_and_predict(x.transpose(2, 3).contiguous())
        return (prediction + exchanged.transpose(2, 3)) / 2


class Favoured(nnUNetPredictor):
    """Raises the logits of the foreground."""

    def predict_logits_from_preprocessed_data(self, data: torch.Tensor) -> torch.Tensor:
        logits = super().predict_logits_from_preprocessed_data(data).clone()
        logits[1:] += 1
        return logits


def main() -> None:
    """Segment all images of a folder with each class."""
    model, images, targets = sys.argv[1:4]
    for predictor_class in (nnUNetPredictor, Transposed, Favoured):
        folder = Path(targets, predictor_class.__name__)
        folder.mkdir(parents=True)
        predictor = predictor_class(
            use_mirroring=False,
            perform_everything_on_device=False,
            device=torch.device("cpu"),
            allow_tqdm=False,
        )
        predictor.initialize_from_trained_model_folder(model, use_folds=(0,))
        predictor.predict_from_files(
            [[str(path)] for path in sorted(Path(images).iterdir())],
            [str(folder / path.name) for path in sorted(Path(images).iterdir())],
            save_probabilities=False,
            overwrite=True,
            num_processes_preprocessing=1,
            num_processes_segmentation_export=1,
        )
    print(f"method of {nnUNetPredictor.predict_from_data_iterator.__module__}")


if __name__ == "__main__":
    main()
