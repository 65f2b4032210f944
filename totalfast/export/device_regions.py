"""The regions of a slab on a device: ``cells.fill_regions`` for many cells at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from totalfast.export.device_slab import batches

if TYPE_CHECKING:
    import torch

    from totalfast.export.device_slab import DeviceSlab


def painted(
    slab: DeviceSlab, labels: torch.Tensor, threshold: float, dtype: torch.dtype
) -> torch.Tensor:
    """Labels at the target voxels of a slab, (z, y, x), on its device.

    Parameters
    ----------
    slab
        The logits and the cells.
    labels
        Label 0, then the label of each channel in the order of painting; on the device.
    threshold
        Smallest logit that is inside a region.
    dtype
        Of the result.

    Notes
    -----
    The last region that contains a voxel wins. So the largest number of a region is kept.
    """
    import torch

    # Infinity times a weight of 0 is NaN, which is outside of a region.
    inside = (slab.logits >= threshold) & slab.logits.isfinite()
    above = slab.on_cells(inside, torch.logical_and)
    below = slab.on_cells(slab.logits < threshold, torch.logical_and)
    number = torch.arange(1, len(slab.logits) + 1, device=slab.logits.device, dtype=torch.int32)
    winner = slab.on_target((above * number.view(-1, 1, 1, 1)).amax(0))
    channel, *cells = (~(above | below)).nonzero().t().contiguous()
    for part in batches(len(channel), slab.box_size() * 8 * 12):
        boxes = slab.boxes([at[part] for at in cells])
        shape = [*(len(along) for along in boxes), -1]
        *voxels, classes = (along.expand(shape).flatten() for along in (*boxes, channel[part]))
        reached = number[classes] * (slab.exact(voxels, classes[None])[0] >= threshold)
        winner.view(-1).scatter_reduce_(0, slab.offsets(voxels), reached, "amax")
    return labels[winner].to(dtype)
