"""The layers of nnU-Net's two U-Nets, read from the network, in the order in which they run.

Knows nothing of how layers are computed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from typing import TypeAlias

    import torch
    from numpy.typing import NDArray
    from torch import nn

    Untyped: TypeAlias = Any
    """A module; for mypy all attributes of a module are tensors or modules."""

PADDED = {1: 0, 3: 1}
"""Size of a kernel along an axis to its padding."""


class UnknownLayerError(Exception):
    """A network has a layer that is not computed here; the text names it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Normalisation:
    """Instance normalisation.

    Parameters
    ----------
    weight, bias
        (outputs,).
    eps
        Added to the variance.
    """

    weight: NDArray[np.float32]
    bias: NDArray[np.float32]
    eps: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Convolution:
    """A convolution, with the instance normalisation and leaky ReLU behind it.

    Parameters
    ----------
    weight
        (outputs, inputs, z, y, x).
    bias
        (outputs,).
    stride
        Voxels along z, y, x.
    padding
        Zeros at both ends along z, y, x.
    normalisation
        None if there is none.
    slope
        Of the leaky ReLU; 1 if there is none, 0 for a ReLU.
    """

    weight: NDArray[np.float32]
    bias: NDArray[np.float32]
    stride: tuple[int, int, int]
    padding: tuple[int, int, int]
    normalisation: Normalisation | None
    slope: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Enlargement:
    """A transposed convolution with a kernel of the size of its stride.

    Parameters
    ----------
    weight
        (inputs, outputs, z, y, x).
    bias
        (outputs,).
    """

    weight: NDArray[np.float32]
    bias: NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Residual:
    """Two convolutions, to whose result their input is added, and a leaky ReLU behind the sum.

    Parameters
    ----------
    first, second
        The convolutions.
    shortcut
        What gives the input the shape of the result; None if it has it.
    slope
        Of the leaky ReLU behind the sum.
    """

    first: Convolution
    second: Convolution
    shortcut: Convolution | None
    slope: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Layers:
    """A U-Net without its last layer.

    Parameters
    ----------
    encoder
        The convolutions and blocks of each stage, from full resolution.
    decoder
        For each stage from the coarsest, what enlarges the features, and the convolutions; the
        first one reads the enlarged features and then those of the encoder's stage.
    """

    encoder: tuple[tuple[Convolution | Residual, ...], ...]
    decoder: tuple[tuple[Enlargement, tuple[Convolution, ...]], ...]


def read_layers(network: nn.Module) -> Layers:
    """Read the layers of nnU-Net's plain or residual 3-D U-Net, in eval mode.

    Raises
    ------
    UnknownLayerError
        If it is another network, or has other layers.
    """
    from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet

    if type(network) not in (PlainConvUNet, ResidualEncoderUNet):
        raise UnknownLayerError(type(network).__name__)
    unet: Untyped = network
    encoder = [_parts(stage) for stage in unet.encoder.stages]
    if type(network) is ResidualEncoderUNet:
        if unet.encoder.stem is None:
            raise UnknownLayerError("a residual network without a stem")
        encoder[0] = _parts(unet.encoder.stem) + encoder[0]
    decoder = tuple(
        (_enlargement(enlarge), _blocks(stage))
        for enlarge, stage in zip(unet.decoder.transpconvs, unet.decoder.stages, strict=True)
    )
    return Layers(encoder=tuple(encoder), decoder=decoder)


def _blocks(stage: Untyped) -> tuple[Convolution, ...]:
    """All convolutions of a stage of the decoder."""
    convolutions = []
    for part in _parts(stage):
        if not isinstance(part, Convolution):
            raise UnknownLayerError("residual blocks in the decoder")
        convolutions.append(part)
    return tuple(convolutions)


def _parts(stage: Untyped) -> tuple[Convolution | Residual, ...]:
    """All convolutions and residual blocks of a stage, which is one of them, or a sequence."""
    from dynamic_network_architectures.building_blocks.residual import (
        BasicBlockD,
        StackedResidualBlocks,
    )
    from dynamic_network_architectures.building_blocks.simple_conv_blocks import (
        ConvDropoutNormReLU,
        StackedConvBlocks,
    )
    from torch import nn

    if type(stage) is ConvDropoutNormReLU:
        return (_block(stage),)
    if type(stage) is BasicBlockD:
        return (_residual(stage),)
    if type(stage) is StackedConvBlocks:
        stage = stage.convs
    elif type(stage) is StackedResidualBlocks:
        stage = stage.blocks
    if type(stage) is not nn.Sequential:
        raise UnknownLayerError(type(stage).__name__)
    return tuple(part for own in stage for part in _parts(own))


