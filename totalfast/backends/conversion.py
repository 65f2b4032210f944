"""Convert networks to OpenVINO models: trace with torch, convert, and rearrange the graph.

Imports OpenVINO without its telemetry.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import threading
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from totalfast.backends.forward import is_nnunets
from totalfast.system.process_memory import release_free_memory

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import TypeAlias

    from torch import nn

    Untyped: TypeAlias = Any
    """OpenVINO's module and models: OpenVINO may be absent, so it has no types here."""

CONVERTER = 3
"""Version of this module's output; raise it when the output changes."""

_CONVERTING = threading.Lock()
"""A conversion changes Python's warning filters and the root logger, which are global."""

TRACED_CELLS = 2
"""Number of voxels at a U-Net's coarsest stage, for the tile that it is traced with. Its operations
are the same for all sizes, and instance normalisation needs more than one voxel."""


@functools.cache
def import_openvino() -> Untyped:
    """Import OpenVINO without its telemetry package, which reports each import and conversion.

    OpenVINO also works where that package is not installed. If other code has imported OpenVINO
    before, this function changes nothing.
    """
    name = "openvino_telemetry"
    before = sys.modules.get(name)
    modules: dict[str, Any] = sys.modules
    modules[name] = None  # makes an import of it fail
    try:
        import openvino
    finally:
        del modules[name]
        if before is not None:
            modules[name] = before
    return openvino


def convert_network(network: nn.Module, shape: tuple[int, ...], *, channels_last: bool) -> Untyped:
    """Convert a network to an OpenVINO model.

    Parameters
    ----------
    network
        On the CPU, in eval mode.
    shape
        Shape of its tiles, (1, channels, z, y, x) or (1, channels, y, x).
    channels_last
        Whether the output is (1, z, y, x, features) instead of (1, features, z, y, x).

    Returns
    -------
        An ``openvino.Model``.
    """
    import torch

    from totalfast.backends.norms import summed_by_axis

    openvino = import_openvino()
    with _CONVERTING, warnings.catch_warnings(), _root_logger_kept(), torch.no_grad():
        # Torch's tracer is deprecated. OpenVINO would trace a second time, to compare.
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(  # type: ignore[no-untyped-call]
            summed_by_axis(network),
            torch.zeros(_example_shape(network, shape)),
            strict=False,
            check_trace=False,
        )
        model = openvino.convert_model(traced, input=[(list(shape), openvino.Type.f32)])
    _split_joins(model)
    if channels_last:
        _move_channels_last(model)
    # Torch's trace is a reference cycle that holds the weights: hundreds of megabytes.
    del traced
    release_free_memory()
    return model


def _split_joins(model: Untyped) -> None:
    """Convolve joined features separately and add the results, to avoid a copy of the features.

    At full resolution the copy takes a quarter of a forward pass's memory.
    """
    from openvino import op, opset8
    from openvino.utils import replace_node

    for join in [node for node in model.get_ordered_ops() if node.get_type_name() == "Concat"]:
        readers = join.output(0).get_target_inputs()
        convolution = next(iter(readers)).get_node()
        if len(readers) > 1 or convolution.get_type_name() != "Convolution":
            continue
        weights = convolution.input_value(1).get_node()
        attributes = convolution.get_attributes()
        if join.get_attributes()["axis"] != 1 or weights.get_type_name() != "Constant":
            continue
        first, results = 0, []
        for features in join.input_values():
            count = features.get_shape()[1]
            own = op.Constant(np.ascontiguousarray(weights.data[:, first : first + count]))
            results.append(opset8.convolution(features, own, **attributes))
            first += count
        replace_node(convolution, functools.reduce(opset8.add, results))


def _move_channels_last(model: Untyped) -> None:
    """Return features in the order in which OpenVINO computes them, which avoids a copy."""
    from openvino import opset8

    (result,) = model.get_results()
    last = opset8.transpose(result.input_value(0), opset8.constant([0, 2, 3, 4, 1]))
    model.remove_result(result)
    model.add_results([opset8.result(last)])


@contextlib.contextmanager
def _root_logger_kept() -> Iterator[None]:
    """Restore the root logger, which a conversion changes, and leaves changed if it fails."""
    root = logging.getLogger()
    level, filters, handlers = root.level, root.filters[:], root.handlers[:]
    try:
        yield
    finally:
        root.setLevel(level)
        root.filters[:], root.handlers[:] = filters, handlers


def _example_shape(network: nn.Module, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of a tile to trace a network with: a small one for nnU-Net's networks, to save time."""
    if not is_nnunets(network):
        return shape
    encoder: Any = network.encoder
    cell = [1] * (len(shape) - 2)
    for stride in encoder.strides:
        steps = [stride] * len(cell) if isinstance(stride, int) else stride
        cell = [size * step for size, step in zip(cell, steps, strict=True)]
    longest = max(range(len(cell)), key=lambda axis: shape[2 + axis] // cell[axis])
    cell[longest] *= TRACED_CELLS
    return (*shape[:2], *cell)
