"""Networks run by OpenVINO, on CPUs.

Knows how a network is converted, and what of OpenVINO must be told: to compute in float32, also
where the CPU has faster and coarser formats, and to report to nobody. Conversions are kept in
``store``.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import functools
import gc
import importlib.metadata
import logging
import sys
import warnings
from typing import TYPE_CHECKING, Any

from totalfast.backends.forward import Forward, is_nnunets, run_by_torch, split_head
from totalfast.backends.store import content_key, entry
from totalfast.cores import network_threads

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import torch
    from torch import nn

logger = logging.getLogger(__name__)

CONVERTER = 2
"""Version of what this module makes of a network; to be raised when that changes."""

SETTINGS = {
    # The default on CPUs with AMX or bfloat16 is bfloat16, which changes labels.
    "INFERENCE_PRECISION_HINT": "f32",
    "NUM_STREAMS": "1",
    # A thread that is bound to a core keeps off others what the rest of the process starts.
    "ENABLE_CPU_PINNING": "NO",
    # Float16 subnormals decide ties at tile edges; no thread may be left flushing them.
    "CPU_DENORMALS_OPTIMIZATION": "NO",
}
"""How OpenVINO is to run any network."""

TRACED_CELLS = 2
"""Cells, at a U-Net's coarsest stage, of the tile that it is traced with: its operations are the
same for all sizes, and instance normalisation needs more than one."""

KNOWN_CODE = ("torch.", "dynamic_network_architectures.")
"""Packages whose modules do what they do by their version: networks of theirs alone are stored."""


def run_by_openvino(network: nn.Module, shape: tuple[int, ...]) -> Forward:
    """Convert a network for tiles of one shape, or find it converted; torch runs its last layer.

    A network that OpenVINO can't run is run by torch, and a warning says so.
    """
    openvino = import_openvino()
    body, head = split_head(network)
    try:
        model = _stored(body, shape) if _is_storable(body) else _converted(body, shape)
        compiled = _core().compile_model(
            model, "CPU", SETTINGS | {"INFERENCE_NUM_THREADS": network_threads()}
        )
    except (
        openvino.frontend.GeneralFailure,
        openvino.frontend.NotImplementedFailure,
        openvino.frontend.OpConversionFailure,
        openvino.frontend.OpValidationFailure,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        logger.warning(
            "OpenVINO can't run %s, so torch does: %s",
            type(network).__name__,
            " ".join(str(error).split()),
        )
        return run_by_torch(network, shape)
    # A copy, so that the checkpoint is not kept in memory for the sake of its last layer.
    return Forward(
        body=functools.partial(_infer, compiled),
        head=copy.deepcopy(head),
        release=compiled.release_memory,
    )


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


@functools.cache
def _core() -> Any:  # noqa: ANN401
    return import_openvino().Core()


def _infer(compiled: Any, tile: torch.Tensor) -> torch.Tensor:  # noqa: ANN401
    """Run a compiled model on a tile; the answer is a new tensor that nothing else refers to."""
    import torch

    answer = torch.empty(tuple(compiled.output(0).shape))
    request = compiled.create_infer_request()
    request.set_output_tensor(import_openvino().Tensor(answer.numpy(), shared_memory=True))
    request.infer([tile.numpy()], share_inputs=True, share_outputs=True)
    return answer


def _is_storable(network: nn.Module) -> bool:
    """Whether a network's layers, weights and our versions say all that there is to it."""
    return all(type(module).__module__.startswith(KNOWN_CODE) for module in network.modules())


def _stored(network: nn.Module, shape: tuple[int, ...]) -> Any:  # noqa: ANN401
    """Read a converted network from the store, where it is put if need be."""
    made_with = {
        "converter": CONVERTER,
        "shape": shape,
        **{
            package: importlib.metadata.version(package)
            for package in ("openvino", "torch", "dynamic_network_architectures")
        },
    }

    def make(folder: Path) -> None:
        _save(_converted(network, shape), folder)
        _give_back_memory()

    place = entry(f"openvino-{content_key(network, made_with)}", make)
    # OpenVINO maps the weights from the file.
    return _converted(network, shape) if place is None else _core().read_model(place / "model.xml")


def _save(model: Any, folder: Path) -> None:  # noqa: ANN401
    try:
        import_openvino().save_model(model, folder / "model.xml", compress_to_fp16=False)
    except RuntimeError as error:
        raise OSError(f"OpenVINO can't write there: {error}") from error


def _give_back_memory() -> None:
    """Free what a conversion leaves behind: hundreds of megabytes.

    Torch's trace refers to itself and to the weights, and glibc keeps what is freed.
    """
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _converted(network: nn.Module, shape: tuple[int, ...]) -> Any:  # noqa: ANN401
    """Convert a network to an OpenVINO model of one input shape."""
    import torch

    from totalfast.backends.norms import summed_by_axis

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
        return openvino.convert_model(traced, input=[(list(shape), openvino.Type.f32)])


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
