"""Which export method gives upstream's result, and along which axes it interpolates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from totalfast.geometry import CORNERS, LinearWeights, linear_weights, nearest_weights

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


METHODS = ("auto", "nearest", "linear", "plans")


def choose_method(resampling: Callable[..., Any] | None, *, coordinates: str) -> str:
    """Return the cheapest method whose result equals upstream's.

    Parameters
    ----------
    resampling
        The plans' resampling function for probabilities; None decides by ``coordinates``.
    coordinates
        "corners": TotalSegmentator resamples the label map. "centers": nnU-Net resamples logits.
    """
    if coordinates == CORNERS:
        return "nearest"
    if resampling is None or is_default_resampling(resampling, order=1):
        return "linear"
    return "plans"


def is_default_resampling(resampling: Callable[..., Any], *, order: int) -> bool:
    """Whether the plans name nnU-Net's default resampling, for images, with these orders.

    ``order``, and 0 along an axis that is resampled separately.
    """
    options = getattr(resampling, "keywords", {})
    function = getattr(resampling, "func", resampling)
    return (
        getattr(function, "__name__", "") == "resample_data_or_seg_to_shape"
        and getattr(function, "__module__", "").startswith("nnunetv2.")
        and not options.get("is_seg", False)
        and options.get("order", 3) == order
        and options.get("order_z", 0) == 0
    )


def resampling_axes(
    source: Sequence[int], target: Sequence[int], coordinates: str, separate: int | None
) -> list[LinearWeights]:
    """Weights of each axis: linear, but nearest-neighbour along the ``separate`` one."""
    return [
        (nearest_weights if axis == separate else linear_weights)(n, m, coordinates)
        for axis, (n, m) in enumerate(zip(source, target, strict=True))
    ]


def separate_axis(
    spacing: Sequence[float] | None,
    new_spacing: Sequence[float] | None,
    *,
    resampling: Callable[..., Any] | None,
    force_separate_z: bool | None = None,
) -> int | None:
    """The axis that nnU-Net resamples by nearest neighbour, by its own rule.

    The options of ``resampling`` take precedence over ``force_separate_z``.
    """
    if spacing is None or new_spacing is None:
        return None
    from nnunetv2.preprocessing.resampling.default_resampling import determine_do_sep_z_and_axis

    options: dict[str, Any] = {"force_separate_z": force_separate_z}
    if resampling is not None:
        keywords = getattr(resampling, "keywords", {})
        options = {"force_separate_z": False}  # resample_data_or_seg_to_shape's default
        for name in ("force_separate_z", "separate_z_anisotropy_threshold"):
            if name in keywords:
                options[name] = keywords[name]
    separate, axis = determine_do_sep_z_and_axis(
        current_spacing=spacing, new_spacing=new_spacing, **options
    )
    return int(axis) if separate else None
