"""Linear export that interpolates all classes, in torch, for CUDA devices.

The arithmetic is that of ``cells``, operation by operation, so the result is equal.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np

from totalfast.export.linear_base import LinearExport

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch
    from numpy.typing import NDArray

    from totalfast.geometry import LinearWeights

CLASSES_AT_A_TIME = 8
"""Classes per batch: its memory is small compared with a network's activations."""


class DeviceExport(LinearExport):
    """Interpolates every class on the device of the logits, which must support float64."""

    def __init__(
        self,
        axes: Sequence[LinearWeights],
        out: NDArray[np.unsignedinteger],
        *,
        rounded_to: str,
        regions: Sequence[int] | None = None,
    ) -> None:
        super().__init__(axes, out, rounded_to=rounded_to, regions=regions)
        self._planes: dict[int, torch.Tensor] = {}
        """The last two slices."""
        self._in_plane: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
        """Corners along y and x, on the device."""

    def __exit__(self, *_: object) -> None:
        """There are no threads to end."""

    def _take(self, index: int, logits: torch.Tensor) -> None:
        if not self._in_plane:
            self._in_plane = [_corners(self._axes[k], k, logits.device) for k in (1, 2)]
        # A copy, because the sliding window reuses the memory of ``logits``.
        self._planes = {k: plane for k, plane in self._planes.items() if k == index - 1}
        self._planes[index] = logits.clone()

    def _fill(self, rows: list[int], lower: int, upper: int) -> None:
        import torch

        planes = self._planes
        shape = (len(rows), *self._out.shape[1:])
        device = planes[lower].device
        labels = torch.zeros(shape, dtype=torch.int32, device=device)
        best: torch.Tensor | None = None
        for k, value in enumerate(self._interpolated(planes[lower], planes[upper], rows)):
            if self._regions is not None:
                labels.masked_fill_(value >= self._threshold, int(self._regions[k]))
            elif best is None:
                best = value
            else:
                # The first of equals wins, and the first NaN over all.
                ahead = (value > best) | (value.isnan() & ~best.isnan())
                labels.masked_fill_(ahead, k)
                best = torch.where(ahead, value, best)
        self._out[rows[0] : rows[-1] + 1] = labels.cpu().numpy().astype(self._out.dtype)

    def _interpolated(
        self, lower: torch.Tensor, upper: torch.Tensor, rows: list[int]
    ) -> Iterator[torch.Tensor]:
        """Each class at the target voxels of some slices, float64 (slices, y, x), rounded.

        Scipy's sum: each corner times its three weights one by one, x fastest.
        """
        axes = [_corners(self._axes[0], 0, lower.device, rows), *self._in_plane]
        for start in range(0, len(lower), CLASSES_AT_A_TIME):
            stop = start + CLASSES_AT_A_TIME
            total: torch.Tensor | None = None
            for plane, (_, weight_z) in zip((lower, upper), axes[0], strict=False):
                for (y, weight_y), (x, weight_x) in itertools.product(*axes[1:]):
                    corner = plane[start:stop].index_select(1, y).index_select(2, x)
                    term = corner.double()[:, None]
                    for corners, weight in zip(axes, (weight_z, weight_y, weight_x), strict=True):
                        if len(corners) == 2:
                            term = term * weight
                    total = term if total is None else total + term
            if total is not None:
                yield from self._rounded(total.expand(-1, len(rows), -1, -1))

    def _rounded(self, values: torch.Tensor) -> torch.Tensor:
        """``cells.rounded`` of all values."""
        import torch

        if self._bits == 52:
            return values
        exponent = ((values.contiguous().view(torch.int64) >> 52) & 0x7FF) - 1023
        exponent = exponent.clamp(self._low, 900)
        big = ((exponent + (52 - self._bits + 1023)) << 52).view(torch.float64) * 1.5
        result = (values + big) - big
        if self._bits == 10:
            infinite = torch.copysign(torch.full_like(values, torch.inf), values)
            result = torch.where(result.abs() > 65504.0, infinite, result)
        return torch.where(values.isfinite() & (values != 0), result, values)


def _corners(
    axis: LinearWeights, number: int, device: torch.device, rows: list[int] | None = None
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Index and weight of one or both neighbours along an axis of a (z, y, x) grid.

    Of all target voxels or of some ``rows``; the weights are shaped to multiply a volume.
    """
    import torch

    part = slice(None) if rows is None else rows
    shape = [-1 if number == k else 1 for k in range(3)]
    both = [(axis.lower, axis.lower_weight), (axis.upper, axis.upper_weight)]
    return [
        (
            torch.from_numpy(index[part].astype(np.int64)).to(device),
            torch.from_numpy(weight[part]).to(device).reshape(shape),
        )
        for index, weight in both[: axis.corners]
    ]
