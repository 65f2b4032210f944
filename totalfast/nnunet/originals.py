"""nnU-Net's own methods and functions, also while ``patch_nnunet`` replaces them."""

from __future__ import annotations

from types import MethodType
from typing import TYPE_CHECKING, Any

from nnunetv2.inference import predict_from_raw_data
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeAlias

    Untyped: TypeAlias = Any
    """A predictor of nnU-Net, which has no types."""

METHODS = {name: value for name, value in vars(nnUNetPredictor).items() if callable(value)}
"""nnU-Net's methods before any patch of this package. A program may wrap a patched one for good."""

replaced: dict[str, Callable[..., Any]] = {}
"""Name to the method or function of nnU-Net that ``patch_nnunet`` has replaced."""


def original(predictor: Untyped, name: str) -> Callable[..., Any]:
    """Return a method of nnU-Net's class, bound to a predictor.

    If TotalSegmentator has replaced the method, its method is returned. It has one more parameter,
    ``use_cropped_logits_resampling``.
    """
    return MethodType(replaced.get(name) or METHODS[name], predictor)


def convert_logits(*arguments: Untyped, **keywords: Untyped) -> Untyped:
    """Call nnU-Net's ``convert_predicted_logits_to_segmentation_with_correct_shape``."""
    name = "convert_predicted_logits_to_segmentation_with_correct_shape"
    # While it is replaced, a program may have wrapped the replacement, which calls this function.
    return (replaced.get(name) or nnunets_function(name))(*arguments, **keywords)


def nnunets_function(name: str) -> Callable[..., Any]:
    """Return one of nnU-Net's export functions, or what a program has put into its place."""
    present: Callable[..., Any] = getattr(predict_from_raw_data, name)
    ours = getattr(present, "__globals__", {}).get("__name__", "").startswith("totalfast.")
    return replaced[name] if ours else present
