"""Instance normalisation, in two variants: torch's in place, and one that sums axis by axis."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeAlias

    Norm: TypeAlias = Any
    """One of ``NORMS``; for mypy all attributes of a module are tensors or modules."""

NORMS = (nn.InstanceNorm2d, nn.InstanceNorm3d)


def normalised_in_place(network: nn.Module) -> nn.Module:
    """Return a network with the same weights and bits that normalises in its convolutions' output.

    For networks that read this output nowhere else. Normalised copies would be a fifth of the
    memory that a forward pass allocates and that the system clears for it.
    """
    return _with_norms(network, _InPlace)


def summed_by_axis(network: nn.Module) -> nn.Module:
    """Return a network with the same weights for backends that sum naively.

    OpenVINO's normalisation sums a channel's million voxels in one float32 number. In constant
    regions of a scan, such as air, all these additions are rounded in the same direction: 0.7 % of
    a phantom's labels changed.
    """
    return _with_norms(network, _ByAxis)


def _with_norms(network: nn.Module, replacement: Callable[[Norm], nn.Module]) -> nn.Module:
    """Return a network with the same weights in which each instance normalisation is replaced."""
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    other = copy.deepcopy(network, shared)
    norms = [
        (module, name, child)
        for module in other.modules()
        for name, child in module.named_children()
        if type(child) in NORMS and not child.track_running_stats
    ]
    for module, name, norm in norms:
        setattr(module, name, replacement(norm))
    return other


class _InPlace(nn.Module):
    """Torch's instance normalisation, with identical bits, in its input's memory."""

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Normalise (1, channels, z, y, x) or (1, channels, y, x)."""
        if image.device.type != "cpu" or len(image) > 1 or not image.is_contiguous():
            normalised: torch.Tensor = self.norm(image)
            return normalised
        # torch.nn.functional.instance_norm makes this call for one image (2.14).
        weight, bias, eps = self.norm.weight, self.norm.bias, self.norm.eps
        mean, scale = image.new_empty(2, image.shape[1])
        torch.native_batch_norm(
            image, weight, bias, None, None, True, 0.0, eps, out=(image, mean, scale)
        )
        return image


class _ByAxis(nn.Module):
    """Instance normalisation that sums in another order."""

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.eps = norm.eps
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Normalise (1, channels, z, y, x) or (1, channels, y, x)."""
        centred = image - _mean(image.mean(-1, keepdim=True))
        # Lengths of lines, because squares of all voxels would take memory and time.
        lengths = torch.linalg.vector_norm(centred, dim=-1, keepdim=True)
        scale = torch.rsqrt(_mean(lengths * lengths) / image.shape[-1] + self.eps)
        if self.weight is None:
            return centred * scale
        shape = (-1, *[1] * (image.dim() - 2))
        image = centred * (scale * self.weight.view(shape)) + self.bias.view(shape)
        return image


def _mean(lines: torch.Tensor) -> torch.Tensor:
    """Mean of each channel of (1, channels, z, y, 1) or (1, channels, y, 1).

    Sums and means alternate because OpenVINO would join two operations of the same kind.
    """
    planes = lines.sum(-2, keepdim=True)
    volumes = planes.mean(2, keepdim=True) if lines.dim() == 5 else planes
    return volumes / lines.shape[-2]
