"""Find, check and load a model folder, without running anything that it contains.

Knows nnU-Net's folder layout and its plans; knows nothing of images. Checkpoints are read with
``weights_only=True``: a file that asks for more than tensors and plain numbers is refused.
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
from typing import TYPE_CHECKING, Any

from totalfast import upstream
from totalfast.engine.backends.forward import run_by_torch
from totalfast.engine.model import Model
from totalfast.engine.weights import CHECKPOINT_NAME
from totalfast.errors import WeightsError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import nn

    from totalfast.engine.backends import Backend

logger = logging.getLogger(__name__)


_LOADING = threading.Lock()
"""Torch's list of safe types and Python's warning filters belong to the whole process."""


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
        Holds plans.json, dataset.json and ``fold_N/checkpoint_final.pth``.
    folds
        Which folds; None takes every ``fold_*`` but ``fold_all``.
    device
        Where the weights go.
    checkpoint_name
        File in each fold's folder.
    backend
        What runs the networks.

    Raises
    ------
    WeightsError
        If something is missing, unreadable, or holds more than weights.
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
        with warnings.catch_warnings():
            # Nearly all official models have plans of the old format, which nnU-Net still reads.
            warnings.filterwarnings("ignore", message="Detected old nnU-Net plans format")
            configuration = plans.get_configuration(first["init_args"]["configuration"])
        trainer_name = first["trainer_name"]
        labels = plans.get_label_manager(dataset)
        shape = tile_shape(plans, configuration, dataset)
        networks = []
        for checkpoint in checkpoints:
            network = _empty_network(
                trainer_name, plans, configuration, shape[1], labels.num_segmentation_heads
            )
            # Up to Python 3.11 pydoc.locate, which nnU-Net calls, leaves an error that refers to
            # itself, and through the callers' frames to the network and the checkpoints.
            gc.collect(1)
            network.load_state_dict(_as_float32(checkpoint["network_weights"]), assign=True)
            networks.append(network.to(device).eval())
    except (KeyError, RuntimeError) as error:
        raise WeightsError(
            f"the checkpoint in {folder} does not fit its plans: {error}. "
            "Delete the model's folder, so that it is downloaded again."
        ) from error
    axes = first.get("inference_allowed_mirroring_axes")
    return Model(
        folder=folder,
        plans=plans,
        configuration=configuration,
        labels=labels,
        dataset=dataset,
        networks=tuple(networks),
        forwards=tuple(backend(network, shape) for network in networks),
        trainer_name=trainer_name,
        mirroring_axes=None if axes is None else tuple(axes),
        device=device,
    )


def tile_shape(
    plans: Any,  # noqa: ANN401 - nnU-Net is untyped
    configuration: Any,  # noqa: ANN401
    dataset: dict[str, Any],
) -> tuple[int, ...]:
    """What a model's network gets at a time: (1, channels, z, y, x), without z if it is 2-D."""
    _, determine_num_input_channels = _import_nnunet()
    channels: int = determine_num_input_channels(plans, configuration, dataset)
    return (1, channels, *configuration.patch_size)


def _as_float32(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Widen weights that were stored in half precision, as copying them into a network does."""
    return {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in weights.items()
    }


def _import_nnunet() -> tuple[Any, Any]:
    """Import what reads plans; nnU-Net prints about unset environment variables meanwhile."""
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
            "Delete the model's folder, so that it is downloaded again."
        )
    return paths


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint's tensors and numbers, mapped from the file, running no code from it.

    Raises
    ------
    WeightsError
        If it is damaged, or asks for a type other than tensors, containers and numpy numbers.
    """
    import torch

    with torch.serialization.safe_globals(_numpy_number_types()):
        try:
            try:
                checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                # Files from before torch 1.6 are no zip archives and can't be mapped.
                if "mmap" not in str(error):
                    raise
                checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            wanted = re.search(r"GLOBAL (\S+)", str(error))
            raise WeightsError(
                f"{path} holds more than weights"
                f"{f' ({wanted.group(1)})' if wanted else ''} and was not opened. "
                "Official checkpoints need tensors and numbers only; get the file from its source."
            ) from error
        except (OSError, RuntimeError, EOFError, LookupError, ValueError) as error:
            raise WeightsError(f"{path} is no checkpoint, or damaged: {error}") from error
    content: dict[str, Any] = checkpoint
    return content


def _numpy_number_types() -> list[Any]:
    """Types that nnU-Net's training log pickles: numpy scalars and their dtypes."""
    import numpy as np
    from numpy._core import multiarray

    numbers = ("Float64DType", "Float32DType", "Int64DType", "Int32DType", "BoolDType")
    dtypes = [getattr(np.dtypes, name) for name in numbers]
    # Checkpoints written with NumPy 1 name the module without the underscore.
    return [
        (multiarray.scalar, "numpy.core.multiarray.scalar"),
        (multiarray.scalar, "numpy._core.multiarray.scalar"),
        np.dtype,
        *dtypes,
    ]


def _empty_network(
    trainer_name: str,
    plans: Any,  # noqa: ANN401 - nnU-Net is untyped
    configuration: Any,  # noqa: ANN401
    inputs: int,
    outputs: int,
) -> nn.Module:
    """Build the network without allocating or initialising its weights."""
    import torch

    with torch.device("meta"):
        if builds_from_plans(trainer_name):
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
        trainer: Any = upstream.custom_trainer(trainer_name)
        if trainer is None:
            from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

            trainer = recursive_find_trainer_class_by_name(trainer_name)
        network = trainer.build_network_architecture(
            plans, configuration, inputs, outputs, enable_deep_supervision=False
        )
        return network


def builds_from_plans(trainer_name: str) -> bool:
    """Whether a trainer of nnU-Net leaves ``build_network_architecture`` to its base class.

    Importing the trainers takes seconds and brings in the whole of training; whether one of them
    overrides this method is read from their source instead. Unknown trainers count as overriding.
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
    """Class name to (first base, whether it defines its own architecture)."""
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
