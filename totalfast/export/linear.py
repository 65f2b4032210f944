"""Exactly the argmax of linearly resampled logits, without ever resampling all of them.

One responsibility: labels on a target grid from the logits on a source grid. Knows tensors and
per-axis interpolation weights; knows nothing of models, files or orientations.

The result equals nnU-Net's export with ``order=1`` and ``order_z=0`` bit for bit: each class is
interpolated in float64 and in scipy.ndimage.zoom's order of operations, rounded to the logits'
own dtype, and the first maximum wins. What makes it fast is what needs no interpolation. Linear
interpolation is a convex combination, so between eight neighbouring samples (a *cell*) class k can
only lose to class j

- if ``j < k`` and ``logit_j >= logit_k`` at all eight corners: rounding is monotonic, and a tie
  goes to the smaller label; or
- if ``logit_j - logit_k`` exceeds, at every corner, the spacing of the rounded dtype at the
  cell's largest magnitude of both, so that rounding can't make the two equal.

In most cells one class beats all others, and the cell is filled with it. That is ``CellExport``,
compiled by numba; a CUDA device is quick enough to interpolate all classes (``on_device``).
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from totalfast.geometry import CENTERS, linear_weights
from totalfast.system.cores import usable_cores

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch
    from numpy.typing import DTypeLike, NDArray

    from totalfast.geometry import LinearWeights

MANTISSA_BITS = {"float16": (10, -14), "float32": (23, -126), "float64": (52, -1022)}
"""Stored mantissa bits and smallest normal exponent of the dtypes that logits come in."""


class _Plane(NamedTuple):
    """One source slice: its logits, and per voxel what decides most cells."""

    logits: NDArray[Any]
    """float32 or float64, (y, x, classes)."""
    label: NDArray[np.uint16]
    """First maximum."""
    lead: NDArray[Any]
    """How far the maximum is ahead of every smaller label; infinite for label 0."""
    magnitude: NDArray[Any]
    """Largest absolute logit."""

    @classmethod
    def empty(cls, classes: int, shape: Sequence[int], dtype: DTypeLike) -> _Plane:
        """Room for a slice of a (y, x) shape."""
        return cls(
            logits=np.empty((*shape, classes), dtype),
            label=np.empty(shape, np.uint16),
            lead=np.empty(shape, dtype),
            magnitude=np.empty(shape, dtype),
        )


@functools.cache
def prepare() -> None:
    """Compile the inner loops, or load them from numba's cache: seconds in a fresh installation.

    Worth a thread of its own while a network runs; called again, it does nothing.
    """
    import torch

    threads = usable_cores()
    size = 2 * threads
    axis = linear_weights(size, 2 * size, CENTERS)
    out = np.zeros(3 * (2 * size,), dtype=np.uint8)
    # The parts of arrays must have the layout that they have in a real run, threads included.
    export = CellExport([axis, axis, axis], out, rounded_to="float16", threads=threads)
    export.add(0, torch.zeros((2, size, size, size), dtype=torch.half))


def linear_export(
    axes: Sequence[LinearWeights],
    out: NDArray[np.unsignedinteger],
    *,
    rounded_to: str,
    regions: Sequence[int] | None,
    device: torch.device,
    threads: int,
) -> LinearExport:
    """The export for logits on a device; for the parameters see ``LinearExport``.

    Logits of any device but CUDA are worked on by the CPU, in ``threads`` parts at a time: MPS
    knows no float64.
    """
    if device.type == "cuda":
        from totalfast.export.on_device import DeviceExport

        return DeviceExport(axes, out, rounded_to=rounded_to, regions=regions)
    return CellExport(axes, out, rounded_to=rounded_to, regions=regions, threads=threads)


class LinearExport(ABC):
    """Takes the source slices in order and fills the target slices that they complete.

    Parameters
    ----------
    axes
        Neighbours and weights of every target voxel along z, y and x.
    out
        Filled: unsigned integers, (z, y, x); its shape is that of ``axes``.
    rounded_to
        "float16", "float32" or "float64": what nnU-Net's array of resampled logits would hold.
    regions
        For region-based models, the label of each channel in the order they are painted; None
        takes the first maximum.
    """

    def __init__(
        self,
        axes: Sequence[LinearWeights],
        out: NDArray[np.unsignedinteger],
        *,
        rounded_to: str,
        regions: Sequence[int] | None = None,
    ) -> None:
        self._axes = axes
        self._out = out
        self._bits, self._low = MANTISSA_BITS[rounded_to]
        self._regions: NDArray[np.uint16] | None = None
        if regions is not None:
            self._regions = np.asarray(regions, dtype=np.uint16)
            self._threshold = region_threshold(rounded_to)
        needed: dict[int, list[int]] = {}
        for row, last in enumerate(np.maximum(axes[0].lower, axes[0].upper)):
            needed.setdefault(int(last), []).append(row)
        self._rows_of = needed
        self._used = {int(k) for axis in (axes[0].lower, axes[0].upper) for k in axis}

    def add(self, first: int, slab: torch.Tensor) -> None:
        """Take slices ``first, first + 1, ...``: logits (classes, slices, y, x), any device."""
        if self._out.size == 0:
            return
        for offset in range(slab.shape[1]):
            index = first + offset
            if index not in self._used:
                continue
            self._take(index, slab[:, offset])
            z = self._axes[0]
            for rows in _groups(self._rows_of.get(index, []), z):
                lower = int(z.lower[rows[0]])
                self._fill(rows, lower, int(z.upper[rows[0]]) if z.corners == 2 else lower)

    @abstractmethod
    def _take(self, index: int, logits: torch.Tensor) -> None:
        """Keep what a slice (classes, y, x) says until the one after the next comes."""

    @abstractmethod
    def _fill(self, rows: list[int], lower: int, upper: int) -> None:
        """Fill neighbouring target slices, all of them between the same two source slices."""


class CellExport(LinearExport):
    """Looks only at the classes that can win in a cell, on the CPU.

    Parameters
    ----------
    threads
        Parts of a slice that are worked on at a time.
    """

    def __init__(
        self,
        axes: Sequence[LinearWeights],
        out: NDArray[np.unsignedinteger],
        *,
        rounded_to: str,
        threads: int,
        regions: Sequence[int] | None = None,
    ) -> None:
        super().__init__(axes, out, rounded_to=rounded_to, regions=regions)
        # Imported here: numba takes a second that exports to the nearest voxel need not wait for.
        from totalfast.export import cells

        self._cells = cells
        self._threads = max(threads, 1)
        self._runs_y, self._runs_x = (_runs(axis) for axis in axes[1:])
        self._planes: list[_Plane] = []
        """Room for two slices: the n-th is at ``n % 2``."""

    def add(self, first: int, slab: torch.Tensor) -> None:
        """Take slices ``first, first + 1, ...``: logits (classes, slices, y, x), any device."""
        with ThreadPoolExecutor(max_workers=self._threads) as self._pool:
            super().add(first, slab)

    def _take(self, index: int, logits: torch.Tensor) -> None:
        import torch

        logits = logits.to("cpu")
        classes, *shape = logits.shape
        if not logits[0].is_contiguous():
            logits = logits.contiguous()
        if not self._planes:
            wide = np.float64 if logits.dtype == torch.float64 else np.float32
            self._planes = [_Plane.empty(classes, shape, wide) for _ in range(2)]
        plane = self._planes[index % 2]
        # One array over all that the slice's classes span, so that it is known to be contiguous.
        stride, voxels = logits.stride(0), plane.label.size
        source = logits.as_strided(((classes - 1) * stride + voxels,), (1,))
        if logits.dtype == torch.half:
            source = source.view(torch.uint16)
        by_voxel = plane.logits.reshape(-1, classes)
        rest = [array.reshape(-1) for array in plane[1:]]

        def summarise(part: slice) -> None:
            self._cells.summarise(source.numpy(), stride, part.start, part.stop, by_voxel, *rest)

        list(self._pool.map(summarise, _parts(voxels, self._threads)))

    def _fill(self, rows: list[int], lower: int, upper: int) -> None:
        z = self._axes[0]
        planes = [self._planes[n % 2] for n in (lower, upper)]
        out = self._out[rows[0] : rows[-1] + 1]
        weights_z = np.stack([z.lower_weight[rows], z.upper_weight[rows]])

        def fill(part: slice) -> None:
            common = (
                weights_z, z.corners, _arrays(self._axes[1]), self._runs_y[part],
                _arrays(self._axes[2]), self._runs_x, self._bits, self._low, out,
            )  # fmt: skip
            if self._regions is None:
                self._cells.fill_labels(planes[0], planes[1], *common)
            else:
                self._cells.fill_regions(
                    planes[0].logits, planes[1].logits, self._regions, self._threshold, *common
                )

        list(self._pool.map(fill, _parts(len(self._runs_y), 2 * self._threads)))


def _arrays(axis: LinearWeights) -> tuple[Any, ...]:
    return axis.lower, axis.upper, axis.lower_weight, axis.upper_weight, axis.corners


def _runs(axis: LinearWeights) -> NDArray[np.intp]:
    """(cells, 2): first and last + 1 target voxel of each run with the same neighbours."""
    same = (np.diff(axis.lower) == 0) & (np.diff(axis.upper) == 0)
    starts = np.concatenate([[0], np.flatnonzero(~same) + 1])
    return np.stack([starts, np.append(starts[1:], len(axis.lower))], axis=1).astype(np.intp)


def _groups(rows: list[int], axis: LinearWeights) -> Iterator[list[int]]:
    """Split target slices into neighbours that lie between the same source slices."""
    group: list[int] = []
    for row in rows:
        if group and (row != group[-1] + 1 or axis.lower[row] != axis.lower[group[-1]]):
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def _parts(count: int, parts: int) -> Iterator[slice]:
    bounds = np.linspace(0, count, min(parts, count) + 1).astype(int)
    for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
        yield slice(int(start), int(stop))


@functools.cache
def region_threshold(dtype: str) -> float:
    """Smallest logit whose float32 sigmoid exceeds 0.5: what nnU-Net paints a region for."""
    import torch

    # Positive floats are ordered as their bits are.
    kind = torch.int16 if dtype == "float16" else torch.int32
    real = torch.half if dtype == "float16" else torch.float32

    def logit(bits: int) -> torch.Tensor:
        return torch.tensor(bits, dtype=kind).view(real).float()

    lowest, highest = 0, int(torch.tensor(1.0, dtype=real).view(kind))
    while highest - lowest > 1:
        middle = (lowest + highest) // 2
        if torch.sigmoid(logit(middle)) > 0.5:
            highest = middle
        else:
            lowest = middle
    return float(logit(highest))
