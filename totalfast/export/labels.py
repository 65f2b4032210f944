"""Labels on a target grid from logits on a source grid."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from totalfast.errors import OptionError
from totalfast.export.methods import (
    METHODS,
    choose_method,
    resampling_axes,
    separate_axis,
)
from totalfast.export.nearest import (
    first_maximum,
    gather,
    label_dtype,
)
from totalfast.geometry import CENTERS, CORNERS, nearest_weights
from totalfast.system.cores import usable_cores

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    from numpy.typing import NDArray


SLICES_A_BATCH = 8
"""Source slices whose argmax is taken at a time."""


def export_labels(
    logits: torch.Tensor | NDArray[np.floating],
    shape: Sequence[int],
    *,
    method: str = "auto",
    coordinates: str = CENTERS,
    spacing: Sequence[float] | None = None,
    new_spacing: Sequence[float] | None = None,
    force_separate_z: bool | None = None,
    resampling: Callable[..., Any] | None = None,
    regions: Sequence[int] | None = None,
    labels: int | None = None,
    threads: int | None = None,
) -> NDArray[np.unsignedinteger]:
    """Labels of a target grid from the logits of a source grid.

    Parameters
    ----------
    logits
        float16, float32 or float64, (classes, z, y, x), on any device.
    shape
        Target (z, y, x); may be smaller or larger than the source along each axis.
    method
        "nearest": the argmax, then the nearest source voxel. "linear": the argmax of all logits
        resampled linearly, each rounded to the logits' dtype, as nnU-Net does it with order 1 and
        order_z 0. "plans": the argmax of the logits that ``resampling`` returns. "auto": the
        cheapest whose result equals upstream's (``choose_method``).
    coordinates
        "corners" if the image was resampled by scipy.ndimage.zoom (TotalSegmentator), "centers"
        if by nnU-Net or skimage (half-pixel centres).
    spacing, new_spacing
        mm along (z, y, x) of source and target. With "linear" and "centers" they decide whether
        the coarse axis is resampled separately, by nearest neighbour; "plans" hands them on.
    force_separate_z
        nnU-Net's option for "linear" where no ``resampling`` is given; None decides by the
        spacings.
    resampling
        nnU-Net's ``configuration.resampling_fn_probabilities``, for "plans" and "auto"; its
        options decide on the separate axis of "linear".
    regions
        For a region-based model, the label of each channel (``regions_class_order``).
    labels
        Number of foreground labels, if that is not the number of channels less one; from 255 on
        the result is uint16.
    threads
        Default: the cores that this process may use.

    Returns
    -------
        uint8 or uint16, (z, y, x), on the CPU.

    Raises
    ------
    OptionError
        If an argument is not as described.

    Notes
    -----
    Of equal logits the smaller label wins; NaN wins over numbers, as in torch's argmax.
    """
    import torch

    tensor = torch.as_tensor(logits)
    if tensor.ndim != 4 or 0 in tensor.shape:
        raise OptionError(f"logits must be (classes, z, y, x), not {tuple(tensor.shape)}.")
    shape = tuple(int(n) for n in shape)
    if len(shape) != 3 or min(shape) < 0:
        raise OptionError(f"shape must be three sizes (z, y, x), not {shape}.")
    if coordinates not in (CORNERS, CENTERS):
        raise OptionError(f"coordinates must be 'corners' or 'centers', not '{coordinates}'.")
    if method == "auto":
        method = choose_method(resampling, coordinates=coordinates)
    if regions is not None and len(regions) != tensor.shape[0]:
        raise OptionError(f"{len(regions)} regions do not fit {tensor.shape[0]} channels.")
    threads = threads or usable_cores()
    dtype = label_dtype(tensor.shape[0] - 1 if labels is None else labels)
    out = np.empty(shape, dtype=dtype)
    if out.size == 0:
        return out

    source = tuple(tensor.shape[1:])
    if method == "nearest" or (method != "plans" and source == shape):
        found = argmax(tensor, dtype=dtype, regions=regions)
        axes = [
            nearest_weights(n, m, coordinates).lower for n, m in zip(source, shape, strict=True)
        ]
        return found if source == shape else gather(found, axes, threads=threads)
    if method == "linear":
        from totalfast.export.linear import linear_export

        separate = None
        if coordinates == CENTERS:
            separate = separate_axis(
                spacing, new_spacing, resampling=resampling, force_separate_z=force_separate_z
            )
        linear = linear_export(
            resampling_axes(source, shape, coordinates, separate),
            out,
            rounded_to=str(tensor.dtype).removeprefix("torch."),
            regions=regions,
            device=tensor.device,
            threads=threads,
        )
        for start in range(0, source[0], SLICES_A_BATCH):
            linear.add(start, tensor[:, start : start + SLICES_A_BATCH])
        return out
    if method == "plans":
        from totalfast.export.plans import resampled_maximum

        if resampling is None:
            raise OptionError("method 'plans' needs the plans' resampling function.")
        best = resampled_maximum(
            tensor.cpu(),
            shape,
            lambda channel: resampling(channel, shape, spacing, new_spacing),
            threads=threads,
            regions=regions,
        )
        return best.astype(dtype, copy=False)
    raise OptionError(f"method must be one of {', '.join(METHODS)}, not '{method}'.")


def argmax(
    logits: torch.Tensor, *, dtype: type[np.unsignedinteger], regions: Sequence[int] | None
) -> NDArray[np.unsignedinteger]:
    """Labels at the logits' own resolution, (z, y, x), on the CPU."""
    import torch

    found = np.zeros(tuple(logits.shape[1:]), dtype=dtype)
    for start in range(0, logits.shape[1], SLICES_A_BATCH):
        slab = logits[:, start : start + SLICES_A_BATCH]
        part = found[start : start + SLICES_A_BATCH]
        if regions is None:
            part[...] = first_maximum(slab).cpu().numpy()
            continue
        inside = (torch.sigmoid(slab.float()) > 0.5).cpu().numpy()
        for label, mask in zip(regions, inside, strict=True):
            part[mask] = label
    return found
