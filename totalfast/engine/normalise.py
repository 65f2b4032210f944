"""Prepare the model image for one model: crop to nonzero voxels, normalise, resample if needed.

Equals nnU-Net's DefaultPreprocessor.run_case_npy (2.8.1), but fills holes only for models that
normalise inside a mask, because filled holes do not change the box.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from totalfast.errors import InputError
from totalfast.export import is_default_resampling, separate_axis
from totalfast.geometry import CENTERS, nearest_indices
from totalfast.system.cores import usable_cores

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import TypeAlias

    import torch
    from numpy.typing import NDArray

    from totalfast.models.model import Model

    Untyped: TypeAlias = Any
    """nnU-Net's classes, which have no types."""


CUBIC = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkImage:
    """The input of a network: cropped, normalised and resampled.

    All axes are in the order of the plans' ``transpose_forward``.

    Parameters
    ----------
    voxels
        float32, (channels, z, y, x), C order; perhaps on a CUDA device.
    box
        Its box in the model image.
    cropped_shape
        Shape of that box, before nnU-Net's own resampling.
    full_shape
        Shape of the model image.
    spacing_mm
        Spacing of the model image.
    network_spacing_mm
        Spacing of ``voxels`` according to nnU-Net: the plans' spacing, without the effect of
        rounding to whole voxels.
    """

    voxels: torch.Tensor
    box: tuple[slice, slice, slice]
    cropped_shape: tuple[int, ...]
    full_shape: tuple[int, ...]
    spacing_mm: tuple[float, ...]
    network_spacing_mm: tuple[float, ...]

    @property
    def was_resampled(self) -> bool:
        """Whether resampling to the plans' spacing changed the shape."""
        return tuple(self.voxels.shape[1:]) != self.cropped_shape


def nonzero_box(voxels: NDArray[np.float32]) -> tuple[slice, slice, slice]:
    """Smallest box around all nonzero voxels of (channels, z, y, x); the whole image if none is."""
    box = []
    for axis in range(1, 4):
        others = tuple(other for other in range(4) if other != axis)
        used = np.flatnonzero(np.any(voxels, axis=others))
        if used.size == 0:
            _, z, y, x = voxels.shape
            return (slice(0, z), slice(0, y), slice(0, x))
        box.append(slice(int(used[0]), int(used[-1]) + 1))
    return (box[0], box[1], box[2])


def to_network_image(
    voxels: NDArray[np.float32], *, spacing_mm: Sequence[float], model: Model
) -> NetworkImage:
    """Crop, normalise and, if the plans have another spacing, resample.

    Parameters
    ----------
    voxels
        (channels, z, y, x), model grid; not changed.
    spacing_mm
        Spacing along (z, y, x).
    model
        A loaded model; its plans define all steps.

    Raises
    ------
    InputError
        If the model needs another number of channels, or the image is too thin for its spacing.
    """
    import torch

    forward = list(model.plans.transpose_forward)
    spacing = [float(spacing_mm[axis]) for axis in forward]
    # The last bits of nnU-Net's mean and standard deviation depend on the memory layout, because
    # numpy sums in another order over a contiguous copy. So normalise a view of a C-ordered array.
    image = np.array(voxels, dtype=np.float32, order="C")
    image = image.transpose([0, *(axis + 1 for axis in forward)])
    box = nonzero_box(image)
    cropped = image[:, box[0], box[1], box[2]]
    _normalise(cropped, model)
    cropped_shape = cropped.shape[1:]
    resampled, target = network_shape(cropped_shape, spacing, model)
    if resampled != cropped_shape:
        resampling = model.configuration.resampling_fn_data
        if is_default_resampling(resampling, order=CUBIC) and np.isfinite(cropped.sum()):
            separate = separate_axis(spacing, target, resampling=resampling)
            cropped = resample_image(cropped, resampled, separate)
        else:
            cropped = np.asarray(resampling(cropped, resampled, spacing, target))
    return NetworkImage(
        voxels=torch.from_numpy(np.ascontiguousarray(cropped, dtype=np.float32)),
        box=box,
        cropped_shape=cropped_shape,
        full_shape=image.shape[1:],
        spacing_mm=tuple(spacing),
        network_spacing_mm=tuple(target),
    )


