"""Host memory that a device copies to."""

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
    """Memory for labels from ``device``; page-locked for CUDA."""
    import torch

    if device.type != "cuda":
        return np.empty(shape, dtype=dtype)
    memory = page_locked((*shape, np.dtype(dtype).itemsize), torch.uint8)
    labels: NDArray[np.unsignedinteger] = memory.numpy().view(dtype)[..., 0]
    return labels


def page_locked(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Memory that a CUDA device copies to faster, and while the host goes on.

    Where the system allows no more of it, it is ordinary memory, and the host waits for each copy.
    """
    import torch

    try:
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)
    except RuntimeError:
        return torch.zeros(tuple(shape), dtype=dtype)


def signed(labels: NDArray[np.unsignedinteger]) -> torch.Tensor:
    """The same memory as a tensor of signed integers: torch has few operations for uint16.

    The bits of a label are the same in both.
    """
    import torch

    return torch.from_numpy(labels.view(f"i{labels.itemsize}"))
