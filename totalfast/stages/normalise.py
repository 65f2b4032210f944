"""Prepare the model image for one model: crop to what is not zero, normalise, resample if needed.

Knows intensities and nnU-Net's plans; knows nothing of networks. Equals nnU-Net's
DefaultPreprocessor.run_case_npy (2.8.1) without its hole filling, which changes no box and is
needed only where a model normalises inside a mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from totalfast.weights import Model


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkImage:
    """What the network is run on.

    Parameters
    ----------
    voxels
        float32, (1, z, y, x) in the order of the plans' ``transpose_forward``, C order.
    box
        Where it lies in the (transposed) model image.
    cropped_shape
        Shape of that box, before nnU-Net's own resampling.
    full_shape
        Shape of the (transposed) model image.
    spacing_mm
        Spacing of the model image, in the same axis order.
    network_spacing_mm
        What nnU-Net takes the spacing of ``voxels`` for: the plans', whatever rounding made of it.
    """

    voxels: NDArray[np.float32]
    box: tuple[slice, slice, slice]
    cropped_shape: tuple[int, ...]
    full_shape: tuple[int, ...]
    spacing_mm: tuple[float, ...]
    network_spacing_mm: tuple[float, ...]

    @property
    def was_resampled(self) -> bool:
        """Whether nnU-Net's plans asked for another shape than the model image's."""
        return self.voxels.shape[1:] != self.cropped_shape


def nonzero_box(voxels: NDArray[np.float32]) -> tuple[slice, slice, slice]:
    """Smallest box around all voxels that are not 0; the whole image if all are."""
    box = []
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        used = np.flatnonzero(np.any(voxels, axis=others))
        if used.size == 0:
            return (slice(0, voxels.shape[0]), slice(0, voxels.shape[1]), slice(0, voxels.shape[2]))
        box.append(slice(int(used[0]), int(used[-1]) + 1))
    return (box[0], box[1], box[2])


def to_network_image(
    voxels: NDArray[np.float32], *, spacing_mm: Sequence[float], model: Model
) -> NetworkImage:
    """Crop, normalise and, where the plans' spacing asks for it, resample.

    Parameters
    ----------
    voxels
        float32, (z, y, x), model grid; not changed.
    spacing_mm
        Spacing along (z, y, x).
    model
        Whose plans say how.
    """
    forward = list(model.plans.transpose_forward)
    spacing = [float(spacing_mm[axis]) for axis in forward]
    # nnU-Net's mean and standard deviation depend on the memory layout: numpy sums in another
    # order over a contiguous copy. So normalise a view of a C-ordered array, as it does.
    image = np.array(voxels, dtype=np.float32, order="C").transpose(forward)
    box = nonzero_box(image)
    view = image[box]
    _normalise(view, model)
    network_shape, target = _network_shape(view.shape, spacing, model)
    cropped = view[None]
    if network_shape != view.shape:
        cropped = np.asarray(
            model.configuration.resampling_fn_data(cropped, network_shape, spacing, target)
        )
    return NetworkImage(
        voxels=np.ascontiguousarray(cropped, dtype=np.float32),
        box=box,
        cropped_shape=view.shape,
        full_shape=image.shape,
        spacing_mm=tuple(spacing),
        network_spacing_mm=tuple(target),
    )


def _normalise(view: NDArray[np.float32], model: Model) -> None:
    configuration = model.configuration
    schemes = configuration.normalization_schemes
    if len(schemes) != 1:
        raise ValueError(f"{model.folder} wants {len(schemes)} input channels; one image was given")
    use_mask = configuration.use_mask_for_norm[0]
    properties = model.plans.foreground_intensity_properties_per_channel["0"]
    scheme = _normalization_class(schemes[0])(
        use_mask_for_norm=use_mask, intensityproperties=properties
    )
    mask = None
    if use_mask:
        from scipy.ndimage import binary_fill_holes

        mask = np.where(binary_fill_holes(view != 0), np.int8(0), np.int8(-1))
    view[...] = scheme.run(view, mask)


def _normalization_class(name: str) -> Any:  # noqa: ANN401 - nnU-Net is untyped
    """Look up a normalisation scheme as nnU-Net does; its own module is tried first."""
    import nnunetv2
    from nnunetv2.preprocessing.normalization import default_normalization_schemes

    found = getattr(default_normalization_schemes, name, None)
    if found is None:
        from pathlib import Path

        from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

        folder = Path(nnunetv2.__path__[0]) / "preprocessing" / "normalization"
        found = recursive_find_python_class(
            str(folder), name, "nnunetv2.preprocessing.normalization"
        )
    if found is None:
        raise ValueError(f"nnU-Net has no normalisation scheme named {name}")
    return found


def _network_shape(
    shape: tuple[int, ...], spacing: Sequence[float], model: Model
) -> tuple[tuple[int, ...], list[float]]:
    """Shape that the plans' spacing gives, and that spacing (default_resampling.py)."""
    target = [float(mm) for mm in model.configuration.spacing]
    if len(target) < len(shape):
        target = [float(spacing[0]), *target]
    sizes = tuple(
        int(round(own / wanted * size))
        for own, wanted, size in zip(spacing, target, shape, strict=True)
    )
    return sizes, target
