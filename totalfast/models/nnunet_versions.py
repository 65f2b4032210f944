"""The differences between the versions of nnU-Net, and which of them are supported.

Only differences that change a call are here. What the oldest supported version, 2.5.1, and the
newest tested one have in common is called where it is needed. Packages made from nnU-Net have other
version numbers than it, so that the way to call a function is taken from the function itself.

=======  ===========================================================================================
version  change
=======  ===========================================================================================
2.3      ``perform_everything_on_gpu`` became ``perform_everything_on_device``; trainers build their
         networks from names and keywords instead of the plans and dataset.json
2.5      logits are resampled with the spacings in the order of the network's axes, and any axis may
         be resampled separately; torch may resample
2.6      labels are the maximum of the logits instead of the probabilities; ``run_case_npy`` returns
         the properties too; files hold labels above 255
2.7      trainers build their networks from the plans again
2.8      trainers may be in the folders of ``nnUNet_extTrainer``
=======  ===========================================================================================
"""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
import logging
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from totalfast.errors import TotalfastError

if TYPE_CHECKING:
    from typing import TypeAlias

    from torch import nn

    Untyped: TypeAlias = Any
    """nnU-Net's classes, objects and arrays, which have no types."""

logger = logging.getLogger(__name__)

OLDEST = (2, 5, 1)
"""Oldest supported version of nnunetv2."""

TESTED = (2, 8)
"""Newest minor version that totalfast was tested with (``scripts/nnunet_versions.py``)."""


class VersionError(TotalfastError):
    """The installed nnunetv2 is missing or of a version that is not supported."""


@functools.cache
def check_version() -> None:
    """Check that nnunetv2 is supported; warn once if it is newer than tested.

    Raises
    ------
    VersionError
        If it is not installed, older than ``OLDEST``, or of another major version.
    """
    text, number = installed_version(), _number()
    if text is None:
        from importlib.util import find_spec

        if find_spec("nnunetv2") is None:
            raise VersionError(f"nnunetv2 is not installed; pip install '{_requirement()}'.")
        return  # a package with nnU-Net's modules and another name
    if number < OLDEST or number[0] != OLDEST[0]:
        raise VersionError(
            f"nnunetv2 {text} is installed, but totalfast supports {_dotted(OLDEST)} to "
            f"{_dotted(TESTED)}, and newer {OLDEST[0]}.x versions untested: "
            f"pip install '{_requirement()}'."
        )
    if number[:2] > TESTED:
        logger.warning(
            "WARNING: nnunetv2 %s is newer than the version that totalfast was tested with (%s); "
            "results may differ from nnU-Net's.",
            text,
            _dotted(TESTED),
        )


def installed_version() -> str | None:
    """Version of nnunetv2; None if no package of that name is installed."""
    try:
        return importlib.metadata.version("nnunetv2")
    except importlib.metadata.PackageNotFoundError:
        return None


def remark_on_age() -> str:
    """Return a sentence if the installed nnU-Net is so old that it may lack what plans name."""
    if not _number() or _number()[:2] >= TESTED:
        return ""
    return (
        f" nnunetv2 {installed_version()} is installed; it may be a part of a newer version, up to "
        f"{_dotted(TESTED)}."
    )


def _number() -> tuple[int, ...]:
    """Major, minor and patch number of the installed version; empty if it is not known."""
    return tuple(int(part) for part in re.findall(r"\d+", installed_version() or "")[:3])


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _requirement() -> str:
    return f"nnunetv2>={_dotted(OLDEST)},<{OLDEST[0] + 1}"


def prepare(
    preprocessor: Untyped,
    image: Untyped,
    labels: Untyped,
    properties: dict[str, Any],
    model: Untyped,
) -> tuple[Untyped, Untyped, dict[str, Any]]:
    """Call ``run_case_npy`` of one of nnU-Net's preprocessors.

    Returns
    -------
        Image, labels and properties. Before nnU-Net 2.6 the given properties are changed, and only
        image and labels returned.
    """
    result = preprocessor.run_case_npy(
        image, labels, properties, model.plans, model.configuration, model.dataset
    )
    return result if len(result) == _WITH_PROPERTIES else (*result, properties)


_WITH_PROPERTIES = 3


def build_network(
    trainer: Untyped,
    *,
    plans: Untyped,
    configuration: Untyped,
    dataset: dict[str, Any],
    inputs: int,
    outputs: int,
) -> nn.Module:
    """Build the network of a trainer that was written for any version from 2.0 on.

    Parameters
    ----------
    trainer
        The trainer's class. Its ``build_network_architecture`` has one of three signatures, which
        are told apart by the names of its parameters, as nnU-Net does (2.7).
    plans, configuration, dataset
        nnU-Net's objects of the model.
    inputs, outputs
        Number of channels of the network's input and output.
    """
    build = trainer.build_network_architecture
    parameters = inspect.signature(build).parameters
    arguments: tuple[Untyped, ...]
    if "dataset_json" in parameters:  # up to 2.2
        arguments = (plans, dataset, configuration, inputs)
    elif "plans_manager" in parameters:  # from 2.7 on
        arguments = (plans, configuration, inputs, outputs)
    else:
        arguments = (
            configuration.network_arch_class_name,
            configuration.network_arch_init_kwargs,
            configuration.network_arch_init_kwargs_req_import,
            inputs,
            outputs,
        )
    network: nn.Module = build(*arguments, enable_deep_supervision=False)
    return network


FINDERS = ("recursive_find_trainer_class_by_name", "recursive_find_python_class")
"""Functions by which nnU-Net's predictor finds a trainer: from 2.8 on, and earlier."""


def registered_trainer(name: str) -> Untyped:
    """Return the trainer that the running program has registered in nnU-Net's predictor, or None.

    Programs replace the predictor's ``FINDERS`` by a function that knows their trainers, as
    TotalSegmentator does.
    """
    predictor = sys.modules.get("nnunetv2.inference.predict_from_raw_data")
    for finder in FINDERS:
        find = getattr(predictor, finder, None)
        if find is None or str(getattr(find, "__module__", None)).startswith("nnunetv2."):
            continue
        place = (str(_nnunet() / "training/nnUNetTrainer"), name, "nnunetv2.training.nnUNetTrainer")
        try:
            trainer = find(name) if finder == FINDERS[0] else find(*place)
        except (ImportError, RuntimeError):  # nnU-Net's error for an unknown name
            continue
        if trainer is not None:
            return trainer
    return None


def reads_trainer_folders() -> bool:
    """Whether nnU-Net looks for trainers in the folders of ``nnUNet_extTrainer``."""
    from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

    return "base_folder" in inspect.signature(recursive_find_python_class).parameters


def trainer_in_folders(name: str) -> Untyped:
    """Look a trainer up in the folders of ``nnUNet_extTrainer``, silently; None if none has it."""
    from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

    if not reads_trainer_folders():
        return None
    for folder in os.environ.get("nnUNet_extTrainer", "").split(os.pathsep):  # noqa: SIM112
        if folder.strip() and Path(folder).exists():
            trainer = recursive_find_python_class(
                folder, name, None, base_folder=folder, cleanup_imports_from_base_folder=True
            )
            if trainer is not None:
                return trainer
    return None


def _nnunet() -> Path:
    """Folder of nnU-Net's modules."""
    import nnunetv2

    return Path(nnunetv2.__path__[0])
