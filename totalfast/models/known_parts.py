"""The names in a model's files that may become classes and functions: nnU-Net's and torch's own.

nnU-Net (2.8.1) turns these texts of a model's files into objects:

==========================================  =====================================================
plans.json, in a configuration              how
==========================================  =====================================================
``architecture.network_class_name``         ``pydoc.locate``: imports and runs any module
keys in ``_kw_requires_import``             ``pydoc.locate`` of the values in ``arch_kwargs``
``arch_kwargs.conv_op``                     ``pydoc.locate`` in nnUNetTrainerBN
all of ``arch_kwargs``                      keywords of the network's class
``*_op_kwargs``, ``nonlin_kwargs``          keywords of the layer's class: ``os.system(command)``
``preprocessor_name``                       any attribute of nnU-Net's modules, then called
``normalization_schemes``                   the same
``resampling_fn_*`` and ``_kwargs``         the same, with keywords
``UNet_class_name`` (old format)            compared with two names
``inherits_from``, ``previous_stage``       names of other configurations
==========================================  =====================================================

===================================  ============================================================
other places                         how
===================================  ============================================================
plans: ``image_reader_writer``       any attribute of nnU-Net's modules, then called
plans: ``label_manager``             the same
plans: ``experiment_planner_used``   the same, but only when training is planned
dataset: ``overwrite_image_reader_writer``  the same, but only when a data set is preprocessed
checkpoint: ``trainer_name``         a trainer's class, see ``trainers``
checkpoint: ``init_args``            ``configuration``, a name in the plans
===================================  ============================================================

All but the two that only training uses are checked here, for every configuration in the plans.
Names are compared as texts; nothing is imported to find out what a name means.
"""

from __future__ import annotations

import ast
import functools
import re
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from totalfast.errors import WeightsError
from totalfast.models.model_files import Entry, damaged, shortened
from totalfast.models.nnunet_versions import remark_on_age

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

NETWORKS = "dynamic_network_architectures.architectures"
"""Package of nnU-Net's networks."""

