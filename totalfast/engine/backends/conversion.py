"""What OpenVINO is made to run of a network: traced by torch, converted, and rearranged.

Knows networks and OpenVINO's graphs, and how to import OpenVINO so that it reports to nobody;
knows nothing of running them.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from totalfast.engine.backends.forward import is_nnunets
from totalfast.system.process_memory import give_back

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

CONVERTER = 3
"""Version of what this module makes of a network; to be raised when that changes."""

TRACED_CELLS = 2
"""Cells, at a U-Net's coarsest stage, of the tile that it is traced with: its operations are the
same for all sizes, and instance normalisation needs more than one."""


@functools.cache
def import_openvino() -> Any:  # noqa: ANN401 - may be absent, so untyped
    """Import OpenVINO without its telemetry package, which reports each import and conversion.

    OpenVINO does without that package where it is not installed. If OpenVINO has been imported
    before, by someone else, it is left as it is.
    """
    name = "openvino_telemetry"
    before = sys.modules.get(name)
    modules: dict[str, Any] = sys.modules
    modules[name] = None  # an import of it then fails
    try:
        import openvino
    finally:
        del modules[name]
        if before is not None:
            modules[name] = before
    return openvino


def converted(network: nn.Module, shape: tuple[int, ...], *, channels_last: bool) -> Any:  # noqa: ANN401
    """Convert a network to an OpenVINO model.

    Parameters
    ----------
    network
        On the CPU, in eval mode.
    shape
        Of its tiles, (1, channels, z, y, x) or (1, channels, y, x).
    channels_last
        Whether to answer (1, z, y, x, features) instead of (1, features, z, y, x).
    """
    import torch

    from totalfast.engine.backends.norms import summed_by_axis

    openvino = import_openvino()
    with warnings.catch_warnings(), _root_logger_kept(), torch.no_grad():
        # Torch calls its tracer deprecated. OpenVINO would have it trace a second time, to compare.
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
        _answer_channels_last(model)
    # Torch's trace refers to itself and to the weights: hundreds of megabytes.
    del traced
    give_back()
    return model


def _split_joins(model: Any) -> None:  # noqa: ANN401
    """Convolve joined features apart and add up the answers, so that they need not be copied.

    At full resolution the copy was a quarter of a forward pass's memory.
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
        first, answers = 0, []
        for features in join.input_values():
            count = features.get_shape()[1]
            own = op.Constant(np.ascontiguousarray(weights.data[:, first : first + count]))
            answers.append(opset8.convolution(features, own, **attributes))
            first += count
        replace_node(convolution, functools.reduce(opset8.add, answers))


def _answer_channels_last(model: Any) -> None:  # noqa: ANN401
    """Have features answered in the order that OpenVINO computes them in, for nothing."""
    from openvino import opset8

    (result,) = model.get_results()
    last = opset8.transpose(result.input_value(0), opset8.constant([0, 2, 3, 4, 1]))
    model.remove_result(result)
    model.add_results([opset8.result(last)])


@contextlib.contextmanager
def _root_logger_kept() -> Iterator[None]:
    """Undo what a conversion does to everybody's logging, and leaves so if it fails."""
    root = logging.getLogger()
    level, filters, handlers = root.level, root.filters[:], root.handlers[:]
    try:
        yield
    finally:
        root.setLevel(level)
        root.filters[:], root.handlers[:] = filters, handlers


def _example_shape(network: nn.Module, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A tile to trace a network with: for nnU-Net's own a small one, which takes no time."""
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
