"""Networks compiled by torch itself, for CPUs and CUDA devices.

A model's first tile waits about half a minute for the compiler. Torch caches the compiled code.
"""

from __future__ import annotations

import atexit
import functools
import logging
import os
import shutil
import tempfile
from typing import TYPE_CHECKING

from totalfast.backends.forward import Forward, split_head
from totalfast.system.cache_folder import subfolder

if TYPE_CHECKING:
    import torch
    from torch import nn

logger = logging.getLogger(__name__)

FOLDER = "compiled-networks"
"""Name of the folder in the cache."""

PLACE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
"""Environment variable with the folder of torch's compiled code. Torch sets it too."""

NETWORKS = 256
"""Maximum number of compiled networks of one class per process. Torch's default is eight, because
it counts each network as a recompilation of the same code; a session with two tasks needs more."""


def run_compiled(network: nn.Module, shape: tuple[int, ...]) -> Forward:
    """Return a network that is compiled at its first tile, for tiles of one shape.

    On a CPU its weights are frozen, so that the compiler can store them in the layout that
    convolutions read. Its last layer stays separate and runs slice by slice.
    """
    if not os.environ.get(PLACE_VARIABLE):
        # Torch's default is a predictable path below /tmp, which another user can create first.
        folder = subfolder(FOLDER)
        os.environ[PLACE_VARIABLE] = _temporary_folder() if folder is None else str(folder)
    if next(network.parameters()).device.type != "cpu":
        return Forward(body=_Compiled(network, frozen=False))
    body, head = split_head(network)
    return Forward(body=_Compiled(body, frozen=True), head=head)


@functools.cache
def _temporary_folder() -> str:
    """Create a private folder that lasts as long as the process."""
    folder = tempfile.mkdtemp(prefix="totalfast-torch-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


class _Compiled:
    """A compiled network, or the uncompiled network if it can't be compiled."""

    def __init__(self, network: nn.Module, *, frozen: bool) -> None:
        import torch

        self._network = network
        self._frozen = frozen
        self._run = torch.compile(network, dynamic=False)

    def __call__(self, tile: torch.Tensor) -> torch.Tensor:
        from torch._dynamo import config as dynamo
        from torch._dynamo.exc import TorchDynamoException
        from torch._inductor import config as inductor

        try:
            # Not an option of torch.compile: the step before inductor reads it too. Without it that
            # step passes the weights as inputs, and inputs are not frozen.
            with (
                inductor.patch(freezing=self._frozen),
                dynamo.patch(recompile_limit=NETWORKS),
            ):
                output: torch.Tensor = self._run(tile)
        except TorchDynamoException as error:
            logger.warning(
                "%s can't be compiled, so it runs uncompiled: %s",
                type(self._network).__name__,
                str(error).strip().partition("\n")[0],
            )
            self._run = self._network
            output = self._run(tile)
        return output
