"""Networks run by OpenVINO, on CPUs.

Computes in float32, also on CPUs with faster and coarser formats, if bfloat16 is not asked for.
``conversion`` converts the networks; ``cache`` keeps the result on disk.
"""

from __future__ import annotations

import functools
import importlib.metadata
import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from totalfast.backends.cache import PREFIX, cached_folder, content_key
from totalfast.backends.conversion import CONVERTER, convert_network, import_openvino
from totalfast.backends.forward import Forward, run_by_torch, split_head
from totalfast.system.cache_folder import cache_folder
from totalfast.system.cores import network_threads
from totalfast.system.forks import threads_started
from totalfast.system.process_memory import release_mapped_files

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import TypeAlias

    Untyped: TypeAlias = Any
    """OpenVINO's objects: OpenVINO may be absent, so it has no types here."""

logger = logging.getLogger(__name__)

SETTINGS = {
    "NUM_STREAMS": "1",
    # Pinned threads would pin the threads that the rest of the process starts, too.
    "ENABLE_CPU_PINNING": "NO",
    # Float16 subnormals decide ties at tile edges, so no thread may flush them to zero.
    "CPU_DENORMALS_OPTIMIZATION": "NO",
}
"""OpenVINO's settings for every network, beside the precision: its default on CPUs with AMX or
bfloat16 is bfloat16, which changes labels."""

MODEL, WEIGHTS = "model.xml", "model.bin"
"""Files of a converted network."""

KNOWN_CODE = ("torch.", "dynamic_network_architectures.")
"""Packages whose version determines how their modules compute. Only networks that consist of such
modules are cached."""


def has_bfloat16() -> bool:
    """Whether OpenVINO computes in bfloat16 on this processor."""
    return "BF16" in _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def run_in_bfloat16(network: nn.Module, shape: tuple[int, ...]) -> Forward:
    """``run_by_openvino``, in bfloat16 where the processor has it."""
    return _run(network, shape, "bf16" if has_bfloat16() else "f32")


def run_by_openvino(network: nn.Module, shape: tuple[int, ...]) -> Forward:
    """Convert a network for tiles of one shape, or read it from the cache.

    Torch runs the last layer. It also runs networks that OpenVINO can't run; a warning is logged.
    """
    return _run(network, shape, "f32")


def _run(network: nn.Module, shape: tuple[int, ...], precision: str) -> Forward:
    openvino = import_openvino()
    threads_started()
    body, head = split_head(network)
    convert = functools.partial(convert_network, body, shape, channels_last=head is not None)
    try:
        model = _through_cache(body, shape, convert) if _is_cacheable(body) else convert()
        how = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": network_threads()}
        compiled = _core().compile_model(model, "CPU", SETTINGS | how)
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
    cache = cache_folder()
    if cache is not None:
        release_mapped_files(cache)  # the compiled model has its own weights, in another order
    run = Compiled(compiled)
    if head is None:
        return Forward(body=functools.partial(_copied_output, run), release=run.release)
    from totalfast.backends.winograd.head import last_layer

    return Forward(
        body=functools.partial(_channels_first, run), head=last_layer(head), release=run.release
    )


@functools.cache
def _core() -> Untyped:
    return import_openvino().Core()


def _copied_output(run: Compiled, tile: torch.Tensor) -> torch.Tensor:
    return run(tile).clone()


def _channels_first(run: Compiled, tile: torch.Tensor) -> torch.Tensor:
    """Features (1, features, z, y, x), a view of features that are channels last in memory."""
    return run(tile).permute(0, 4, 1, 2, 3)


class Compiled:
    """A compiled model whose outputs for all tiles use the same memory."""

    def __init__(self, compiled: Untyped) -> None:
        self.compiled = compiled
        self._request: Untyped = None
        self._output = torch.empty(0)

    def __call__(self, tile: torch.Tensor) -> torch.Tensor:
        """Run the model on a tile; the output is valid until the next call."""
        if self._request is None:
            self._output = torch.empty(tuple(self.compiled.output(0).shape))
            memory = import_openvino().Tensor(self._output.numpy(), shared_memory=True)
            self._request = self.compiled.create_infer_request()
            self._request.set_output_tensor(memory)
        self._request.infer([tile.numpy()], share_inputs=True, share_outputs=True)
        return self._output

    def release(self) -> None:
        """Free the memory that is kept between tiles."""
        self._request = None
        self._output = torch.empty(0)
        self.compiled.release_memory()


def _is_cacheable(network: nn.Module) -> bool:
    """Whether layers, weights and package versions fully determine how a network computes."""
    return all(type(module).__module__.startswith(KNOWN_CODE) for module in network.modules())


def _through_cache(
    network: nn.Module, shape: tuple[int, ...], convert: Callable[[], Untyped]
) -> Untyped:
    """Read a converted network from the cache; convert it and store it there if it is missing."""
    settings = {
        "converter": CONVERTER,
        "shape": shape,
        **{
            package: importlib.metadata.version(package)
            for package in ("openvino", "torch", "dynamic_network_architectures")
        },
    }

    def write(folder: Path) -> None:
        model = convert()
        try:
            import_openvino().save_model(model, folder / MODEL, compress_to_fp16=False)
        except RuntimeError as error:
            raise OSError(f"OpenVINO can't write to {folder}: {error}") from error

    folder = cached_folder(f"{PREFIX}{content_key(network, settings)}", (MODEL, WEIGHTS), write)
    if folder is None:
        return convert()
    try:
        return _core().read_model(folder / MODEL)  # OpenVINO maps the weights from the file
    except RuntimeError as error:
        # Another process may have removed the entry meanwhile.
        logger.info("%s can't be read, so the model is converted again: %s", folder, error)
        return convert()
