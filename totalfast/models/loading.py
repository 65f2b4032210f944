"""Load a model folder: check its files, build the networks, give them their weights.

No code that the folder contains is run: the names in its files are checked by ``known_parts``, and
its checkpoints are data (``checkpoints``). ``trust_model`` allows other names in its plans.
"""

from __future__ import annotations

import contextlib
import gc
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

from totalfast.backends import keeps_weights
from totalfast.backends.forward import run_by_torch
from totalfast.errors import TotalfastError
from totalfast.models import known_parts
from totalfast.models.checkpoints import checkpoint_paths, fit_weights, load_checkpoint
from totalfast.models.model import Model
from totalfast.models.model_files import Entry, damaged, read_json
from totalfast.models.nnunet_calls import call_quietly
from totalfast.models.nnunet_versions import build_network, check_version
from totalfast.models.plans import (
    channel_names,
    check_dataset,
    check_grid,
    check_intensities,
    check_network,
    check_old_network,
    resolve_configuration,
)
from totalfast.models.trainers import builds_from_plans, find_trainer
from totalfast.models.weights import CHECKPOINT_NAME
from totalfast.system.forks import working

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path
    from typing import TypeAlias

    import torch
    from torch import nn

    from totalfast.backends import Backend
    from totalfast.models.checkpoints import Checkpoint

    Untyped: TypeAlias = Any
    """nnU-Net's classes and objects, which have no types."""


_LOADING = threading.Lock()
"""One model is loaded at a time: reading a checkpoint changes torch's list of safe types, finding a
user's trainer changes ``sys.path``, and converting a network for a backend needs memory."""


