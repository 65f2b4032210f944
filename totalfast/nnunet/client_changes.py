"""What a program has changed on nnU-Net's predictor, so that only nnU-Net's own code obeys it."""

from __future__ import annotations

import functools
import inspect
import sys
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules import module as nn_module

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import TypeAlias

    Untyped: TypeAlias = Any
    """nnU-Net's objects, which have no types."""

LOOP = (
    "predict_sliding_window_return_logits",
    "_internal_predict_sliding_window_return_logits",
    "_internal_maybe_mirror_and_predict",
    "_internal_get_sliding_window_slicers",
)
"""Methods of nnU-Net's predictor that compute the logits of an image, called by
``predict_logits_from_preprocessed_data``."""

PREDICTOR = "nnunetv2.inference.predict_from_raw_data"
RESAMPLING = {
    "nnunetv2.preprocessing.resampling.default_resampling": (
        "resample_data_or_seg",
        "resample_data_or_seg_to_shape",
        "get_do_separate_z",
        "get_lowres_axis",
        "determine_do_sep_z_and_axis",
    ),
}
LOOP_FUNCTIONS = {
    PREDICTOR: ("compute_gaussian", "compute_steps_for_sliding_window", "pad_nd_image"),
}
EXPORT_FUNCTIONS = {
    PREDICTOR: (
        "export_prediction_from_logits",
        "convert_predicted_logits_to_segmentation_with_correct_shape",
    ),
    "nnunetv2.inference.export_prediction": (
        "convert_predicted_logits_to_segmentation_with_correct_shape",
        "insert_crop_into_image",
    ),
    **RESAMPLING,
}
ITERATING_FUNCTIONS = {
    PREDICTOR: (
        "preprocessing_iterator_fromfiles",
        "preprocessing_iterator_fromnpy",
        "PreprocessAdapterFromNpy",
    ),
}
PREPARING_FUNCTIONS = {
    "nnunetv2.preprocessing.preprocessors.default_preprocessor": (
        "crop_to_nonzero",
        "compute_new_shape",
        "recursive_find_python_class",
    ),
    "nnunetv2.preprocessing.cropping.cropping": ("create_nonzero_mask", "crop_to_nonzero"),
    **RESAMPLING,
}
"""Functions of nnU-Net that its predictor, export and preprocessor call by their names in these
modules, so that a program may replace them."""

PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)

KNOWN_MODULES = (
    "acvl_utils.",
    "nnunetv2.",
    "totalfast.",
    "totalsegmentator.nnunet_runtime_patches",
)
"""Where nnU-Net's functions, and those that replace them with equal results, are defined."""

KNOWN_DECORATORS = (*KNOWN_MODULES, "functools", "torch.")

KNOWN_CLASSES = ("nnUNetPredictor", "ArgmaxPredictor", "LabelManager", "DefaultPreprocessor")


def changed_loop(predictor: Untyped) -> str | None:
    """Return what a program has changed about the computation of logits, or None.

    Looks at the methods of ``LOOP``, in the class and in the predictor, at the functions that they
    call, and at the network: its class, hooks, and ``forward`` methods.
    """
    return (
        changed_methods(predictor, LOOP)
        or changed_functions(LOOP_FUNCTIONS)
        or _changed_network(predictor.network)
        or _autocast(predictor.device)
    )


def changed_methods(owner: Untyped, names: tuple[str, ...]) -> str | None:
    """Return the first of nnU-Net's methods that is another one in an object or class, or None."""
    for name in names:
        if not is_known(inspect.getattr_static(owner, name), name):
            kind = owner if isinstance(owner, type) else type(owner)
            return f"{kind.__name__} has its own {name}"
    return None


def changed_functions(names: Mapping[str, tuple[str, ...]]) -> str | None:
    """Return the first of nnU-Net's functions that a program has replaced, or None."""
    for module, functions in names.items():
        for name in functions:
            # Not every version has all of them, and what is not imported is not changed.
            own = getattr(sys.modules.get(module), name, None)
            if own is not None and not is_known(own, name):
                return f"the program has replaced nnU-Net's {name}"
    return None


def has_own_writer(writer: type) -> bool:
    """Whether a program has its own way of writing a segmentation."""
    layers = _layers(inspect.getattr_static(writer, "write_seg"))
    return not all(_module(layer).startswith("nnunetv2.imageio.") for layer in layers)


def has_ordinary_labels(labels: Untyped) -> bool:
    """Whether labels follow from logits by nnU-Net's rule: argmax, or sigmoid above 0.5."""
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    if type(labels) is not LabelManager:
        return False
    members = {k: v for k, v in vars(LabelManager).items() if not k.startswith("__")}
    if any(name in members for name in vars(labels)):
        return False
    for name, member in members.items():
        function = member.fget if isinstance(member, property) else member
        if not is_known(getattr(function, "__func__", function), name):
            return False
    if not labels.has_regions:
        return True
    is_complete = len(labels.regions_class_order) == labels.num_segmentation_heads
    return is_complete and labels.inference_nonlin is torch.sigmoid


def is_known(function: Untyped, name: str) -> bool:
    """Whether a function is nnU-Net's function of that name, or one that replaces it equally.

    Decorators copy the name and the module of a function, but not the module of their own code.
    """
    *wrappers, inner = _layers(function)
    *holder, own_name = str(getattr(inner, "__qualname__", None)).split(".")
    return (
        all(_module(wrapper).startswith(KNOWN_DECORATORS) for wrapper in wrappers)
        and _module(inner).startswith(KNOWN_MODULES)
        and own_name == name
        and (not holder or holder[0] in KNOWN_CLASSES)
    )


def _layers(function: Untyped) -> list[Untyped]:
    """Return a function, the function that it decorates, and so on."""
    layers = [function]
    while (inner := getattr(layers[-1], "__wrapped__", None)) is not None:
        layers.append(inner)
    return layers


def _module(function: Untyped) -> str:
    """Name of the module with the code of a function or class; empty for other objects."""
    if isinstance(function, functools._lru_cache_wrapper):
        return "functools"
    if isinstance(function, type):
        return function.__module__
    # Proxies pretend to be the function that they call, with its attributes and its class.
    return str(function.__globals__.get("__name__")) if type(function) is FunctionType else ""


def _changed_network(network: Untyped) -> str | None:
    from torch._dynamo import OptimizedModule

    if not isinstance(network, nn.Module):
        return "the network is no torch module"
    if isinstance(network, (OptimizedModule, torch.jit.ScriptModule, *PARALLEL)):
        return f"the network is a {type(network).__name__}"
    if nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks:
        return "torch has hooks for all modules"
    if any(p.is_floating_point() and p.dtype != torch.float32 for p in network.parameters()):
        return "the network is not in float32"
    for part in network.modules():
        if part._forward_hooks or part._forward_pre_hooks:
            return "the network has hooks"
        for name, value in vars(part).items():
            if callable(value) and hasattr(type(part), name):
                return f"the network has its own {name} method"
    return None


def _autocast(device: torch.device) -> str | None:
    if device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        return "torch.autocast is on for the CPU"
    return None