def resample_image(
    image: NDArray[np.float32], shape: tuple[int, ...], separate: int | None
) -> NDArray[np.float32]:
    """Resample (channels, z, y, x) like nnU-Net with order 3 and order_z 0, with identical bits.

    nnU-Net uses skimage.transform.resize with mode="edge", clipped to the range of the image. With
    a ``separate`` axis it resizes and clips each slice along that axis separately, and takes the
    nearest slices (nnU-Net 2.8.1, default_resampling.py). All values must be finite.
    """
    from totalfast.resampling.cubic import cubic_axis, nearest_axis, resample_cubic

    out = np.empty((len(image), *shape), dtype=np.float32)
    first = 0 if separate is None else separate
    for source, target in zip(image, out, strict=True):
        planes, result = np.moveaxis(source, first, 0), np.moveaxis(target, first, 0)
        axes = [cubic_axis(n, m, CENTERS) for n, m in zip(planes.shape, result.shape, strict=True)]
        bounds = np.array([[source.min()], [source.max()]]).repeat(len(result), axis=1)
        if separate is not None:
            axes[0] = nearest_axis(len(planes), len(result), CENTERS)
            picked = nearest_indices(len(planes), len(result), CENTERS)
            bounds = np.stack([planes.min(axis=(1, 2)), planes.max(axis=(1, 2))])[:, picked]

        def read(j: int, part: slice, planes: NDArray[np.float32] = planes) -> NDArray[np.float32]:
            return planes[part, j]

        def write(
            part: slice, values: NDArray[np.float64], result: NDArray[np.float32] = result
        ) -> None:
            result[part] = values

        low, high = bounds.astype(np.float64)
        resample_cubic(read, planes.shape, axes, write, bounds=(low, high), threads=usable_cores())
    return out


def _normalise(image: NDArray[np.float32], model: Model) -> None:
    """Normalise each channel in place."""
    configuration = model.configuration
    schemes = configuration.normalization_schemes
    if len(schemes) != len(image):
        raise InputError(f"{model.folder} needs {len(schemes)} input channels, not {len(image)}.")
    mask = None
    if any(configuration.use_mask_for_norm):
        from scipy.ndimage import binary_fill_holes

        inside = binary_fill_holes((image != 0).any(axis=0))
        mask = np.where(inside, np.int8(0), np.int8(-1))
    for number, (channel, name, use_mask) in enumerate(
        zip(image, schemes, configuration.use_mask_for_norm, strict=True)
    ):
        properties = model.plans.foreground_intensity_properties_per_channel[str(number)]
        scheme = _normalization_class(name)(
            use_mask_for_norm=use_mask, intensityproperties=properties
        )
        channel[...] = scheme.run(channel, mask)


def pointwise_schemes(model: Model) -> list[Callable[[torch.Tensor], None]] | None:
    """Return what normalises each channel in place, on any device, with nnU-Net's bits.

    None if a channel's normalisation looks at more than one voxel, or is unknown. The bits are the
    same because each operation is one rounded float32 operation in both numpy and torch.
    """
    from nnunetv2.preprocessing.normalization import default_normalization_schemes as known

    configuration = model.configuration
    if any(configuration.use_mask_for_norm):
        return None
    schemes: list[Callable[[torch.Tensor], None]] = []
    for number, name in enumerate(configuration.normalization_schemes):
        scheme = _normalization_class(name)
        if scheme is known.CTNormalization:
            properties = model.plans.foreground_intensity_properties_per_channel[str(number)]
            schemes.append(partial(_normalise_ct, properties=properties))
        elif scheme is known.NoNormalization:
            schemes.append(_leave)
        else:
            return None
    return schemes


def _normalise_ct(channel: torch.Tensor, *, properties: Mapping[str, float]) -> None:
    """nnU-Net's CTNormalization (2.8.1)."""
    import torch

    channel.clamp_(properties["percentile_00_5"], properties["percentile_99_5"])
    channel.sub_(properties["mean"])
    # By a tensor: CUDA multiplies by the reciprocal of a number, which has other last bits.
    channel.div_(torch.full((), max(properties["std"], 1e-8), device=channel.device))


def _leave(channel: torch.Tensor) -> None:
    """nnU-Net's NoNormalization."""


def _normalization_class(name: str) -> Untyped:
    """Look up a normalisation scheme, first in nnU-Net's main module, then in its whole package."""
    import nnunetv2
    from nnunetv2.preprocessing.normalization import default_normalization_schemes

    scheme = getattr(default_normalization_schemes, name, None)
    if scheme is None:
        from pathlib import Path

        from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

        folder = Path(nnunetv2.__path__[0]) / "preprocessing" / "normalization"
        scheme = recursive_find_python_class(
            str(folder), name, "nnunetv2.preprocessing.normalization"
        )
    if scheme is None:
        raise ValueError(f"nnU-Net has no normalisation scheme named {name}")
    return scheme


def network_shape(
    shape: tuple[int, ...], spacing: Sequence[float], model: Model
) -> tuple[tuple[int, ...], list[float]]:
    """Shape at the plans' spacing, and this spacing (default_resampling.py).

    Raises
    ------
    InputError
        If the image is thinner than half a voxel of the plans.
    """
    target = [float(mm) for mm in model.configuration.spacing]
    if len(target) < len(shape):
        target = [float(spacing[0]), *target]
    sizes = tuple(
        int(round(own / new * size)) for own, new, size in zip(spacing, target, shape, strict=True)
    )
    if min(sizes) < 1:
        raise InputError(
            f"the image has {shape} voxels of {tuple(spacing)} mm; at the spacing of "
            f"{model.folder}, {tuple(target)} mm, none remain along one axis."
        )
    return sizes, target
