"""Linear export on the CPU, which looks only at the classes that can win in a cell."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from totalfast.export.linear_base import LinearExport
from totalfast.geometry import CENTERS, linear_weights
from totalfast.system.cores import usable_cores

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch
    from numpy.typing import DTypeLike, NDArray

    from totalfast.geometry import LinearWeights


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


def _parts(count: int, parts: int) -> Iterator[slice]:
    bounds = np.linspace(0, count, min(parts, count) + 1).astype(int)
    for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
        yield slice(int(start), int(stop))
