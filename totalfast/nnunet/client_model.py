"""The ``Model`` that nnU-Net's attributes describe, made anew when a program changes them."""

from __future__ import annotations

import copy
import dataclasses
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from totalfast.backends import choose_backend
from totalfast.models.loading import tile_shape
from totalfast.models.model import Model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import TypeAlias

    from totalfast.backends import Backend

    Untyped: TypeAlias = Any
    """nnU-Net's objects, which have no types."""

OBJECTS = (
    "network",
    "plans_manager",
    "configuration_manager",
    "dataset_json",
    "label_manager",
)
"""Attributes of nnU-Net's predictor that its results depend on and that a program may replace."""


@dataclasses.dataclass(kw_only=True)
class Companion:
    """What totalfast keeps in one of nnU-Net's predictors: settings, and the model in use.

    A copy or a pickle of it has the settings only.

    Parameters
    ----------
    export, trust_model, on_failure
        See ``ArgmaxPredictor``.
    backend
        Runs the networks.
    """

    backend: Backend
    export: str = "auto"
    trust_model: bool = False
    on_failure: Callable[[str, Exception], None] | None = None
    _model: Model | None = None
    _state: object = None
    _told: set[str] = dataclasses.field(default_factory=set)
    _owner: weakref.ref[Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return the settings."""
        return vars(self) | {"_model": None, "_state": None, "_told": set(), "_owner": None}

    def belongs_to(self, predictor: Untyped) -> bool:
        """Whether a predictor is the first that asks. Copies of it share its attributes."""
        if self._owner is None:
            self._owner = weakref.ref(predictor)
        return self._owner() is predictor

    def is_new(self, remark: str) -> bool:
        """Whether a remark is made for the first time."""
        is_new = remark not in self._told
        self._told.add(remark)
        return is_new

    def keep(self, model: Model, predictor: Untyped) -> None:
        """Keep a model that was just loaded for a predictor with exactly these attributes."""
        self._model, self._state = model, _state(predictor)

    def model(self, predictor: Untyped) -> Model:
        """Return the model that a predictor's attributes describe, with the present weights.

        Its last network is the predictor's own. As after nnU-Net's loop, this one has the last
        fold's weights, is in eval mode and on the predictor's device.
        """
        model = self._model
        if model is not None and self._state == _state(predictor):
            _on_device(predictor)
            _load_again(model, predictor)
            return model
        self._model = model = None  # frees its networks before others are made
        model = _model(predictor, self.backend)
        self.keep(model, predictor)
        return model


defaults: dict[str, Any] = {}
"""Settings of predictors that were not made as ``ArgmaxPredictor``; set by ``patch_nnunet``."""


def companion(predictor: Untyped) -> Companion:
    """Return a predictor's companion; it is made for nnU-Net's own predictors on the first use."""
    if "_totalfast" not in vars(predictor):
        settings = {"backend": "torch"} | defaults
        settings["backend"] = choose_backend(settings["backend"], predictor.device)
        predictor._totalfast = Companion(**settings)
    found: Companion = predictor._totalfast
    if not found.belongs_to(predictor):
        found = predictor._totalfast = copy.copy(found)
    return found


def description(predictor: Untyped) -> Model:
    """Return the model of a predictor without its networks, to prepare images and read labels."""
    return Model(
        folder=Path(predictor.plans_manager.dataset_name),
        plans=predictor.plans_manager,
        configuration=predictor.configuration_manager,
        labels=predictor.label_manager,
        dataset=predictor.dataset_json,
        networks=(),
        forwards=(),
        trainer_name=predictor.trainer_name,
        mirroring_axes=predictor.allowed_mirroring_axes,
        device=predictor.device,
    )


def _model(predictor: Untyped, backend: Backend) -> Model:
    """Make a model whose networks share the weights of ``list_of_parameters``, but for the last."""
    *others, _ = _folds(predictor)
    own = {_memory(tensor) for tensor in predictor.network.state_dict().values()}
    if any(_memory(tensor) in own for parameters in others for tensor in parameters.values()):
        raise RuntimeError("it shares memory with list_of_parameters")
    copies = [_with_weights(predictor.network, parameters) for parameters in others]
    copies = [network.to(predictor.device) for network in copies]
    for network in copies:
        network.eval()
    _on_device(predictor)
    networks = (*copies, predictor.network)
    model = dataclasses.replace(description(predictor), networks=networks)
    _load_again(model, predictor)  # some backends copy the weights
    shape = tile_shape(model.plans, model.configuration, model.dataset)
    return dataclasses.replace(
        model, forwards=tuple(backend(network, shape) for network in networks)
    )


def _on_device(predictor: Untyped) -> None:
    predictor.network = predictor.network.to(predictor.device)
    predictor.network.eval()


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _folds(predictor: Untyped) -> list[dict[str, torch.Tensor]]:
    """Return the weights of each fold; those of the network itself if none were given.

    Raises
    ------
    RuntimeError
        If the list is empty, with which nnU-Net can't predict either.
    """
    folds: list[dict[str, torch.Tensor]] | None = predictor.list_of_parameters
    if folds is None:
        return [predictor.network.state_dict(keep_vars=True)]
    if not folds:
        raise RuntimeError("list_of_parameters is empty")
    return folds


def _load_again(model: Model, predictor: Untyped) -> None:
    """Give the networks that do not share memory with ``list_of_parameters`` its numbers."""
    for network, parameters in zip(
        model.networks, predictor.list_of_parameters or (), strict=False
    ):
        if not _shares_memory(network, parameters):
            network.load_state_dict(parameters)


def _shares_memory(network: nn.Module, parameters: dict[str, torch.Tensor]) -> bool:
    """Whether a network computes with these tensors.

    A layer that is in a network twice, as in nnU-Net's U-Nets, has two names, of which the last
    one's tensor counts.
    """
    own = network.state_dict(keep_vars=True)
    last = {id(tensor): name for name, tensor in own.items()}
    return own.keys() == parameters.keys() and all(
        own[name].data_ptr() == parameters[name].data_ptr() for name in last.values()
    )


def _with_weights(network: nn.Module, parameters: dict[str, torch.Tensor]) -> nn.Module:
    """Return a network of the same structure with these weights, in the network's precision.

    It shares everything but the weights, layers and plain data with the other network, so that it
    has the later changes of other objects too.

    Raises
    ------
    RuntimeError
        If the weights do not fit, or the network has its own way of loading them, so that it may
        have copied them.
    """
    shared: Iterable[object] = (
        *network.parameters(),
        *network.buffers(),
        *(value for part in network.modules() for value in _objects(part)),
    )
    other = copy.deepcopy(network, {id(value): value for value in shared})
    own = other.state_dict()
    weights = {
        name: tensor.detach().to(own[name].dtype) if name in own else tensor
        for name, tensor in parameters.items()
    }
    other.load_state_dict(weights, assign=True)
    if not _shares_memory(other, weights):
        raise RuntimeError("it loads weights in a way of its own")
    return other


PLAIN = (bool, int, float, str, list, tuple, dict, type(None))


def _objects(part: nn.Module) -> Iterable[object]:
    """Attributes of a layer that are neither plain data nor torch's own."""
    for name, value in vars(part).items():
        if name not in TORCHS_OWN and not isinstance(value, PLAIN):
            yield value


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Same:
    """Equal only to what holds the very same object."""

    of: object

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.of is other.of

    __hash__ = None  # type: ignore[assignment]


def _state(predictor: Untyped) -> object:
    """All that the networks depend on, to be compared with a later state."""
    tensors = [tensor for fold in _folds(predictor) for tensor in fold.values()]
    return (
        [_Same(getattr(predictor, name)) for name in OBJECTS],
        list(predictor.configuration_manager.patch_size),
        predictor.device,
        [_frozen(tensor) for tensor in tensors],
        [_settings(part) for part in predictor.network.modules()],
    )


TORCHS_OWN = frozenset(vars(nn.Module()))
"""Attributes of every module. Its weights, parts and hooks are looked at elsewhere."""


def _settings(part: nn.Module) -> object:
    """Return the class of a layer and its attributes, such as a dropout's share."""
    attributes = {name: _frozen(v) for name, v in vars(part).items() if name not in TORCHS_OWN}
    buffers = [_frozen(part._buffers[name]) for name in sorted(part._non_persistent_buffers_set)]
    return _Same(part), _Same(type(part)), attributes, buffers


def _frozen(value: object) -> object:
    """Return a copy of plain data, and what tells other objects apart."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_frozen(item) for item in value]
    if isinstance(value, dict):
        return [(key, _frozen(item)) for key, item in value.items()]
    if isinstance(value, torch.Tensor):
        # Inference tensors do not count their changes.
        return _Same(value), 0 if value.is_inference() else value._version
    return _Same(value)