def _residual(block: Untyped) -> Residual:
    from torch import nn

    if block.apply_se:
        raise UnknownLayerError(type(block.squeeze_excitation).__name__)
    return Residual(
        first=_block(block.conv1),
        second=_block(block.conv2),
        shortcut=_shortcut(block) if isinstance(block.skip, nn.Module) else None,
        slope=_slope(block.nonlin2) if isinstance(block.nonlin2, nn.Module) else 1.0,
    )


def _shortcut(block: Untyped) -> Convolution:
    """Mean of the voxels that a stride joins, and a 1x1x1 convolution, as one convolution."""
    from torch import nn

    channels = block.output_channels
    nothing = Convolution(
        weight=np.eye(channels, dtype=np.float32)[..., None, None, None],
        bias=np.zeros(channels, dtype=np.float32),
        stride=(1, 1, 1),
        padding=(0, 0, 0),
        normalisation=None,
        slope=1.0,
    )
    pools: list[Untyped] = [layer for layer in block.skip if type(layer) is nn.AvgPool3d]
    others = [layer for layer in block.skip if type(layer) is not nn.AvgPool3d]
    convolution = _block(others.pop()) if others else nothing
    for pool in pools:
        if pool.kernel_size != pool.stride or pool.padding or pool.divisor_override:
            raise UnknownLayerError(str(pool))
    if others or len(pools) > 1 or convolution.weight.shape[2:] != (1, 1, 1):
        raise UnknownLayerError(str(block.skip))
    z, y, x = pools[0].stride if pools else (1, 1, 1)
    window = np.full((z, y, x), 1 / (z * y * x), dtype=np.float32)
    return replace(convolution, weight=convolution.weight * window, stride=(z, y, x))


def _block(block: Untyped) -> Convolution:
    from torch import nn

    convolution, *behind = block.all_modules
    behind = [layer for layer in behind if not isinstance(layer, nn.modules.dropout._DropoutNd)]
    normalisation = None
    if behind and type(behind[0]) is nn.InstanceNorm3d:
        normalisation = _normalisation(behind.pop(0))
    slope = _slope(behind.pop(0)) if behind else 1.0
    if behind:
        raise UnknownLayerError(type(behind[0]).__name__)
    _check_convolution(convolution)
    return Convolution(
        weight=_array(convolution.weight),
        bias=_bias(convolution),
        stride=convolution.stride,
        padding=convolution.padding,
        normalisation=normalisation,
        slope=slope,
    )


def _check_convolution(layer: Untyped) -> None:
    from torch import nn

    padding = tuple(PADDED.get(size, -1) for size in layer.kernel_size)
    known = type(layer) is nn.Conv3d and layer.padding_mode == "zeros"
    if not known or layer.padding != padding or layer.groups != 1 or {*layer.dilation} != {1}:
        raise UnknownLayerError(str(layer))


def _normalisation(layer: Untyped) -> Normalisation:
    if layer.track_running_stats:
        raise UnknownLayerError(str(layer))
    size = layer.num_features
    ones, zeros = np.ones(size, dtype=np.float32), np.zeros(size, dtype=np.float32)
    # Copies, so that they do not keep the whole checkpoint in memory.
    return Normalisation(
        weight=ones if layer.weight is None else _array(layer.weight).copy(),
        bias=zeros if layer.bias is None else _array(layer.bias).copy(),
        eps=layer.eps,
    )


def _slope(layer: Untyped) -> float:
    from torch import nn

    if type(layer) is nn.LeakyReLU:
        return float(layer.negative_slope)
    if type(layer) is nn.ReLU:
        return 0.0
    raise UnknownLayerError(type(layer).__name__)


def _enlargement(layer: Untyped) -> Enlargement:
    from torch import nn

    known = type(layer) is nn.ConvTranspose3d and layer.groups == 1
    zeros = {*layer.padding, *layer.output_padding} == {0} and {*layer.dilation} == {1}
    if not known or not zeros or layer.kernel_size != layer.stride:
        raise UnknownLayerError(str(layer))
    return Enlargement(weight=_array(layer.weight), bias=_bias(layer, output_axis=1))


def _bias(layer: Untyped, output_axis: int = 0) -> NDArray[np.float32]:
    if layer.bias is None:
        return np.zeros(layer.weight.shape[output_axis], dtype=np.float32)
    return _array(layer.bias)


def _array(tensor: torch.Tensor) -> NDArray[np.float32]:
    import torch

    if tensor.dtype != torch.float32:
        raise UnknownLayerError(f"weights of {tensor.dtype}")
    array: NDArray[np.float32] = tensor.detach().numpy()
    return array
