"""``ArgmaxPredictor``: nnU-Net's predictor, with labels instead of logits as what leaves it.

Knows nnU-Net's predictor and our sliding window; knows nothing of files. Importing this module
imports nnU-Net's inference package, which takes seconds; the pipeline uses the sliding window and
the loaded model directly and does without.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from totalfast.sliding_window import predict_labels
from totalfast.weights import CHECKPOINT_NAME, Model, load_model

if TYPE_CHECKING:
    from collections.abc import Sequence


class ArgmaxPredictor(nnUNetPredictor):  # type: ignore[misc] # nnU-Net is untyped
    """nnU-Net's predictor, loaded safely, that can return labels without keeping all logits.

    The constructor is nnU-Net's. What nnU-Net's own methods return is unchanged.
    """

    model: Model

    def initialize_from_trained_model_folder(
        self,
        model_training_output_dir: str,
        use_folds: Sequence[int | str] | str | None,
        checkpoint_name: str = CHECKPOINT_NAME,
    ) -> None:
        """Load a model folder with ``weights_only=True``.

        Parameters
        ----------
        model_training_output_dir
            Holds plans.json, dataset.json and the folds.
        use_folds
            Which folds; None takes all that are there but "all".
        checkpoint_name
            File in each fold's folder.

        Raises
        ------
        WeightsError
            If something is missing, or a checkpoint holds more than weights.
        """
        folds = [use_folds] if isinstance(use_folds, str) else use_folds
        model = load_model(
            Path(model_training_output_dir),
            folds=folds,
            device=self.device,
            checkpoint_name=checkpoint_name,
        )
        self.model = model
        self.plans_manager = model.plans
        self.configuration_manager = model.configuration
        self.dataset_json = model.dataset
        self.label_manager = model.labels
        self.trainer_name = model.trainer_name
        self.allowed_mirroring_axes = model.mirroring_axes
        self.network = model.networks[0]
        self.list_of_parameters = [network.state_dict() for network in model.networks]

    def predict_labels_from_preprocessed_data(self, data: torch.Tensor) -> torch.Tensor:
        """Predict labels at network resolution, never holding all logits.

        Equals the argmax (for regions: the thresholded sigmoid) of
        ``predict_logits_from_preprocessed_data``, in a fraction of its memory.

        Parameters
        ----------
        data
            float32, (channels, z, y, x), preprocessed.

        Returns
        -------
            uint8 (uint16 from 255 labels on), (z, y, x), on the CPU.

        Raises
        ------
        NotImplementedError
            If the predictor was asked to mirror and the model allows it.
        """
        if self.use_mirroring and self.allowed_mirroring_axes:
            raise NotImplementedError(
                "mirroring is not supported yet by predict_labels_from_preprocessed_data; "
                "make the predictor with use_mirroring=False."
            )
        return predict_labels(self.model, data, step=self.tile_step_size)
