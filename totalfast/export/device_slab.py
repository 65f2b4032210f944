"""The geometry of ``linear`` on a device: cells, their corners, and the target voxels in them.

Plain torch operations, each on many cells or voxels at a time. None waits for the device.
"""

from __future__ import annotations

import functools
import itertools
import operator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch
    from numpy.typing import NDArray

    from totalfast.export.cell_data import Rounding
    from totalfast.geometry import LinearWeights

BYTES_AT_A_TIME = 2**28
"""Memory of one batch of cells or voxels on the device; smaller ones need more calls of torch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceAxis:
    """The cells along one axis and the target voxels in them; tensors on the device."""

    sources: torch.Tensor
    """int64, (corners, cells): source index of each cell's lower and upper corner."""
    cell: torch.Tensor
    """int64, (target voxels,): the cell of each."""
    targets: torch.Tensor
    """int64, (most voxels in a cell, cells); in smaller cells the last voxel is repeated."""
    weights: torch.Tensor
    """float64, (corners, target voxels); 1 if only the lower corner counts."""

    @classmethod
    def of(cls, axis: LinearWeights, runs: NDArray[np.intp], device: torch.device) -> DeviceAxis:
        """Put an axis on a device; ``runs`` as in ``Layer.runs_y``, one cell each."""
        import torch

        first, stop, lower, upper = runs.T
        steps = np.arange((stop - first).max())[:, None]
        weights = np.stack([axis.lower_weight, axis.upper_weight])[: axis.corners]

        def put(array: NDArray[np.generic], kind: type[np.generic]) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(array, dtype=kind)).to(device)

        return cls(
            sources=put(np.stack([lower, upper])[: axis.corners], np.int64),
            cell=put(np.repeat(np.arange(len(runs)), stop - first), np.int64),
            targets=put(np.minimum(first + steps, stop - 1), np.int64),
            weights=put(weights, np.float64),
        )

    def part(self, cells: slice, rows: slice, first_source: int) -> DeviceAxis:
        """Some neighbouring cells; all indices are then counted from the first of the part."""
        return replace(
            self,
            sources=self.sources[:, cells] - first_source,
            cell=self.cell[rows] - cells.start,
            targets=self.targets[:, cells] - rows.start,
            weights=self.weights[:, rows],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSlab:
    """Some source slices, and the layers of cells between them."""

    logits: torch.Tensor
    """(classes, z, y, x), contiguous."""
    axes: tuple[DeviceAxis, DeviceAxis, DeviceAxis]
    """z, y and x."""
    rounding: Rounding

    @property
    def target_shape(self) -> tuple[int, ...]:
        """Target voxels along (z, y, x)."""
        return tuple(len(axis.cell) for axis in self.axes)

    @property
    def cell_shape(self) -> tuple[int, ...]:
        """Cells along (z, y, x)."""
        return tuple(axis.sources.shape[1] for axis in self.axes)

    @property
    def working_dtype(self) -> torch.dtype:
        """The dtype of approximate values."""
        import torch

        return torch.float64 if self.logits.dtype == torch.float64 else torch.float32

    def on_cells(
        self,
        values: torch.Tensor,
        combine: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """Combine values of source voxels (..., z, y, x) over the corners of each cell."""
        for dimension, axis in zip((-3, -2, -1), self.axes, strict=True):
            lower, *upper = (values.index_select(dimension, index) for index in axis.sources)
            values = combine(lower, upper[0]) if upper else lower
        return values

    def on_target(self, values: torch.Tensor) -> torch.Tensor:
        """Give each target voxel the value of its cell; (z, y, x)."""
        for dimension in (2, 1, 0):
            values = values.index_select(dimension, self.axes[dimension].cell)
        return values

    def corners(self, cells: Sequence[torch.Tensor]) -> torch.Tensor:
        """Offsets of the corners in one class's logits, (corners, n), x fastest."""
        z, y, x = (axis.sources[:, cell] for axis, cell in zip(self.axes, cells, strict=True))
        height, width = self.logits.shape[2:]
        return ((z[:, None, None] * height + y[:, None]) * width + x).flatten(0, 2)

    def at_corners(self, cells: Sequence[torch.Tensor], classes: torch.Tensor) -> torch.Tensor:
        """Logits of ``classes`` (k, n) at the corners of n cells, (k, corners, n)."""
        start = classes * self.logits[0].numel()
        return self.logits.view(-1)[start[:, None] + self.corners(cells)]

    def cells_of(self, voxels: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Cells that target voxels (z, y, x) are in: z, y and x."""
        return tuple(axis.cell[along] for axis, along in zip(self.axes, voxels, strict=True))

    def boxes(self, cells: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Target voxels of n cells: z, y and x, which broadcast to (slices, rows, columns, n)."""
        z, y, x = (axis.targets[:, cell] for axis, cell in zip(self.axes, cells, strict=True))
        return [z[:, None, None], y[:, None], x]

    def box_size(self) -> int:
        """Target voxels in the largest cell."""
        z, y, x = (len(axis.targets) for axis in self.axes)
        return z * y * x

    def offsets(self, voxels: Sequence[torch.Tensor]) -> torch.Tensor:
        """Offsets of target voxels (z, y, x) in the flat target."""
        z, y, x = voxels
        _, height, width = self.target_shape
        return (z * height + y) * width + x

    def interpolate(self, values: torch.Tensor, boxes: Sequence[torch.Tensor]) -> torch.Tensor:
        """Values at the corners (classes, corners, n) to (classes, slices, rows, columns, n).

        Axis by axis: that needs few operations, and the last bits differ from scipy's.
        """
        corners = [len(axis.sources) for axis in self.axes]
        values = values.reshape(len(values), *corners, -1)
        for dimension, (axis, voxels) in enumerate(zip(self.axes, boxes, strict=True), start=1):
            if len(axis.sources) == 2:
                lower, upper = axis.weights.to(values.dtype)
                sides = values.narrow(dimension, 0, 1), values.narrow(dimension, 1, 1)
                values = (sides[0] * lower[voxels]).addcmul_(sides[1], upper[voxels])
        return values.expand(-1, *(len(voxels) for voxels in boxes), -1).contiguous()

    def exact(self, voxels: Sequence[torch.Tensor], classes: torch.Tensor) -> torch.Tensor:
        """Logits of ``classes`` (k, n) at n target voxels, float64, as scipy and nnU-Net have them.

        Scipy's sum: each corner times its three weights one by one, x fastest. No two operations
        are one call, because a device would then not round in between.
        """
        start = classes * self.logits[0].numel()
        corners = [
            list(zip(axis.sources[:, cell], axis.weights[:, along], strict=True))
            for axis, cell, along in zip(self.axes, self.cells_of(voxels), voxels, strict=True)
        ]
        terms = (self._term(corner, start) for corner in itertools.product(*corners))
        return self._rounded(functools.reduce(operator.add, terms))

    def _term(
        self, corner: Sequence[tuple[torch.Tensor, torch.Tensor]], start: torch.Tensor
    ) -> torch.Tensor:
        """The logits of one corner times its weights; those of a class begin at ``start``."""
        (z, _), (y, _), (x, _) = corner
        height, width = self.logits.shape[2:]
        term = self.logits.view(-1)[start + ((z * height + y) * width + x)].double()
        for _, weight in corner:
            term = term * weight
        return term

    def _rounded(self, values: torch.Tensor) -> torch.Tensor:
        """``cells.rounded`` of all values."""
        import torch

        bits, lowest = self.rounding
        if bits == 52:
            return values
        exponent = ((values.view(torch.int64) >> 52) & 0x7FF) - 1023
        big = power_of_two(exponent.clamp_(lowest, 900) + (52 - bits)) * 1.5
        result = (values + big) - big
        if bits == 10:
            infinite = torch.full_like(values, torch.inf).copysign_(values)
            result = torch.where(result.abs() > 65504.0, infinite, result)
        return torch.where(values.isfinite() & (values != 0), result, values)


def power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """Return 2**exponent in float64, exactly, for int64 exponents of normal numbers."""
    import torch

    return ((exponent + 1023) << 52).view(torch.float64)


def batches(count: int, bytes_each: int) -> Iterator[slice]:
    """Split ``count`` cells or voxels into batches of bounded memory."""
    step = max(BYTES_AT_A_TIME // bytes_each, 1)
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))