LAYERS = {
    "conv_op": ("conv", ("Conv1d", "Conv2d", "Conv3d")),
    "norm_op": ("batchnorm", ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d")),
    "dropout_op": ("dropout", ("Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout")),
    "nonlin": (
        "activation",
        ("LeakyReLU", "ReLU", "ReLU6", "PReLU", "ELU", "SELU", "CELU", "GELU", "SiLU", "Mish")
        + ("Hardswish", "Hardsigmoid", "Hardtanh", "Softplus", "Softsign", "Sigmoid", "Tanh"),
    ),
}
"""Keyword of a network to the module in ``torch.nn.modules`` and the layers that it may be."""

INSTANCE_NORMS = ("instancenorm", ("InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d"))

BLOCKS = tuple(
    f"dynamic_network_architectures.building_blocks.residual.{name}"
    for name in ("BasicBlockD", "BottleneckD")
)

LARGEST = 1e6
"""Largest number in the keywords of layers and functions."""

LAYER_KEYWORDS: dict[str, Callable[[Entry], object]] = {
    "inplace": Entry.flag,
    "affine": Entry.flag,
    "track_running_stats": Entry.flag,
    "eps": lambda entry: entry.number(0, 1),
    "momentum": lambda entry: entry.value is None or entry.number(0, 1),
    "p": lambda entry: entry.number(0, 1),
    "negative_slope": lambda entry: entry.number(-LARGEST, LARGEST),
    "alpha": lambda entry: entry.number(-LARGEST, LARGEST),
    "init": lambda entry: entry.number(-LARGEST, LARGEST),
    "approximate": lambda entry: entry.one_of(("none", "tanh")),
}
"""Keywords of layers, and the check of their values."""

_RESIZE_MODES = ("linear", "nearest", "nearest-exact")

RESAMPLING_KEYWORDS: dict[str, Callable[[Entry], object]] = {
    "is_seg": Entry.flag,
    "order": lambda entry: entry.whole(0, 5),
    "order_z": lambda entry: entry.whole(0, 5),
    "force_separate_z": lambda entry: entry.value is None or entry.flag(),
    "separate_z_anisotropy_threshold": lambda entry: entry.number(0, LARGEST),
    "num_threads": lambda entry: entry.whole(1, 1024),
    "memefficient_seg_resampling": Entry.flag,
    "mode": lambda entry: entry.one_of(_RESIZE_MODES),
    "aniso_axis_mode": lambda entry: entry.one_of(_RESIZE_MODES),
}
"""Keywords of nnU-Net's resampling functions, and the check of their values."""

_RESAMPLING_ARGUMENTS = ("data", "new_shape", "current_spacing", "new_spacing")


def check_names(plans: Entry) -> None:
    """Check all names in plans.json that nnU-Net would turn into objects.

    Raises
    ------
    WeightsError
        If a name is none of nnU-Net's or torch's known parts.
    """
    _known(plans.item("image_reader_writer"), _classes("nnunetv2", "imageio"))
    if "label_manager" in plans:
        _known(plans.item("label_manager"), _classes("nnunetv2", "utilities/label_handling"))
    for configuration in plans.item("configurations").entries().values():
        _check_preparation(configuration)
        if "architecture" in configuration:
            check_architecture(configuration.item("architecture"))


def _check_preparation(configuration: Entry) -> None:
    if "preprocessor_name" in configuration:
        known = _classes("nnunetv2", "preprocessing/preprocessors")
        _known(configuration.item("preprocessor_name"), known)
    if "normalization_schemes" in configuration:
        for scheme in configuration.item("normalization_schemes").items(range(1001)):
            _known(scheme, _classes("nnunetv2", "preprocessing/normalization"))
    for name in ("data", "seg", "probabilities"):
        key = f"resampling_fn_{name}"
        if key in configuration:
            _known(configuration.item(key), resampling_functions())
        if f"{key}_kwargs" in configuration:
            _check_keywords(configuration.item(f"{key}_kwargs"), RESAMPLING_KEYWORDS)


def check_resampling(configuration: Entry, name: str) -> None:
    """Check that a resampling function and its keywords fit; ``name`` is "data", for example.

    Raises
    ------
    WeightsError
        If one of them is missing, or the function lacks a keyword.
    """
    function = configuration.item(f"resampling_fn_{name}").text()
    keywords = configuration.item(f"resampling_fn_{name}_kwargs")
    accepted = resampling_functions().get(function, ())
    for key, value in keywords.entries().items():
        if key not in accepted:
            raise damaged(value.path, f"{value.place} is no keyword of {function}")
        if key == "is_seg" and value.flag() and name != "seg":
            raise value.error("false, because no label map is resampled here")


def check_architecture(architecture: Entry) -> None:
    """Check the names in the description of a network.

    Raises
    ------
    WeightsError
        If a name or a keyword is none of nnU-Net's or torch's.
    """
    network_path(architecture.item("network_class_name"))
    kwargs = architecture.item("arch_kwargs")
    required = architecture.item("_kw_requires_import")
    for keyword in required.items(range(101)):
        kwargs.item(keyword.text())
    for key in {*LAYERS, "block", *required.value}.intersection(kwargs.mapping()):
        if kwargs.value[key] is not None:
            _known(kwargs.item(key), layer_paths(key))
    for key, entry in kwargs.entries().items():
        if key.endswith("_kwargs") and entry.value is not None:
            _check_keywords(entry, LAYER_KEYWORDS)


def check_dimensions(architecture: Entry, dimensions: int) -> None:
    """Check that the layers are for images with this number of dimensions, such as ``Conv3d``.

    Raises
    ------
    WeightsError
        If a layer is for another number of dimensions.
    """
    kwargs = architecture.item("arch_kwargs")
    for key in LAYERS:
        if kwargs.mapping().get(key) is not None:
            layer = kwargs.item(key)
            if re.search(f"[^{dimensions}]d$", layer.text()):
                raise layer.error(f"a layer for {dimensions}-D images, because of the patch_size")


def network_path(name: Entry) -> str:
    """Return the path of a network's class; nnU-Net's networks were in other modules earlier."""
    match = re.fullmatch(re.escape(NETWORKS) + r"\.[a-z_]+\.(\w+)", name.text(), re.ASCII)
    if match is None or match[1] not in _classes(NETWORKS, "unet.py"):
        raise _unknown(name)
    return f"{NETWORKS}.unet.{match[1]}"


@functools.cache
def layer_paths(keyword: str) -> dict[str, str]:
    """Return all ways to write the layers that a keyword of a network may be, to their names."""
    if keyword == "block":
        return {path: path.rpartition(".")[2] for path in BLOCKS}
    kinds = [LAYERS[keyword]] if keyword in LAYERS else []
    if keyword == "norm_op":
        kinds.append(INSTANCE_NORMS)
    return {
        f"torch.nn.{module}{name}": name
        for submodule, names in kinds
        for module in ("", f"modules.{submodule}.")
        for name in names
    }


def _check_keywords(keywords: Entry, known: dict[str, Callable[[Entry], object]]) -> None:
    for key, value in keywords.entries().items():
        if key not in known:
            raise _unknown(value)
        known[key](value)


def _known(name: Entry, known: Collection[str]) -> None:
    if name.text() not in known:
        raise _unknown(name)


def _unknown(entry: Entry) -> WeightsError:
    return WeightsError(
        f"{entry.path}: {entry.place} is {shortened(entry.value)}, which is no known part of a "
        "network and could run any code. If the model has an architecture of your own, or you "
        "trust its source as you trust a program, allow it by --trust-model (Python: "
        f"trust_model=True).{remark_on_age()}"
    )


@functools.cache
def _classes(package: str, place: str) -> frozenset[str]:
    """Names of the classes that the modules at a place of a package define, without abstract ones.

    Reads the source code, because importing it takes longer.
    """
    return frozenset(
        node.name
        for node in _definitions(package, place)
        if isinstance(node, ast.ClassDef)
        and not any(isinstance(base, ast.Name) and base.id == "ABC" for base in node.bases)
    )


@functools.cache
def resampling_functions() -> dict[str, frozenset[str]]:
    """Names of nnU-Net's resampling functions to their keywords."""
    functions = {}
    for node in _definitions("nnunetv2", "preprocessing/resampling"):
        if isinstance(node, ast.FunctionDef):
            arguments = [argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)]
            if tuple(arguments[:4]) == _RESAMPLING_ARGUMENTS:
                functions[node.name] = frozenset(arguments[4:])
    return functions


def _definitions(package: str, place: str) -> list[ast.stmt]:
    """Statements of the modules at a place: a file or a folder below a package."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise WeightsError(f"the package {package} is not installed; reinstall nnunetv2.")
    root = Path(spec.submodule_search_locations[0], place)
    files = [root] if root.suffix == ".py" else sorted(root.rglob("*.py"))
    return [node for file in files for node in ast.parse(file.read_text(encoding="utf-8")).body]
