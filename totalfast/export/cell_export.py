"""Linear export on the CPU, which compares only the classes that can win in a cell."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from totalfast.export.cell_data import Layer, Plane, Regions
from totalfast.export.linear_base import LinearExport, runs
from totalfast.geometry import CENTERS, linear_weights
from totalfast.system.cores import usable_cores

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch
    from numpy.typing import NDArray

    from totalfast.geometry import LinearWeights


@functools.cache
def prepare() -> None:
    """Compile the inner loops, or load them from numba's cache: seconds in a fresh installation.

    Meant for a thread beside a running network. A second call does nothing.
    """
    import torch

    threads = usable_cores()
    size = 2 * threads
    axis = linear_weights(size, 2 * size, CENTERS)
    out = np.zeros(3 * (2 * size,), dtype=np.uint8)
    # The parts of arrays must have the same layout as in a real run, threads included.
    with CellExport([axis, axis, axis], out, rounded_to="float16", threads=threads) as export:
        export.add(0, torch.zeros((2, size, size, size), dtype=torch.half))


class CellExport(LinearExport):
    """Compares only the classes that can win in a cell, on the CPU.

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
        # Imported here: numba takes a second, which exports to the nearest voxel do not need.
        from totalfast.export import cells, summaries

        self._cells, self._summaries = cells, summaries
        self._threads = max(threads, 1)
        self._runs_z, self._runs_y, self._runs_x = (runs(axis) for axis in axes)
        self._weights = [np.stack([n.lower_weight, n.upper_weight]) for n in axes]
        self._planes: list[Plane] = []
        """Memory for two slices: the n-th is at ``n % 2``."""
        self._pool = ThreadPoolExecutor(max_workers=self._threads)

    def __exit__(self, *_: object) -> None:
        """End the threads."""
        self._pool.shutdown()

    def add(self, first: int, slab: torch.Tensor) -> None:
        """Take slices; see ``LinearExport``. Each completed target slice is filled."""
        if self._out.size == 0:
            return
        used = set(self._runs_z[:, 2:].flat)
        completed_by = self._runs_z[:, 2:].max(axis=1)
        for offset in range(slab.shape[1]):
            index = first + offset
            if index not in used:
                continue
            self._take(index, slab[:, offset])
            for start, stop, lower, upper in self._runs_z[completed_by == index]:
                self._fill(slice(start, stop), lower, upper)

    def _take(self, index: int, logits: torch.Tensor) -> None:
        """Keep a slice (classes, y, x) until the slice after the next is taken."""
        import torch

        logits = logits.to("cpu")
        classes, *shape = logits.shape
        if not logits[0].is_contiguous():
            logits = logits.contiguous()
        if not self._planes:
            wide = np.float64 if logits.dtype == torch.float64 else np.float32
            self._planes = [Plane.empty(classes, shape, wide) for _ in range(2)]
        plane = self._planes[index % 2]
        # One array that spans all classes of the slice: numba then compiles for a contiguous array.
        stride, voxels = logits.stride(0), plane.label.size
        source = logits.as_strided(((classes - 1) * stride + voxels,), (1,))
        if logits.dtype == torch.half:
            source = source.view(torch.uint16)
        by_voxel = plane.logits.reshape(-1, classes)
        rest = [array.reshape(-1) for array in plane[1:]]

        def summarise(part: slice) -> None:
            self._summaries.summarise(
                source.numpy(), stride, part.start, part.stop, by_voxel, *rest
            )

        list(self._pool.map(summarise, _parts(voxels, self._threads)))

    def _fill(self, rows: slice, lower: int, upper: int) -> None:
        """Fill neighbouring target slices, all of which lie between the same two source slices."""
        planes = self._planes[lower % 2], self._planes[upper % 2]
        z, y, x = self._axes
        corners = z.corners, y.corners, x.corners
        weights_z, weights_y, weights_x = self._weights
        weights_z = np.ascontiguousarray(weights_z[:, rows])
        out = self._out[rows]
        regions = None if self._regions is None else Regions(self._regions, self._threshold)

        def fill(part: slice) -> None:
            runs_y = self._runs_y[part]
            layer = Layer(corners, runs_y, self._runs_x, weights_z, weights_y, weights_x)
            if regions is None:
                self._cells.fill_labels(*planes, layer, self._rounding, out)
            else:
                self._cells.fill_regions(*planes, regions, layer, self._rounding, out)

        list(self._pool.map(fill, _parts(len(self._runs_y), 2 * self._threads)))


def _parts(count: int, parts: int) -> Iterator[slice]:
    bounds = np.linspace(0, count, min(parts, count) + 1).astype(int)
    for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
        yield slice(int(start), int(stop))
