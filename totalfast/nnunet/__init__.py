"""Prediction and export for every nnU-Net v2 model, with nnU-Net's interface and less memory.

``ArgmaxPredictor`` replaces ``nnUNetPredictor``, ``export_prediction_from_logits`` replaces
nnU-Net's function of the same name, and ``totalfast nnunet`` replaces the commands
``nnUNetv2_predict`` and ``nnUNetv2_predict_from_modelfolder``. Importing this package imports
neither torch nor nnU-Net.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from totalfast.nnunet.export import export_prediction_from_logits
    from totalfast.nnunet.predictor import ArgmaxPredictor

__all__ = ["ArgmaxPredictor", "export_prediction_from_logits"]

_LAZY = {
    "ArgmaxPredictor": "totalfast.nnunet.predictor",
    "export_prediction_from_logits": "totalfast.nnunet.export",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'totalfast.nnunet' has no attribute '{name}'")
    return getattr(importlib.import_module(_LAZY[name]), name)
