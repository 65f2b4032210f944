"""Find, check and load a model folder, without running code that it contains.

Checkpoints are read with ``weights_only=True``: a file with objects other than tensors, containers
and plain numbers is refused.
"""

from __future__ import annotations

import ast
import contextlib
import gc
import io
import json
import logging
import pickle
import re
import threading
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from totalfast import upstream
from totalfast.engine.backends.forward import run_by_torch
from totalfast.engine.model import Model
from totalfast.engine.weights import CHECKPOINT_NAME
from totalfast.errors import WeightsError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import TypeAlias

    import torch
    from torch import nn

    from totalfast.engine.backends import Backend

    Untyped: TypeAlias = Any
    """nnU-Net's classes and objects, which have no types."""

logger = logging.getLogger(__name__)


_LOADING = threading.Lock()
"""Loading changes torch's list of safe types and Python's warning filters, which are global."""


def load_model(
    folder: Path,
    *,
    folds: Sequence[int | str] | None,
    device: torch.device,
    checkpoint_name: str = CHECKPOINT_NAME,
    backend: Backend = run_by_torch,
) -> Model:
    """Load a model folder.

    Parameters
    ----------
    folder
        A folder with plans.json, dataset.json and ``fold_N/checkpoint_final.pth``.
    folds
        Folds to load; None loads every ``fold_*`` except ``fold_all``.
    device
        Device of the weights.
    checkpoint_name
        File in each fold's folder.
    backend
        Backend that runs the networks.

    Raises
    ------
    WeightsError
        If a file is missing or unreadable, or a checkpoint holds objects other than weights.
    """
    with _LOADING:
        return _load(folder, folds, device, checkpoint_name, backend)


def _load(
    folder: Path,
    folds: Sequence[int | str] | None,
    device: torch.device,
    checkpoint_name: str,
    backend: Backend,
) -> Model:
    plans_manager_class, _ = _import_nnunet()
    plans = plans_manager_class(_read_json(folder / "plans.json"))
    dataset = _read_json(folder / "dataset.json")
    checkpoints = [
        read_checkpoint(path) for path in _checkpoint_paths(folder, folds, checkpoint_name)
    ]
    first = checkpoints[0]
    try:
        architecture = _architecture(plans, dataset, first)
        networks = tuple(_network(architecture, checkpoint, device) for checkpoint in checkpoints)
    except (KeyError, RuntimeError) as error:
        raise WeightsError(
            f"the checkpoint in {folder} does not fit its plans: {error}. "
            "Delete the model's folder, then it is downloaded again."
        ) from error
    axes = first.get("inference_allowed_mirroring_axes")
    return Model(
        folder=folder,
        plans=plans,
        configuration=architecture.configuration,
        labels=architecture.labels,
        dataset=dataset,
        networks=networks,
        forwards=tuple(backend(network, architecture.tile_shape) for network in networks),
        trainer_name=architecture.trainer_name,
        mirroring_axes=None if axes is None else tuple(axes),
        device=device,
    )


class _Architecture(NamedTuple):
    """Everything that determines a model's network, without its weights."""

    trainer_name: str
    plans: Untyped
    configuration: Untyped
    labels: Untyped
    tile_shape: tuple[int, ...]


def _architecture(
    plans: Untyped, dataset: dict[str, Any], checkpoint: dict[str, Any]
) -> _Architecture:
    with warnings.catch_warnings():
        # Nearly all official models have plans of the old format, which nnU-Net still reads.
        warnings.filterwarnings("ignore", message="Detected old nnU-Net plans format")
        configuration = plans.get_configuration(checkpoint["init_args"]["configuration"])
    return _Architecture(
        trainer_name=checkpoint["trainer_name"],
        plans=plans,
        configuration=configuration,
        labels=plans.get_label_manager(dataset),
        tile_shape=tile_shape(plans, configuration, dataset),
    )


def _network(
    architecture: _Architecture, checkpoint: dict[str, Any], device: torch.device
) -> nn.Module:
    """Build one fold's network with the weights of its checkpoint, in eval mode."""
    network = _empty_network(architecture)
    # nnU-Net calls pydoc.locate. Up to Python 3.11 that leaves an error in a reference cycle, which
    # holds the network and the checkpoints through the callers' frames.
    gc.collect(1)
    network.load_state_dict(_as_float32(checkpoint["network_weights"]), assign=True)
    return network.to(device).eval()


def tile_shape(plans: Untyped, configuration: Untyped, dataset: dict[str, Any]) -> tuple[int, ...]:
    """Shape of a network's input: (1, channels, z, y, x), or (1, channels, y, x) if it is 2-D."""
    _, determine_num_input_channels = _import_nnunet()
    channels: int = determine_num_input_channels(plans, configuration, dataset)
    return (1, channels, *configuration.patch_size)


