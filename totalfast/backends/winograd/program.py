"""A U-Net as a list of compiled layers that run one after another on one tile."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from totalfast.backends.winograd import direct, winograd
from totalfast.backends.winograd.features import (
    NOTHING,
    Features,
    Use,
    assign_places,
    with_zeros,
)
from totalfast.backends.winograd.layers import PIECES, Shape, Target
from totalfast.backends.winograd.network import Residual, UnknownLayerError
from totalfast.backends.winograd.products import BLOCK
from totalfast.backends.winograd.threads import run_in_threads
from totalfast.backends.winograd.transforms import POINTS, transform_kernel

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    from numpy.typing import NDArray

    from totalfast.backends.winograd.layers import Work
    from totalfast.backends.winograd.network import (
        Convolution,
        Enlargement,
        Layers,
        Normalisation,
    )

    Memory = Sequence[NDArray[np.float32]]
    Call = Callable[[Work], None]
    """Does a thread's share of a layer."""

LARGEST_TRANSFORMED = 40 << 20
"""Bytes of a transformed kernel, which is eight times as large as the kernel. Larger ones belong to
coarse stages with few voxels, and would take more memory than time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A layer.

    Parameters
    ----------
    sources, target
        What it reads and writes; the first layer has no sources, because it reads the image.
    bind
        Gives the compiled call, from the memory of the features, and the addresses of the image and
        of the sums.
    scratch
        Number of float32 of each thread's scratch memory.
    normalisation
        Of the target; None if there is none.
    replaces_source
        Whether the target takes the memory of the first source.
    """

    sources: tuple[Features, ...]
    target: Features
    bind: Callable[[Memory, int, int], Call]
    scratch: int
    normalisation: Normalisation | None
    replaces_source: bool = False


class Program:
    """A U-Net without its last layer, for tiles of one shape.

    Parameters
    ----------
    layers
        Of the network.
    shape
        (1, channels, z, y, x).
    threads
        Number of threads.
    """

    def __init__(self, layers: Layers, shape: tuple[int, ...], *, threads: int) -> None:
        self._threads = threads
        self._shape = shape
        self._lock = threading.Lock()
        self._steps = _steps(layers, Shape(*shape[2:]))
        self._output = self._steps[-1].target
        self._sizes = assign_places(_uses(self._steps))
        self._memory: list[NDArray[np.float32]] = []
        self._floats = max(step.scratch for step in self._steps)

    def __call__(self, tile: torch.Tensor) -> torch.Tensor:
        """Compute the features of a tile.

        Parameters
        ----------
        tile
            float32, of the program's shape, on the CPU.

        Returns
        -------
            float32 (1, features, z, y, x), channels last in memory, and valid until the next call.
        """
        with self._lock:
            return self._run_all(tile)

    def _run_all(self, tile: torch.Tensor) -> torch.Tensor:
        import torch

        if tile.shape != self._shape or tile.dtype != torch.float32 or tile.device.type != "cpu":
            raise ValueError(
                f"the tile is {tile.dtype} {tuple(tile.shape)} on {tile.device}; this network was "
                f"prepared for float32 {self._shape} on the CPU."
            )
        if not self._memory:
            self._allocate()
        image = tile.contiguous()
        for step in self._steps:
            sums = np.zeros((PIECES, 2, step.target.channels))
            call = step.bind(self._memory, image.data_ptr(), sums.ctypes.data)
            self._run(call, (self._memory, image, sums, step))
            if step.normalisation is not None:
                step.target.normalise(step.normalisation, sums.sum(axis=0))
        source = self._output.source(self._memory)
        voxels = int(np.prod(self._output.shape))
        self._run(lambda work: direct.finish(voxels, source, work), self._memory)
        features = torch.from_numpy(self._memory[self._output.place][: self._output.size])
        features = features.view(1, *self._output.shape, -1)[..., : self._output.count]
        return features.permute(0, 4, 1, 2, 3)

    def release(self) -> None:
        """Free the memory that is kept between tiles."""
        with self._lock:
            self._memory = []

    def _allocate(self) -> None:
        self._memory = [np.empty(size, dtype=np.float32) for size in self._sizes]

    def _run(self, call: Call, owners: object) -> None:
        run_in_threads(call, self._threads, self._floats, owners=owners)


