"""Nearest export on a CUDA device: all that the host gets is the labels of the target."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from totalfast.export.device_slab import batches
from totalfast.export.host_labels import signed
from totalfast.export.nearest import labels_at_source

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from numpy.typing import NDArray


def fill_nearest(
    out: NDArray[np.unsignedinteger],
    logits: torch.Tensor,
    indices: Sequence[NDArray[np.intp]],
    *,
    regions: Sequence[int] | None,
) -> None:
    """Fill ``out`` with the label of each target voxel's source voxel.

    The host waits for the device once, at the end.

    Parameters
    ----------
    out
        Unsigned integers, (z, y, x).
    logits
        (classes, z, y, x), on the device that does the work.
    indices
        Source index of each target voxel along z, y and x, ascending.
    regions
        Label of each channel of a region-based model; None takes the first maximum.
    """
    import torch

    host = signed(out)
    labels = torch.empty(logits.shape[1:], dtype=host.dtype, device=logits.device)
    channels = 1 if regions is None else len(regions)
    for part in batches(len(labels), 12 * channels * labels[0].numel()):
        labels[part] = labels_at_source(logits[:, part], regions)
    z, y, x = (torch.from_numpy(index.astype(np.int64)).to(labels.device) for index in indices)
    largest = max(host[0].numel(), labels[0].numel())
    for part in batches(len(host), 2 * largest * host.element_size()):
        first, last = indices[0][part][[0, -1]]
        slices = labels[first : last + 1].index_select(2, x).index_select(1, y)
        host[part].copy_(slices.index_select(0, z[part] - int(first)), non_blocking=True)
    if labels.device.type == "cuda":
        torch.cuda.current_stream(labels.device).synchronize()
