"""The ``Model`` that nnU-Net's attributes describe, made anew when a program changes them."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from totalfast.backends import choose_backend
from totalfast.models.loading import tile_shape
from totalfast.models.model import Model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import TypeAlias

    import torch
    from torch import nn

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
    _of: tuple[object, ...] = ()
    _told: set[str] = dataclasses.field(default_factory=set)

    def __getstate__(self) -> dict[str, Any]:
        """Return the settings."""
        return vars(self) | {"_model": None, "_of": (), "_told": set()}

    def is_new(self, remark: str) -> bool:
        """Whether a remark is made for the first time."""
        is_new = remark not in self._told
        self._told.add(remark)
        return is_new

    def keep(self, model: Model, predictor: Untyped) -> None:
        """Keep a model that was just loaded for a predictor with exactly these attributes."""
        self._model, self._of = model, _identity(predictor)

    def model(self, predictor: Untyped) -> Model:
        """Return the model that a predictor's attributes describe."""
        if self._model is None or not _same(self._of, _identity(predictor)):
            self._model = None  # frees its networks before others are made
            self.keep(_model(predictor, self.backend), predictor)
        return self._model  # type: ignore[return-value] # keep() has set it


defaults: dict[str, Any] = {}
"""Settings of predictors that were not made as ``ArgmaxPredictor``; set by ``patch_nnunet``."""


def companion(predictor: Untyped) -> Companion:
    """Return a predictor's companion; it is made for nnU-Net's own predictors on the first use."""
    if "_totalfast" not in vars(predictor):
        settings = {"backend": "torch"} | defaults
        settings["backend"] = choose_backend(settings["backend"], predictor.device)
        predictor._totalfast = Companion(**settings)
    found: Companion = predictor._totalfast
    return found


def _identity(predictor: Untyped) -> tuple[object, ...]:
    """All that the model depends on: values, then objects that are compared by ``is``."""
    tensors = [tensor for fold in _folds(predictor) for tensor in fold.values()]
    objects = [
        *(getattr(predictor, name) for name in OBJECTS),
        *tensors,
        *predictor.network.modules(),
    ]
    values = (
        tuple(predictor.configuration_manager.patch_size),
        predictor.device,
        tuple(_version(tensor) for tensor in tensors),
        tuple(tuple(_plain_values(part)) for part in predictor.network.modules()),
    )
    return (*values, *objects)


VALUES = 4
"""Number of items of ``_identity`` that are compared by their values."""


def _same(one: tuple[object, ...], other: tuple[object, ...]) -> bool:
    return (
        len(one) == len(other)
        and one[:VALUES] == other[:VALUES]
        and all(a is b for a, b in zip(one[VALUES:], other[VALUES:], strict=True))
    )


def _version(tensor: torch.Tensor) -> int:
    """How often a tensor was changed in place; inference tensors do not count that."""
    return 0 if tensor.is_inference() else tensor._version


def _plain_values(part: nn.Module) -> Iterator[tuple[str, object]]:
    """Settings of a layer, such as a dropout's share."""
    for name, value in vars(part).items():
        if name != "training" and isinstance(value, bool | int | float | str):
            yield name, value


def _folds(predictor: Untyped) -> list[dict[str, torch.Tensor]]:
    """Return the weights of each fold; those of the network itself if there are none."""
    return predictor.list_of_parameters or [predictor.network.state_dict(keep_vars=True)]


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
    """Make a model with networks of its own, which share the weights of ``list_of_parameters``."""
    model = description(predictor)
    networks = tuple(
        _with_weights(predictor.network, parameters).to(predictor.device).eval()
        for parameters in _folds(predictor)
    )
    shape = tile_shape(model.plans, model.configuration, model.dataset)
    forwards = tuple(backend(network, shape) for network in networks)
    return dataclasses.replace(model, networks=networks, forwards=forwards)


def _with_weights(network: nn.Module, parameters: dict[str, torch.Tensor]) -> nn.Module:
    """Return a network of the same structure with these weights, in the network's precision."""
    shared: Iterable[torch.Tensor] = (*network.parameters(), *network.buffers())
    other = copy.deepcopy(network, {id(tensor): tensor for tensor in shared})
    own = other.state_dict()
    weights = {
        name: tensor.detach().to(own[name].dtype) if name in own else tensor
        for name, tensor in parameters.items()
    }
    other.load_state_dict(weights, assign=True)
    return other
