"""Host memory that labels are copied to from a device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from numpy.typing import NDArray


def empty_labels(
    shape: Sequence[int], dtype: type[np.unsignedinteger], device: torch.device
) -> NDArray[np.unsignedinteger]:
    """Memory for labels from ``device``: page-locked for CUDA, which copies faster to such memory.

    Where the system allows no more page-locked memory, it is ordinary memory.
    """
    import torch

    if device.type != "cuda":
        return np.empty(shape, dtype=dtype)
    size = np.dtype(dtype).itemsize
    try:
        memory = torch.empty((*shape, size), dtype=torch.uint8, pin_memory=True)
    except RuntimeError:
        return np.empty(shape, dtype=dtype)
    labels: NDArray[np.unsignedinteger] = memory.numpy().view(dtype)[..., 0]
    return labels


def signed(labels: NDArray[np.unsignedinteger]) -> torch.Tensor:
    """The same memory as a tensor of signed integers: torch has few operations for uint16.

    The bits of a label are the same in both.
    """
    import torch

    return torch.from_numpy(labels.view(f"i{labels.itemsize}"))
