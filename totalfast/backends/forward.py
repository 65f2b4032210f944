"""``Forward``, the form in which every backend runs a network, and the plain torch backend."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeAlias

    import torch
    from torch import nn

    Index: TypeAlias = Any
    Item: TypeAlias = Any
    """An index or slice of a list, and the list's item or items."""


def _no_release() -> None:
    """Do nothing: plain torch keeps no memory between tiles."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Forward:
    """A network that is ready to run on tiles, in two steps.

    Parameters
    ----------
    body
        All layers but the last. Maps float32 (1, channels, z, y, x) to (1, features, z, y, x), on
        the network's device; 2-D networks have no z. The features are valid until the next call.
    head
        The last layer, in torch: a 1x1x1 convolution of the features to logits. None if the body
        returns logits, in a new tensor per call.
    release
        Frees memory that is kept between tiles.
    """

    body: Callable[[torch.Tensor], torch.Tensor]
    head: nn.Module | None = None
    release: Callable[[], None] = _no_release

    def __call__(self, tile: torch.Tensor) -> torch.Tensor:
        """Run both steps on a tile; return its logits, (1, classes, z, y, x)."""
        features = self.body(tile)
        return features if self.head is None else self.head(features)


def run_by_torch(network: nn.Module, shape: tuple[int, ...]) -> Forward:
    """Run a network with nnU-Net's operations, which gives identical bits."""
    from totalfast.backends.norms import normalised_in_place

    body, head = split_head(network)
    if is_nnunets(body):
        body = normalised_in_place(body)
        body = _with_module(body, "encoder", _with_skips_read_once(body.encoder))  # type: ignore[arg-type]
    return Forward(body=body, head=head)


def _with_skips_read_once(encoder: nn.Module) -> nn.Module:
    """Return an encoder whose feature maps, the decoder's skip connections, can be read only once.

    The decoder copies each map into its next input and does not need it again. The finest map takes
    a sixth of a forward pass's peak memory, which occurs later.
    """
    other = copy.copy(encoder)
    other._forward_hooks = encoder._forward_hooks.copy()
    other.register_forward_hook(lambda module, inputs, outputs: _ReadOnce(outputs))
    return other


class _ReadOnce(list[Any]):
    """A list that drops each item when it is read by its index."""

    def __getitem__(self, index: Index) -> Item:
        item = super().__getitem__(index)
        if isinstance(index, int):
            self[index] = None
        return item


LAYERS = ("dynamic_network_architectures.", "torch.nn.")


def is_nnunets(network: nn.Module) -> bool:
    """Whether a network is one of nnU-Net's two U-Nets, of nnU-Net's and torch's layers only."""
    from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet

    return type(network) in (PlainConvUNet, ResidualEncoderUNet) and all(
        type(part).__module__.startswith(LAYERS) for part in network.modules()
    )


def split_head(network: nn.Module) -> tuple[nn.Module, nn.Conv3d | None]:
    """Split nnU-Net's U-Nets before their last layer, if that layer is a 1x1x1 convolution.

    The layer's output, with one channel per class, is by far the largest array of a run. Each of
    its voxels depends only on the same voxel's features. So it can be computed slice by slice, with
    identical bits.

    Returns
    -------
        A network that shares the weights and ends before that layer, and the layer; or the
        unchanged network and None.
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
    """Return a copy of a module that shares all parts but one, which is replaced."""
    other = copy.copy(module)
    other._modules = {**module._modules, name: part}
    return other