def _as_float32(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Convert weights that are stored in half precision, like copying them into a network does."""
    return {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in weights.items()
    }


def _import_nnunet() -> tuple[Untyped, Untyped]:
    """Import nnU-Net's PlansManager and determine_num_input_channels.

    nnU-Net prints messages about unset environment variables, which are hidden here.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
        from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
    return PlansManager, determine_num_input_channels


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} can't be read: {error}") from error
    return content


def _checkpoint_paths(
    folder: Path, folds: Sequence[int | str] | None, checkpoint_name: str
) -> list[Path]:
    if folds is None:
        names = sorted(
            path.name for path in folder.glob("fold_*") if (path / checkpoint_name).is_file()
        )
        names = [name for name in names if name != "fold_all"]
    else:
        names = [f"fold_{fold}" for fold in folds]
    paths = [folder / name / checkpoint_name for name in names]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing or not paths:
        raise WeightsError(
            f"{folder} has no {', '.join(missing) or checkpoint_name}. "
            "Delete the model's folder, then it is downloaded again."
        )
    return paths


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint's tensors and numbers, mapped from the file, without running its code.

    Raises
    ------
    WeightsError
        If it is damaged, or holds types other than tensors, containers and numpy numbers.
    """
    import torch

    with torch.serialization.safe_globals(_numpy_number_types()):
        try:
            try:
                checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                # Files written before torch 1.6 are not zip archives and can't be mapped.
                if "mmap" not in str(error):
                    raise
                checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            forbidden = re.search(r"GLOBAL (\S+)", str(error))
            raise WeightsError(
                f"{path} holds more than weights"
                f"{f' ({forbidden.group(1)})' if forbidden else ''} and was not opened. "
                "Official checkpoints hold only tensors and numbers; download the file again from "
                "its source."
            ) from error
        except (OSError, RuntimeError, EOFError, LookupError, ValueError) as error:
            raise WeightsError(f"{path} is not a checkpoint or is damaged: {error}") from error
    content: dict[str, Any] = checkpoint
    return content


def _numpy_number_types() -> list[Any]:
    """Types in nnU-Net's pickled training log: numpy scalars and their dtypes."""
    import numpy as np
    from numpy._core import multiarray

    numbers = ("Float64DType", "Float32DType", "Int64DType", "Int32DType", "BoolDType")
    dtypes = [getattr(np.dtypes, name) for name in numbers]
    # Checkpoints written with NumPy 1 have the module's name without the underscore.
    return [
        (multiarray.scalar, "numpy.core.multiarray.scalar"),
        (multiarray.scalar, "numpy._core.multiarray.scalar"),
        np.dtype,
        *dtypes,
    ]


def _empty_network(architecture: _Architecture) -> nn.Module:
    """Build a network without allocating or initialising its weights."""
    import torch

    plans, configuration = architecture.plans, architecture.configuration
    inputs, outputs = architecture.tile_shape[1], architecture.labels.num_segmentation_heads
    with torch.device("meta"):
        if builds_from_plans(architecture.trainer_name):
            from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

            network: nn.Module = get_network_from_plans(
                configuration.network_arch_class_name,
                configuration.network_arch_init_kwargs,
                configuration.network_arch_init_kwargs_req_import,
                inputs,
                outputs,
                allow_init=False,
                deep_supervision=False,
            )
            return network
        trainer: Untyped = upstream.custom_trainer(architecture.trainer_name)
        if trainer is None:
            from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

            trainer = recursive_find_trainer_class_by_name(architecture.trainer_name)
        network = trainer.build_network_architecture(
            plans, configuration, inputs, outputs, enable_deep_supervision=False
        )
        return network


def builds_from_plans(trainer_name: str) -> bool:
    """Whether one of nnU-Net's trainers inherits ``build_network_architecture`` from nnUNetTrainer.

    Reads the trainers' source code, because importing them takes seconds and imports all of
    nnU-Net's training. Returns False for unknown trainers.
    """
    classes = _nnunet_trainers()
    name = trainer_name
    while name in classes and name != "nnUNetTrainer":
        base, overrides = classes[name]
        if overrides:
            return False
        name = base
    return name == "nnUNetTrainer"


def _nnunet_trainers() -> dict[str, tuple[str, bool]]:
    """Class name to (first base class, whether it overrides ``build_network_architecture``)."""
    import nnunetv2

    classes: dict[str, tuple[str, bool]] = {}
    for path in sorted((Path(nnunetv2.__path__[0]) / "training/nnUNetTrainer").rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                overrides = any(
                    isinstance(item, ast.FunctionDef) and item.name == "build_network_architecture"
                    for item in node.body
                )
                base = node.bases[0] if node.bases else None
                classes[node.name] = (base.id if isinstance(base, ast.Name) else "", overrides)
    return classes
