"""Exactly the argmax of linearly resampled logits, without ever resampling all of them.

The result equals nnU-Net's export with ``order=1`` and ``order_z=0`` bit for bit: each class is
interpolated in float64 and in scipy.ndimage.zoom's order of operations, rounded to the logits'
own dtype, and the first maximum wins. It is fast because most classes need no interpolation. Linear
interpolation is a convex combination, so between eight neighbouring samples (a *cell*) class k can
only lose to class j

- if ``j < k`` and ``logit_j >= logit_k`` at all eight corners: rounding is monotonic, and a tie
  goes to the smaller label; or
- if ``logit_j - logit_k`` exceeds, at every corner, the spacing of the rounded dtype at the
  cell's largest magnitude of both, so that rounding can't make the two equal.

In most cells one class beats all others, and the cell is filled with it. ``CellExport`` does this
on the CPU, compiled by numba; ``DeviceExport`` does it on a CUDA device, in torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from totalfast.export.cell_export import CellExport
from totalfast.export.linear_base import LinearExport

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from numpy.typing import NDArray

    from totalfast.geometry import LinearWeights


def linear_export(
    axes: Sequence[LinearWeights],
    out: NDArray[np.unsignedinteger],
    *,
    rounded_to: str,
    regions: Sequence[int] | None,
    device: torch.device,
    threads: int,
) -> LinearExport:
    """Choose the export for logits on a device; for the parameters see ``LinearExport``.

    Logits of any device but CUDA are exported on the CPU, in ``threads`` parts at a time: MPS has
    no float64.
    """
    if device.type == "cuda":
        from totalfast.export.on_device import DeviceExport

        return DeviceExport(axes, out, rounded_to=rounded_to, regions=regions)
    return CellExport(axes, out, rounded_to=rounded_to, regions=regions, threads=threads)
