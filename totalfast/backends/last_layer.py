"""The last layer, a 1x1x1 convolution, of features that are channels last in memory."""

from __future__ import annotations

import torch
from torch import nn


class LastLayer(nn.Module):
    """A 1x1x1 convolution of features that are channels last in memory."""

    def __init__(self, layer: nn.Conv3d) -> None:
        super().__init__()
        # Copies, so that they do not keep the whole checkpoint in memory.
        self.weight = layer.weight.detach().flatten(1).clone()
        self.bias = self.weight.new_zeros(len(self.weight), 1)
        if layer.bias is not None:
            self.bias[:, 0] = layer.bias.detach()

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Logits (1, classes, z, y, x), channels first in memory."""
        voxels = features[0].flatten(1)
        return torch.addmm(self.bias, self.weight, voxels).view(1, -1, *features.shape[2:])
