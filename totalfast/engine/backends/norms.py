"""Instance normalisation as torch does it, but in place; and with sums taken axis by axis.

Knows torch's modules and nothing of who runs them.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable

NORMS = (nn.InstanceNorm2d, nn.InstanceNorm3d)


def normalised_in_place(network: nn.Module) -> nn.Module:
    """Return a network of the same weights and bits that normalises over its convolutions' answers.

    For networks that read these nowhere else. A fifth of the memory that a forward pass asks for,
    and that the system clears for it, was for normalised copies.
    """
    return _with_norms(network, _InPlace)


def summed_by_axis(network: nn.Module) -> nn.Module:
    """Return a network of the same weights for backends that sum naively.

    OpenVINO's own normalisation adds up a channel's million voxels in one float32 number. Where a
    scan is constant, as air is, each of these additions is rounded the same way: 0.7 % of the
    labels of a phantom changed.
    """
    return _with_norms(network, _ByAxis)


def _with_norms(network: nn.Module, replacement: Callable[[Any], nn.Module]) -> nn.Module:
    """Return a network of the same weights, with each instance normalisation replaced."""
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    other = copy.deepcopy(network, shared)
    found = [
        (module, name, child)
        for module in other.modules()
        for name, child in module.named_children()
        if type(child) in NORMS and not child.track_running_stats
    ]
    for module, name, norm in found:
        setattr(module, name, replacement(norm))
    return other


class _InPlace(nn.Module):
    """What torch's instance normalisation computes, with the same bits, in its input's memory."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm: Any = norm

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Normalise (1, channels, z, y, x) or (1, channels, y, x)."""
        if image.device.type != "cpu" or len(image) > 1 or not image.is_contiguous():
            answer: torch.Tensor = self.norm(image)
            return answer
        # This is what torch.nn.functional.instance_norm calls for one image (2.14).
        weight, bias, eps = self.norm.weight, self.norm.bias, self.norm.eps
        mean, scale = image.new_empty(2, image.shape[1])
        torch.native_batch_norm(
            image, weight, bias, None, None, True, 0.0, eps, out=(image, mean, scale)
        )
        return image


class _ByAxis(nn.Module):
    """What an instance normalisation computes, in another order."""

    def __init__(self, norm: Any) -> None:  # noqa: ANN401 - an instance normalisation
        super().__init__()
        self.eps = norm.eps
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Normalise (1, channels, z, y, x) or (1, channels, y, x)."""
        centred = image - _mean(image.mean(-1, keepdim=True))
        # Lengths of lines, as squares of all voxels would take memory and time.
        lengths = torch.linalg.vector_norm(centred, dim=-1, keepdim=True)
        scale = torch.rsqrt(_mean(lengths * lengths) / image.shape[-1] + self.eps)
        if self.weight is None:
            return centred * scale
        shape = (-1, *[1] * (image.dim() - 2))
        answer: torch.Tensor = centred * (scale * self.weight.view(shape)) + self.bias.view(shape)
        return answer


def _mean(lines: torch.Tensor) -> torch.Tensor:
    """Mean of each channel of (1, channels, z, y, 1) or (1, channels, y, 1).

    Sums and means take turns, as OpenVINO joins two of a kind.
    """
    planes = lines.sum(-2, keepdim=True)
    volumes = planes.mean(2, keepdim=True) if lines.dim() == 5 else planes
    return volumes / lines.shape[-2]