def load_model(
    folder: Path,
    *,
    folds: Sequence[int | str] | None,
    device: torch.device,
    checkpoint_name: str = CHECKPOINT_NAME,
    backend: Backend = run_by_torch,
    trust_model: bool = False,
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
    trust_model
        Whether plans.json may name any class and function, for example of an own architecture.
        nnU-Net imports and calls what is named there, so that such a model can run any code.

    Raises
    ------
    WeightsError
        If a file is missing, unreadable or damaged, the files do not fit each other, a checkpoint
        holds objects other than weights, or the plans name unknown parts and are not trusted.
    VersionError
        If the installed nnunetv2 is not supported.
    """
    check_version()
    with working(), _LOADING:
        return _load(folder, folds, device, checkpoint_name, backend, trust_model=trust_model)


def _load(
    folder: Path,
    folds: Sequence[int | str] | None,
    device: torch.device,
    checkpoint_name: str,
    backend: Backend,
    *,
    trust_model: bool,
) -> Model:
    plans, dataset = read_json(folder / "plans.json"), read_json(folder / "dataset.json")
    check_dataset(dataset)
    if not trust_model:
        known_parts.check_names(plans)
    checkpoints = [
        load_checkpoint(path) for path in checkpoint_paths(folder, folds, checkpoint_name)
    ]
    architecture = _architecture(plans, dataset, checkpoints[0], trust_model=trust_model)
    axes = checkpoints[0].mirroring_axes
    if any(axis >= len(architecture.configuration.patch_size) for axis in axes or ()):
        raise damaged(
            checkpoints[0].path, f"the mirroring axes {axes} are not all axes of the network"
        )
    # One by one, so that only one checkpoint and its copy are in memory at a time.
    networks = tuple(
        _network(architecture, checkpoints.pop(0), copy=keeps_weights(backend)).to(device).eval()
        for _ in list(checkpoints)
    )
    return Model(
        folder=folder,
        plans=architecture.plans,
        configuration=architecture.configuration,
        labels=architecture.labels,
        dataset=dataset.value,
        networks=networks,
        forwards=tuple(backend(network, architecture.tile_shape) for network in networks),
        trainer_name=architecture.trainer_name,
        mirroring_axes=axes,
        device=device,
    )


class _Architecture(NamedTuple):
    """Everything that determines a model's network, without its weights."""

    trainer_name: str
    plans: Untyped
    configuration: Untyped
    dataset: dict[str, Any]
    labels: Untyped
    tile_shape: tuple[int, ...]


@contextlib.contextmanager
def _errors_name(path: Path, what: str) -> Iterator[None]:
    """Turn every error into a WeightsError about a file.

    Only for code of nnU-Net and torch that works on the content of a model's files: it raises
    errors of any kind about content that it does not expect, and they all have one cause.
    """
    try:
        yield
    except TotalfastError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise damaged(path, f"{what} ({reason})") from error


def _architecture(
    plans: Entry, dataset: Entry, checkpoint: Checkpoint, *, trust_model: bool
) -> _Architecture:
    """Check the checkpoint's configuration; create nnU-Net's objects."""
    from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

    configuration = resolve_configuration(plans, checkpoint.configuration)
    check_grid(plans, configuration)
    check_intensities(plans, configuration, len(channel_names(dataset)))
    configuration.item("preprocessor_name").text()
    if "previous_stage" in configuration and configuration.value["previous_stage"] is not None:
        configuration.item("previous_stage").text()
    if not trust_model:
        for name in ("data", "probabilities"):
            known_parts.check_resampling(configuration, name)
        check_old_network(configuration)
    # nnU-Net's own default, of which it prints a message.
    plans.value.setdefault("label_manager", "LabelManager")
    with _errors_name(plans.path, "nnU-Net can't read it"):
        plans_manager = PlansManager(plans.value)
        # Nearly all official models have plans of the old format, of which nnU-Net warns. The
        # manager writes the new format into the dictionary that it is given.
        manager = ConfigurationManager.__new__(ConfigurationManager)
        call_quietly(ConfigurationManager.__init__, manager, configuration.value)
    if not trust_model:
        network = configuration.item("architecture")
        known_parts.check_architecture(network)
        known_parts.check_dimensions(network, len(manager.patch_size))
        check_network(network.item("arch_kwargs"), manager.patch_size)
        name = known_parts.network_path(network.item("network_class_name"))
        network.value["network_class_name"] = name
    with _errors_name(dataset.path, "nnU-Net can't read its labels"):
        labels = plans_manager.get_label_manager(dataset.value)
        shape = tile_shape(plans_manager, manager, dataset.value)
    return _Architecture(
        checkpoint.trainer_name, plans_manager, manager, dataset.value, labels, shape
    )


def tile_shape(plans: Untyped, configuration: Untyped, dataset: dict[str, Any]) -> tuple[int, ...]:
    """Shape of a network's input: (1, channels, z, y, x), or (1, channels, y, x) if it is 2-D."""
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels

    channels: int = determine_num_input_channels(plans, configuration, dataset)
    return (1, channels, *configuration.patch_size)


def _network(architecture: _Architecture, checkpoint: Checkpoint, *, copy: bool) -> nn.Module:
    """Build one fold's network with the weights of its checkpoint, on the CPU."""
    folder = checkpoint.path.parents[1]
    with _errors_name(folder / "plans.json", "its network can't be built"):
        network = _without_memory(architecture)
        if network is None:
            network = _built(architecture)
    # nnU-Net calls pydoc.locate. Up to Python 3.11 that leaves an error in a reference cycle, which
    # holds the network and the checkpoints through the callers' frames.
    gc.collect(1)
    with _errors_name(checkpoint.path, "the checkpoint does not fit its plans"):
        weights = fit_weights(checkpoint, network.state_dict(), copy=copy)
        network.load_state_dict(weights, assign=True)
    return network


def _without_memory(architecture: _Architecture) -> nn.Module | None:
    """Build a network without allocating or initialising its weights.

    None if a value is needed that no checkpoint has, as in some trainers' networks.
    """
    import torch

    try:
        with torch.device("meta"):
            network = _built(architecture)
    except (NotImplementedError, RuntimeError):  # torch's errors about missing values
        return None
    in_checkpoint = {id(tensor) for tensor in network.state_dict(keep_vars=True).values()}
    own = (value for part in network.modules() for value in vars(part).values())
    for tensor in (*network.buffers(), *own):
        if isinstance(tensor, torch.Tensor) and tensor.is_meta and id(tensor) not in in_checkpoint:
            return None
    return network


def _built(architecture: _Architecture) -> nn.Module:
    """Build a network as nnU-Net does, without its weights."""
    configuration = architecture.configuration
    inputs, outputs = architecture.tile_shape[1], architecture.labels.num_segmentation_heads
    if not builds_from_plans(architecture.trainer_name):
        return build_network(
            find_trainer(architecture.trainer_name),
            plans=architecture.plans,
            configuration=configuration,
            dataset=architecture.dataset,
            inputs=inputs,
            outputs=outputs,
        )
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    network: nn.Module = call_quietly(
        get_network_from_plans,
        configuration.network_arch_class_name,
        configuration.network_arch_init_kwargs,
        configuration.network_arch_init_kwargs_req_import,
        inputs,
        outputs,
        allow_init=False,
        deep_supervision=False,
    )
    return network
