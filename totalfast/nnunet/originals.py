"""nnU-Net's own methods and functions, also while ``patch_nnunet`` replaces them."""

from __future__ import annotations

from types import MethodType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeAlias

    Untyped: TypeAlias = Any
    """A predictor of nnU-Net, which has no types."""

replaced: dict[str, Callable[..., Any]] = {}
"""Name to the method or function of nnU-Net that ``patch_nnunet`` has replaced."""


def original(predictor: Untyped, name: str) -> Callable[..., Any]:
    """Return a method of nnU-Net's class, bound to a predictor.

    If TotalSegmentator has replaced the method, its method is returned. It has one more parameter,
    ``use_cropped_logits_resampling``.
    """
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    return MethodType(replaced.get(name) or getattr(nnUNetPredictor, name), predictor)


def convert_logits(*arguments: Untyped, **keywords: Untyped) -> Untyped:
    """Call nnU-Net's ``convert_predicted_logits_to_segmentation_with_correct_shape``."""
    from nnunetv2.inference import export_prediction

    name = "convert_predicted_logits_to_segmentation_with_correct_shape"
    return (replaced.get(name) or getattr(export_prediction, name))(*arguments, **keywords)