def _uses(steps: Sequence[Step]) -> list[Use]:
    last = {id(step.target): number for number, step in enumerate(steps)}
    for number, step in enumerate(steps):
        last.update({id(source): number for source in step.sources})
    return [
        Use(step.target, last[id(step.target)], step.sources[0] if step.replaces_source else None)
        for step in steps
    ]


def _steps(layers: Layers, shape: Shape) -> list[Step]:
    """All layers in their order."""
    steps: list[Step] = []
    skips: list[Features] = []
    for stage in layers.encoder:
        for part in stage:
            before: tuple[Features, ...] = (steps[-1].target,) if steps else ()
            if isinstance(part, Residual):
                steps += _residual(part, before[0], shape)
            else:
                steps.append(_convolution(part, before, shape))
        skips.append(steps[-1].target)
    skips.pop()
    for enlargement, stage in layers.decoder:
        steps.append(_enlargement(enlargement, steps[-1].target))
        before = (steps[-1].target, skips.pop())
        for convolution in stage:
            steps.append(_convolution(convolution, before, shape))
            before = (steps[-1].target,)
    return steps


def _residual(block: Residual, source: Features, image: Shape) -> list[Step]:
    steps, other = [], source
    if block.shortcut is not None:
        if any(np.remainder(source.shape, block.shortcut.stride)):
            raise _indivisible(image)
        steps.append(_convolution(block.shortcut, (source,), image))
        other = steps[-1].target
    steps.append(_convolution(block.first, (source,), image))
    steps.append(_convolution(block.second, (steps[-1].target,), image))
    result = steps[-1].target
    if (result.shape, result.count) != (other.shape, other.count):
        raise _indivisible(image)
    return [*steps, _sum(result, other, block.slope)]


def _indivisible(image: Shape) -> UnknownLayerError:
    return UnknownLayerError(f"tiles whose size is {tuple(image)}, because of its strides")


def _sum(first: Features, second: Features, slope: float) -> Step:
    voxels = int(np.prod(first.shape))

    def bind(memory: Memory, image: int, sums: int) -> Call:
        one, other = first.source(memory), second.source(memory)
        return lambda work: direct.add(voxels, one, other, slope, work)

    return Step(
        sources=(first, second),
        target=Features(first.shape, first.count, 1.0),
        bind=bind,
        scratch=1,
        normalisation=None,
        replaces_source=True,
    )


