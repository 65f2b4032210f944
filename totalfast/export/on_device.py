"""Linear export on a CUDA device, in torch operations on all source slices of a slab at a time.

The labels are those of ``CellExport``. A slab is worked on in parts of bounded memory. Per part the
host waits for the device at most four times, however many slices it has: for the number of cells
that no label fills, for the number of cells per number of candidates, and for the two numbers of
target voxels to compare exactly. The labels are copied once per part; the host waits for the copy
only if ``out`` is not page-locked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from totalfast.export.host_labels import signed
from totalfast.export.linear_base import LinearExport, runs

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch
    from numpy.typing import NDArray

    from totalfast.export.device_slab import DeviceAxis
    from totalfast.geometry import LinearWeights

SOURCE_BYTES = 2**27
"""Logits of one part; a part has at least one layer of cells."""
TARGET_VOXELS = 2**25
"""Target voxels of one part: two bytes each on the device, for the label and a mark."""


class DeviceExport(LinearExport):
    """Compares only the classes that can win in a cell, on the device of the logits.

    The device must support float64. The logits' dtype must not be less exact than ``rounded_to``.
    """

    def __init__(
        self,
        axes: Sequence[LinearWeights],
        out: NDArray[np.unsignedinteger],
        *,
        rounded_to: str,
        regions: Sequence[int] | None = None,
    ) -> None:
        super().__init__(axes, out, rounded_to=rounded_to, regions=regions)
        self._runs = [runs(axis) for axis in axes]
        self._completed_by = self._runs[0][:, 2:].max(axis=1)
        """The last source slice of each layer of cells."""
        self._on_device: tuple[DeviceAxis, ...] = ()
        self._region_labels: torch.Tensor | None = None
        self._last: torch.Tensor | None = None
        """The last slice of the slab before, (classes, 1, y, x)."""

    def __exit__(self, *_: object) -> None:
        """Wait until the last labels are in ``out``."""
        import torch

        if self._last is not None and self._last.device.type == "cuda":
            torch.cuda.current_stream(self._last.device).synchronize()

    def add(self, first: int, slab: torch.Tensor) -> None:
        """Take slices; see ``LinearExport``. The layers of cells that they complete are filled."""
        import torch

        from totalfast.export.device_slab import DeviceAxis

        if self._out.size == 0:
            return
        if not self._on_device:
            self._on_device = tuple(
                DeviceAxis.of(axis, cells, slab.device)
                for axis, cells in zip(self._axes, self._runs, strict=True)
            )
            if self._regions is not None:
                labels = torch.from_numpy(np.append(0, self._regions).astype(np.int64))
                self._region_labels = labels.to(slab.device)
        for layers in self._parts(first, slab):
            lower = int(self._runs[0][layers.start, 2])
            upper = int(self._completed_by[layers.stop - 1])
            logits = slab[:, max(lower - first, 0) : upper - first + 1]
            if lower < first and self._last is not None:
                logits = torch.cat([self._last, logits], dim=1)
            self._fill(layers, lower, logits.contiguous())
        self._last = slab[:, -1:].clone()

    def _parts(self, first: int, slab: torch.Tensor) -> Iterator[slice]:
        """Layers of cells that a slab completes, as many at a time as memory allows."""
        start, stop = np.searchsorted(self._completed_by, [first, first + slab.shape[1]])
        slice_bytes = slab[:, 0].numel() * slab.element_size()
        row_voxels = self._out[0].size
        first_row, stop_row, lower, _ = self._runs[0].T
        while start < stop:
            size = slice_bytes * (self._completed_by[start:stop] - lower[start] + 1)
            voxels = row_voxels * (stop_row[start:stop] - first_row[start])
            fitting = np.count_nonzero((size <= SOURCE_BYTES) & (voxels <= TARGET_VOXELS))
            yield slice(int(start), int(start + max(fitting, 1)))
            start += max(fitting, 1)

    def _fill(self, layers: slice, first_source: int, logits: torch.Tensor) -> None:
        from totalfast.export.device_labels import winners
        from totalfast.export.device_regions import painted
        from totalfast.export.device_slab import DeviceSlab

        z, y, x = self._on_device
        rows = slice(int(self._runs[0][layers.start, 0]), int(self._runs[0][layers.stop - 1, 1]))
        axes = z.part(layers, rows, first_source), y, x
        part = DeviceSlab(logits=logits, axes=axes, rounding=self._rounding)
        out = signed(self._out[rows])
        if self._region_labels is None:
            labels = winners(part, out.dtype)
        else:
            labels = painted(part, self._region_labels, self._threshold, out.dtype)
        out.copy_(labels, non_blocking=True)
