"""Labels on a target grid from logits on a source grid."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from totalfast.errors import OptionError
from totalfast.export.host_labels import empty_labels
from totalfast.export.methods import METHODS, choose_method, resampling_axes, separate_axis
from totalfast.export.nearest import gather, label_dtype, labels_at_source
from totalfast.geometry import CENTERS, CORNERS, nearest_weights
from totalfast.system.cores import usable_cores

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    from numpy.typing import NDArray

    from totalfast.geometry import LinearWeights

SLICES_PER_BATCH = 8
"""Source slices whose labels are computed at a time on the CPU: a fit for its cache."""


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
        Target (z, y, x); smaller or larger than the source along each axis.
    method
        "nearest": the argmax, then the nearest source voxel. "linear": the argmax of all logits
        resampled linearly, each rounded to the logits' dtype, as nnU-Net does with order 1 and
        order_z 0. "plans": the argmax of the logits that ``resampling`` returns. "auto": the
        cheapest whose result equals upstream's (``choose_method``).
    coordinates
        "corners" if the image was resampled by scipy.ndimage.zoom (TotalSegmentator), "centers"
        if by nnU-Net or skimage (half-pixel centres).
    spacing, new_spacing
        mm along (z, y, x) of source and target. With "linear" and "centers" they decide whether
        the coarse axis is resampled separately, by nearest neighbour. "plans" passes them to
        ``resampling``.
    force_separate_z
        nnU-Net's option for "linear" where no ``resampling`` is given; None decides by the
        spacings.
    resampling
        nnU-Net's ``configuration.resampling_fn_probabilities``, for "plans" and "auto"; its
        options decide on the separate axis of "linear".
    regions
        For a region-based model, the label of each channel (``regions_class_order``).
    labels
        Number of foreground labels, if it is not the number of channels minus one. From 255 on
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
    shape = tuple(int(n) for n in shape)
    _check(tensor, shape, coordinates=coordinates, regions=regions)
    if method == "auto":
        method = choose_method(resampling, coordinates=coordinates)
    threads = threads or usable_cores()
    dtype = label_dtype(tensor.shape[0] - 1 if labels is None else labels)
    source = tuple(tensor.shape[1:])
    if 0 in shape:
        return np.empty(shape, dtype=dtype)
    if method == "nearest" or (method != "plans" and source == shape):
        axes = [
            nearest_weights(n, m, coordinates).lower for n, m in zip(source, shape, strict=True)
        ]
        if tensor.device.type == "cuda":
            return _nearest_on_device(tensor, axes, dtype=dtype, regions=regions)
        nearest = argmax(tensor, dtype=dtype, regions=regions)
        return nearest if source == shape else gather(nearest, axes, threads=threads)
    if method == "linear":
        separate = None
        if coordinates == CENTERS:
            separate = separate_axis(
                spacing, new_spacing, resampling=resampling, force_separate_z=force_separate_z
            )
        out = empty_labels(shape, dtype, tensor.device)
        linear_axes = resampling_axes(source, shape, coordinates, separate)
        _fill_linear(out, tensor, linear_axes, regions=regions, threads=threads)
        return out
    if method != "plans":
        raise OptionError(f"method must be one of {', '.join(METHODS)}, not '{method}'.")
    if resampling is None:
        raise OptionError("method 'plans' needs the plans' resampling function.")
    from totalfast.export.plans import resampled_maximum

    best = resampled_maximum(
        tensor.cpu(),
        shape,
        lambda channel: resampling(channel, shape, spacing, new_spacing),
        threads=threads,
        regions=regions,
    )
    return best.astype(dtype, copy=False)


def _check(
    logits: torch.Tensor,
    shape: tuple[int, ...],
    *,
    coordinates: str,
    regions: Sequence[int] | None,
) -> None:
    if logits.ndim != 4 or 0 in logits.shape:
        raise OptionError(f"logits must be (classes, z, y, x), not {tuple(logits.shape)}.")
    if len(shape) != 3 or min(shape) < 0:
        raise OptionError(f"shape must be three sizes (z, y, x), not {shape}.")
    if coordinates not in (CORNERS, CENTERS):
        raise OptionError(f"coordinates must be 'corners' or 'centers', not '{coordinates}'.")
    if regions is not None and len(regions) != logits.shape[0]:
        raise OptionError(f"{len(regions)} regions do not fit {logits.shape[0]} channels.")


def _fill_linear(
    out: NDArray[np.unsignedinteger],
    logits: torch.Tensor,
    axes: Sequence[LinearWeights],
    *,
    regions: Sequence[int] | None,
    threads: int,
) -> None:
    from totalfast.export.linear import linear_export

    with linear_export(
        axes,
        out,
        rounded_to=str(logits.dtype).removeprefix("torch."),
        regions=regions,
        device=logits.device,
        threads=threads,
    ) as export:
        export.add(0, logits)


def _nearest_on_device(
    logits: torch.Tensor,
    axes: Sequence[NDArray[np.intp]],
    *,
    dtype: type[np.unsignedinteger],
    regions: Sequence[int] | None,
) -> NDArray[np.unsignedinteger]:
    from totalfast.export.nearest_on_device import fill_nearest

    out = empty_labels([len(axis) for axis in axes], dtype, logits.device)
    fill_nearest(out, logits, axes, regions=regions)
    return out


def argmax(
    logits: torch.Tensor, *, dtype: type[np.unsignedinteger], regions: Sequence[int] | None
) -> NDArray[np.unsignedinteger]:
    """Labels at the logits' own resolution, (z, y, x), on the CPU."""
    labels = np.zeros(tuple(logits.shape[1:]), dtype=dtype)
    for start in range(0, logits.shape[1], SLICES_PER_BATCH):
        slab = logits[:, start : start + SLICES_PER_BATCH]
        part = labels[start : start + SLICES_PER_BATCH]
        part[...] = labels_at_source(slab, regions).cpu().numpy()
    return labels
