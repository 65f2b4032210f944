"""Networks run by OpenVINO, on CPUs.

Knows what of OpenVINO must be told: to compute in float32, also where the CPU has faster and
coarser formats. What it is made to run is ``conversion``'s, which is kept in ``store``.
"""

from __future__ import annotations

import functools
import importlib.metadata
import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from totalfast.engine.backends.conversion import CONVERTER, converted, import_openvino
from totalfast.engine.backends.forward import Forward, run_by_torch, split_head
from totalfast.engine.backends.store import cache_folder, content_key, entry
from totalfast.system.cores import network_threads
from totalfast.system.process_memory import drop_mapped

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

logger = logging.getLogger(__name__)

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

KNOWN_CODE = ("torch.", "dynamic_network_architectures.")
"""Packages whose modules do what they do by their version: networks of theirs alone are stored."""


def run_by_openvino(network: nn.Module, shape: tuple[int, ...]) -> Forward:
    """Convert a network for tiles of one shape, or find it converted; torch runs its last layer.

    A network that OpenVINO can't run is run by torch, and a warning says so.
    """
    openvino = import_openvino()
    body, head = split_head(network)
    convert = functools.partial(converted, body, shape, channels_last=head is not None)
    try:
        model = _stored(body, shape, convert) if _is_storable(body) else convert()
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
    drop_mapped(cache_folder())  # the compiled model has weights of its own, in another order
    run = Compiled(compiled)
    if head is None:
        return Forward(body=functools.partial(_new_answer, run), release=run.release)
    return Forward(
        body=functools.partial(_channels_first, run), head=LastLayer(head), release=run.release
    )


@functools.cache
def _core() -> Any:  # noqa: ANN401 - may be absent, so untyped
    return import_openvino().Core()


def _new_answer(run: Compiled, tile: torch.Tensor) -> torch.Tensor:
    return run(tile).clone()


def _channels_first(run: Compiled, tile: torch.Tensor) -> torch.Tensor:
    """Features (1, features, z, y, x), a view of what lies channels last in memory."""
    return run(tile).permute(0, 4, 1, 2, 3)


class Compiled:
    """A compiled model, whose answers to one tile after another take the same memory."""

    def __init__(self, compiled: Any) -> None:  # noqa: ANN401
        self.compiled = compiled
        self._request: Any = None
        self._answer = torch.empty(0)

    def __call__(self, tile: torch.Tensor) -> torch.Tensor:
        """Run the model on a tile; the answer is valid until the next call."""
        if self._request is None:
            self._answer = torch.empty(tuple(self.compiled.output(0).shape))
            memory = import_openvino().Tensor(self._answer.numpy(), shared_memory=True)
            self._request = self.compiled.create_infer_request()
            self._request.set_output_tensor(memory)
        self._request.infer([tile.numpy()], share_inputs=True, share_outputs=True)
        return self._answer

    def release(self) -> None:
        """Give back what is only kept from one tile to the next."""
        self._request = None
        self._answer = torch.empty(0)
        self.compiled.release_memory()


class LastLayer(nn.Module):
    """A 1x1x1 convolution of features that lie channels last in memory."""

    def __init__(self, layer: nn.Conv3d) -> None:
        super().__init__()
        # Copies, so that the checkpoint is not kept in memory for their sake.
        self.weight = layer.weight.detach().flatten(1).clone()
        self.bias = self.weight.new_zeros(len(self.weight), 1)
        if layer.bias is not None:
            self.bias[:, 0] = layer.bias.detach()

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Logits (1, classes, z, y, x), channels first in memory."""
        voxels = features[0].flatten(1)
        return torch.addmm(self.bias, self.weight, voxels).view(1, -1, *features.shape[2:])


def _is_storable(network: nn.Module) -> bool:
    """Whether a network's layers, weights and our versions say all that there is to it."""
    return all(type(module).__module__.startswith(KNOWN_CODE) for module in network.modules())


def _stored(network: nn.Module, shape: tuple[int, ...], convert: Callable[[], Any]) -> Any:  # noqa: ANN401
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
        model = convert()
        try:
            import_openvino().save_model(model, folder / "model.xml", compress_to_fp16=False)
        except RuntimeError as error:
            raise OSError(f"OpenVINO can't write there: {error}") from error

    place = entry(f"openvino-{content_key(network, made_with)}", make)
    # OpenVINO maps the weights from the file.
    return convert() if place is None else _core().read_model(place / "model.xml")
