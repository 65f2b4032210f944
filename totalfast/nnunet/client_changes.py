"""What a program has changed on nnU-Net's predictor, so that only nnU-Net's own code obeys it."""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules import module as nn_module

if TYPE_CHECKING:
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

LOOP_FUNCTIONS = ("compute_gaussian", "compute_steps_for_sliding_window", "pad_nd_image")
EXPORT_FUNCTIONS = (
    "export_prediction_from_logits",
    "convert_predicted_logits_to_segmentation_with_correct_shape",
)
PREPARING_FUNCTIONS = (
    "preprocessing_iterator_fromfiles",
    "preprocessing_iterator_fromnpy",
    "PreprocessAdapterFromNpy",
)
"""Functions that nnU-Net's predictor calls by their names in its module."""

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


def changed_methods(predictor: Untyped, names: tuple[str, ...]) -> str | None:
    """Return the first of nnU-Net's methods that is another one in this predictor, or None."""
    for name in names:
        if not _is_known(inspect.getattr_static(predictor, name), name):
            return f"{type(predictor).__name__} has its own {name}"
    return None


def changed_functions(names: tuple[str, ...]) -> str | None:
    """Return the first of nnU-Net's functions that a program has replaced, or None."""
    from nnunetv2.inference import predict_from_raw_data

    for name in names:
        own = getattr(predict_from_raw_data, name, None)  # not every version has all of them
        if own is not None and not _is_known(own, name):
            return f"the program has replaced nnU-Net's {name}"
    return None


def has_own_method(kind: type, *names: str) -> bool:
    """Whether one of these methods of a preprocessor is not that of nnU-Net's default one."""
    return not all(_is_known(inspect.getattr_static(kind, name), name) for name in names)


def has_ordinary_labels(labels: Untyped) -> bool:
    """Whether labels follow from logits by nnU-Net's rule: argmax, or sigmoid above 0.5."""
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    if type(labels) is not LabelManager:
        return False
    own = (name for name in vars(labels) if name in vars(LabelManager))
    methods = ((name, f) for name, f in vars(LabelManager).items() if inspect.isfunction(f))
    if any(own) or not all(_is_known(method, name) for name, method in methods):
        return False
    return not labels.has_regions or labels.inference_nonlin is torch.sigmoid


def _is_known(function: Untyped, name: str) -> bool:
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
    return str(getattr(function, "__globals__", {}).get("__name__", ""))


def _changed_network(network: Untyped) -> str | None:
    from torch._dynamo import OptimizedModule

    if not isinstance(network, nn.Module):
        return "the network is no torch module"
    if isinstance(network, (OptimizedModule, torch.jit.ScriptModule, *PARALLEL)):
        return f"the network is a {type(network).__name__}"
    if nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks:
        return "torch has hooks for all modules"
    for part in network.modules():
        if part._forward_hooks or part._forward_pre_hooks:
            return "the network has hooks"
        if "forward" in vars(part):
            return "the network has its own forward method"
    return None


def _autocast(device: torch.device) -> str | None:
    if device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        return "torch.autocast is on for the CPU"
    return None
