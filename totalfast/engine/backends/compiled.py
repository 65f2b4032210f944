"""Networks compiled by torch itself, for CPUs and CUDA devices.

The first tile of a model waits for the compiler, half a minute or so; torch keeps what it compiles
in a cache of its own.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from totalfast.engine.backends.forward import Forward, split_head

if TYPE_CHECKING:
    import torch
    from torch import nn

logger = logging.getLogger(__name__)

NETWORKS = 256
"""Networks of one class that are compiled in a process, at most. Torch takes each for one more try
at the same code, and gives up after eight: a session of two tasks would have more."""


def run_compiled(network: nn.Module, shape: tuple[int, ...]) -> Forward:
    """Compile a network for tiles of one shape when it gets its first one.

    On a CPU its weights are frozen, and so laid out as convolutions read them; its last layer stays
    apart, to be run slice by slice.
    """
    if next(network.parameters()).device.type != "cpu":
        return Forward(body=_Compiled(network, frozen=False))
    body, head = split_head(network)
    return Forward(body=_Compiled(body, frozen=True), head=head)


class _Compiled:
    """A compiled network; what can't be compiled is run as it is."""

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
            # Not as an option of torch.compile: the step before inductor reads it too, and without
            # it hands over the weights as inputs, which then are not frozen.
            with (
                inductor.patch(freezing=self._frozen),
                dynamo.patch(recompile_limit=NETWORKS),
            ):
                answer: torch.Tensor = self._run(tile)
        except TorchDynamoException as error:
            logger.warning(
                "%s can't be compiled, so it is run uncompiled: %s",
                type(self._network).__name__,
                str(error).strip().partition("\n")[0],
            )
            self._run = self._network
            answer = self._run(tile)
        return answer
