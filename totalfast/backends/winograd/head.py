"""The last layer, whose weighted logits are added to float16 sums without being written anywhere.

A row of voxels has its logits in the processor's cache only. With more than a hundred classes
writing them, and reading them again, takes longer than to compute them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from totalfast.backends.last_layer import LastLayer
from totalfast.backends.winograd.logits import Call, add_logits, scratch_floats
from totalfast.backends.winograd.threads import layer_threads, run_in_threads
from totalfast.backends.winograd.vectors import CONVERTS_HALVES, FLOAT_BYTES, HALF_BYTES

if TYPE_CHECKING:
    import torch
    from torch import nn


def last_layer(layer: nn.Conv3d) -> LastLayer:
    """Return the last layer for features that are channels last in memory."""
    return AddingLastLayer(layer) if CONVERTS_HALVES else LastLayer(layer)


class AddingLastLayer(LastLayer):
    """A last layer that can add its weighted logits to sums."""

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.weight)

    def add_to(self, sums: torch.Tensor, features: torch.Tensor, weights: torch.Tensor) -> None:
        """Add to sums: ``sums += logits * weights``, in float32, rounded once.

        Parameters
        ----------
        sums
            float16, (classes, z, y, x), with x contiguous.
        features
            float32, (features, z, y, x), channels last in memory, and x behind them.
        weights
            float16, (z, y, x), with x contiguous.
        """
        if weights.stride(2) != 1 or sums.stride(3) != 1 or features.stride(0) != 1:
            raise ValueError("sums and weights must be contiguous along x, features along channels")
        terms, *shape = features.shape
        bias = self.bias.numpy()
        call = Call(
            shape=(shape[0], shape[1], shape[2]),
            terms=terms,
            classes=len(bias),
            layer=self.weight.data_ptr(),
            bias=bias.ctypes.data,
            features=features.data_ptr(),
            feature_strides=_bytes(features.stride()[1:], FLOAT_BYTES),
            sums=sums.data_ptr(),
            sum_strides=_bytes(sums.stride()[:3], HALF_BYTES),
            weights=weights.data_ptr(),
            weight_strides=_bytes((*weights.stride()[:2], 1), HALF_BYTES),
        )
        floats = scratch_floats(shape[2], terms, len(bias))
        run_in_threads(
            lambda work: add_logits(call, work),
            layer_threads(),
            floats,
            owners=(self, bias, sums, features, weights),
        )


def _bytes(strides: tuple[int, ...], item: int) -> tuple[int, int, int]:
    first, second, third = (int(stride) * item for stride in strides)
    return first, second, third
