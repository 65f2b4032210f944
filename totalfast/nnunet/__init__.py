"""The same fast export for every nnU-Net v2 model: its predictor, its command and its export.

``ArgmaxPredictor`` stands in for ``nnUNetPredictor``, ``export_prediction_from_logits`` for
nnU-Net's function of that name, and ``totalfast nnunet`` for ``nnUNetv2_predict`` and
``nnUNetv2_predict_from_modelfolder``. Importing this package imports neither torch nor nnU-Net.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from totalfast.nnunet.export import export_prediction_from_logits
    from totalfast.nnunet.predictor import ArgmaxPredictor

__all__ = ["ArgmaxPredictor", "export_prediction_from_logits"]

_LAZY = {
    "ArgmaxPredictor": "totalfast.nnunet.predictor",
    "export_prediction_from_logits": "totalfast.nnunet.export",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401
    if name not in _LAZY:
        raise AttributeError(f"module 'totalfast.nnunet' has no attribute '{name}'")
    return getattr(importlib.import_module(_LAZY[name]), name)