def _convolution(layer: Convolution, sources: tuple[Features, ...], image: Shape) -> Step:
    shape = sources[0].shape if sources else image
    if any(source.shape != shape for source in sources):
        raise _indivisible(image)
    target = Features(
        Shape(*(-(-size // step) for size, step in zip(shape, layer.stride, strict=True))),
        len(layer.weight),
        layer.slope,
    )
    if layer.normalisation is None:
        target.normalisation[2, : target.count] = layer.bias
    if not sources:
        return _of_image(layer, shape, target)
    weight = _for_sources(layer.weight, sources, target)
    transformed_bytes = POINTS * weight.shape[0] * weight.shape[1] * weight.itemsize
    is_winograds = weight.shape[2:] == (3, 3, 3) and layer.stride == (1, 1, 1)
    if is_winograds and transformed_bytes <= LARGEST_TRANSFORMED:
        return _by_winograd(layer, weight, sources, target)
    return _directly(layer, weight, sources, target)


def _for_sources(
    weight: NDArray[np.float32], sources: Sequence[Features], target: Features
) -> NDArray[np.float32]:
    """Weights with zeros for the channels that fill the sources' and the target's last blocks."""
    first, parts = 0, []
    for source in sources:
        own = weight[:, first : first + source.count]
        parts.append(with_zeros(own, {0: target.channels, 1: source.channels}))
        first += source.count
    return np.concatenate(parts, axis=1)


def _by_winograd(
    layer: Convolution,
    weight: NDArray[np.float32],
    sources: tuple[Features, ...],
    target: Features,
) -> Step:
    inputs = max(source.channels for source in sources)
    outputs = BLOCK if len(sources) == 1 else target.channels
    tiles = winograd.tiles_at_a_time(inputs, outputs)
    bounds = np.cumsum([source.channels for source in sources])[:-1]
    parts = np.split(weight, bounds, axis=1)
    weights = np.concatenate([transform_kernel(part) for part in parts])

    def bind(memory: Memory, image: int, sums: int) -> Call:
        first, *rest = (source.source(memory) for source in sources)
        second, data = rest[0] if rest else NOTHING, memory[target.place].ctypes.data

        to = Target(data, sums, target.channels, weights.ctypes.data)

        def call(work: Work) -> None:
            winograd.convolve(target.shape, first, second, to, work, tiles)

        return call

    scratch = winograd.scratch_floats(inputs, outputs, tiles)
    return Step(
        sources=sources,
        target=target,
        bind=bind,
        scratch=scratch,
        normalisation=layer.normalisation,
    )


def _directly(
    layer: Convolution,
    weight: NDArray[np.float32],
    sources: tuple[Features, ...],
    target: Features,
) -> Step:
    window = _window(layer)
    weights, shape = direct.direct_weights(weight), sources[0].shape

    def bind(memory: Memory, image: int, sums: int) -> Call:
        first, *rest = (source.source(memory) for source in sources)
        second, data = rest[0] if rest else NOTHING, memory[target.place].ctypes.data

        to = Target(data, sums, target.channels, weights.ctypes.data)

        def call(work: Work) -> None:
            direct.convolve(shape, first, second, target.shape, to, window, work)

        return call

    scratch = direct.scratch_floats(shape.x, window, weight.shape[1])
    return Step(
        sources=sources,
        target=target,
        bind=bind,
        scratch=scratch,
        normalisation=layer.normalisation,
    )


def _window(layer: Convolution) -> direct.Window:
    return direct.Window(
        kernel=Shape(*layer.weight.shape[2:]),
        stride=Shape(*layer.stride),
        padding=Shape(*layer.padding),
    )


def _of_image(layer: Convolution, shape: Shape, target: Features) -> Step:
    window = _window(layer)
    weights = direct.direct_weights(with_zeros(layer.weight, {0: target.channels}))
    channels, terms = layer.weight.shape[1], int(np.prod(layer.weight.shape[1:]))

    def bind(memory: Memory, image: int, sums: int) -> Call:
        data = memory[target.place].ctypes.data

        to = Target(data, sums, target.channels, weights.ctypes.data)

        def call(work: Work) -> None:
            direct.convolve_image(shape, image, channels, terms, target.shape, to, window, work)

        return call

    scratch = target.shape.x * terms
    return Step(
        sources=(), target=target, bind=bind, scratch=scratch, normalisation=layer.normalisation
    )


def _enlargement(layer: Enlargement, source: Features) -> Step:
    stride = Shape(*layer.weight.shape[2:])
    shape = Shape(*(size * step for size, step in zip(source.shape, stride, strict=True)))
    target = Features(shape, layer.weight.shape[1], 1.0)
    target.normalisation[2, : target.count] = layer.bias
    sizes = {0: source.channels, 1: target.channels}
    weights = direct.transposed_weights(with_zeros(layer.weight, sizes))

    def bind(memory: Memory, image: int, sums: int) -> Call:
        first, data = source.source(memory), memory[target.place].ctypes.data

        to = Target(data, sums, target.channels, weights.ctypes.data)

        def call(work: Work) -> None:
            direct.enlarge(source.shape, first, to, stride, work)

        return call

    scratch = source.shape.x * source.channels
    return Step(sources=(source,), target=target, bind=bind, scratch=scratch, normalisation=None)
