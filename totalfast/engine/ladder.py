"""From one way to use a CUDA device's memory to the next one, which needs less of it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, TypeVar

from totalfast.backends.devices import release_device_memory, too_small

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from totalfast.engine.tiles import Tiling

logger = logging.getLogger(__name__)

Output = TypeVar("Output")


class Ladder:
    """Runs predictions, with less on the device after each lack of memory.

    Parameters
    ----------
    tiling
        The first way to try. The ways are those of ``Tiling.smaller``.
    device
        Where networks run.
    """

    def __init__(self, tiling: Tiling, device: torch.device) -> None:
        self.tiling = tiling
        self._device = device

    def run(self, predict: Callable[[Tiling], Output]) -> Output:
        """Predict; if memory is lacking, predict again with less on the device, from then on.

        Raises
        ------
        DeviceMemoryError
            If the device's memory is too small with everything but the network on the CPU.
        """
        import torch

        while True:
            try:
                return predict(self.tiling)
            except torch.OutOfMemoryError as error:
                if self._device.type == "cpu":
                    raise
                message = str(error)
            # Outside of the except clause, which keeps the failed call's tensors alive.
            release_device_memory()
            smaller = self.tiling.smaller()
            if smaller is None:
                raise too_small(message)
            self.tiling = smaller
            logger.warning("WARNING: the GPU's memory is too small; %s.", smaller)
