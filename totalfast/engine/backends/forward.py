"""What every backend makes of a network, and the plainest one: torch, as it is.

Knows nnU-Net's networks; knows nothing of tiles' places or of files.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import nn


def _nothing() -> None:
    """Give back nothing, as nothing is kept."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Forward:
    """A network that is ready to answer tiles, in two steps.

    Parameters
    ----------
    body
        All but the last layer. float32, (1, channels, z, y, x), to (1, features, z, y, x), on the
        network's device; without z for networks of 2-D images. Features are valid until the next
        tile's.
    head
        The last layer, in torch: a 1x1x1 convolution of the features to logits; or None, if what
        the body answers, each time in a new tensor, are the logits.
    release
        Gives back memory that is only kept from one tile to the next.
    """

    body: Callable[[torch.Tensor], torch.Tensor]
    head: nn.Module | None = None
    release: Callable[[], None] = _nothing

    def __call__(self, tile: torch.Tensor) -> torch.Tensor:
        """Both steps at once: a tile's logits, (1, classes, z, y, x)."""
        answer = self.body(tile)
        if self.head is not None:
            answer = self.head(answer)
        return answer


def run_by_torch(network: nn.Module, shape: tuple[int, ...]) -> Forward:
    """Run a network as nnU-Net does: the same operations, hence the same bits."""
    from totalfast.engine.backends.norms import normalised_in_place

    body, head = split_head(network)
    if is_nnunets(body):
        body = normalised_in_place(body)
        body = _with_module(body, "encoder", _with_skips_read_once(body.encoder))  # type: ignore[arg-type]
    return Forward(body=body, head=head)


def _with_skips_read_once(encoder: nn.Module) -> nn.Module:
    """Return an encoder whose feature maps, the decoder's skip connections, can be read once each.

    The decoder copies them into its next input and needs them no more. The finest is a sixth of
    what a forward pass takes at its peak, which comes after.
    """
    other = copy.copy(encoder)
    other._forward_hooks = encoder._forward_hooks.copy()
    other.register_forward_hook(lambda module, inputs, answers: _ReadOnce(answers))
    return other


class _ReadOnce(list[Any]):
    """A list that forgets what was taken from it."""

    def __getitem__(self, index: Any) -> Any:  # noqa: ANN401 - as the list's
        value = super().__getitem__(index)
        if isinstance(index, int):
            self[index] = None
        return value


def is_nnunets(network: nn.Module) -> bool:
    """Whether it is one of nnU-Net's two U-Nets itself."""
    from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet

    return type(network) in (PlainConvUNet, ResidualEncoderUNet)


def split_head(network: nn.Module) -> tuple[nn.Module, nn.Conv3d | None]:
    """Split nnU-Net's U-Nets before their last layer, if that is a 1x1x1 convolution.

    Its answer, hundreds of channels, is by far the largest array of a run. Each voxel of it depends
    on that voxel's features alone, so that it can be had slice by slice, with the same bits.

    Returns
    -------
        A network that shares the weights and ends before that layer, and the layer; or the
        network as it is, and None.
    """
    from torch import nn

    if not is_nnunets(network):
        return network, None
    decoder: Any = network.decoder
    head = decoder.seg_layers[-1]
    if decoder.deep_supervision or type(head) is not nn.Conv3d or head.kernel_size != (1, 1, 1):
        return network, None
    layers = nn.ModuleList([*decoder.seg_layers[:-1], nn.Identity()])
    return _with_module(network, "decoder", _with_module(decoder, "seg_layers", layers)), head


def _with_module(module: nn.Module, name: str, part: nn.Module) -> nn.Module:
    """Return a copy of a module, all parts shared, but one replaced."""
    other = copy.copy(module)
    other._modules = {**module._modules, name: part}
    return other
