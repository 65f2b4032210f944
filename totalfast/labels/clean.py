"""Clean-up of label maps on the model grid, and the mask of the skin.

The rules are those of TotalSegmentator 2.18.0, postprocessing.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from totalfast.labels.blobs import label_blobs
from totalfast.labels.boxes import label_boxes
from totalfast.upstream import CLASS_MAPS

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from numpy.typing import NDArray

    from totalfast.scan import ScannerImage

BODY_EXTREMITY_MINIMUM_MM3 = 50_000.0
"""Blobs of body_extremities up to this volume are removed."""

SKIN_HU = (-200.0, 250.0)
"""Intensities of skin; the bounds are exclusive."""

SKIN_EROSIONS = 3
"""Depth of the skin in voxels, from the surface of the body dilated by one voxel."""

SKIN_MINIMUM_VOXELS = 5
"""Blobs of skin of up to this many voxels are removed."""

SKIN_SLAB = 64
"""Slices per slab in which the skin is computed."""


def clean_labels(
    labels: NDArray[np.uint8],
    *,
    task: str,
    classes: Mapping[int, str],
    voxel_mm3: np.floating[Any],
) -> NDArray[np.uint8]:
    """Apply upstream's clean-up of a task: blobs of ``body``, auxiliary labels.

    Parameters
    ----------
    labels
        uint8, any axis order, model grid; not changed.
    task
        Task name.
    classes
        Label to class name.
    voxel_mm3
        Volume of a voxel, float32 as in upstream.
    """
    auxiliary = list(CLASS_MAPS.get(f"{task}_auxiliary", ()))
    if auxiliary:
        kept = np.arange(256, dtype=np.uint8)
        kept[auxiliary] = 0
        return kept[labels]
    if task != "body":
        return labels
    label_of = {name: label for label, name in classes.items()}
    limit = BODY_EXTREMITY_MINIMUM_MM3 / voxel_mm3
    rules = {label_of["body_trunc"]: _largest, label_of["body_extremities"]: _above(limit)}
    return _keep_blobs(labels, rules)


def remove_small_blobs(
    labels: NDArray[np.uint8],
    classes: Collection[int],
    *,
    up_to_mm3: float,
    voxel_mm3: np.floating[Any],
) -> NDArray[np.uint8]:
    """Return labels without the small blobs of some classes.

    Parameters
    ----------
    labels
        uint8, any axis order, model grid; not changed.
    classes
        Labels of the classes; a blob of another label stays.
    up_to_mm3
        The largest volume that is removed.
    voxel_mm3
        Volume of a voxel, float32 as in upstream: its rounding changes the limit.
    """
    return _keep_blobs(labels, dict.fromkeys(classes, _above(up_to_mm3 / voxel_mm3)))


Rule = Callable[["NDArray[np.intp]"], "NDArray[np.bool_]"]
"""Which blobs are kept, given the sizes of all; index 0 is not a blob."""


def _largest(sizes: NDArray[np.intp]) -> NDArray[np.bool_]:
    kept: NDArray[np.bool_] = np.arange(len(sizes)) == 1 + np.argmax(sizes[1:])
    return kept


def _above(limit: np.floating[Any]) -> Rule:
    return lambda sizes: sizes > limit


def _keep_blobs(labels: NDArray[np.uint8], rules: Mapping[int, Rule]) -> NDArray[np.uint8]:
    """Set all other 6-connected blobs of the labels that have a rule to 0, in a copy."""
    labels = labels.copy()
    boxes = label_boxes(labels)
    for label in rules.keys() & boxes.keys():
        part = labels[boxes[label]]
        # In C order, in which the first of several largest blobs is upstream's.
        mask = np.ascontiguousarray(part == label)
        blobs, sizes = label_blobs(mask)
        part[mask & ~rules[label](sizes)[blobs]] = 0
    return labels


def skin_mask(image: ScannerImage, body: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Skin: the outer voxels of the body whose intensity is that of soft tissue.

    Parameters
    ----------
    image
        The scan.
    body
        (x, y, z), scanner grid.

    Returns
    -------
        uint8, 0 or 1, (x, y, z), scanner grid, Fortran order.

    Notes
    -----
    Upstream works on the whole volume. Slabs with a halo give the same voxels: dilation and erosion
    reach 4 slices, and a blob of up to 5 voxels spans at most 5.
    """
    size_z = body.shape[2]
    skin = np.empty(body.shape, dtype=np.uint8, order="F")
    for start in range(0, size_z, SKIN_SLAB):
        stop = min(start + SKIN_SLAB, size_z)
        # Blobs are measured on a slab that is larger by their reach. That slab is cut from a still
        # larger one, so that dilation and erosion are right on it.
        outer = slice(max(start - SKIN_MINIMUM_VOXELS, 0), min(stop + SKIN_MINIMUM_VOXELS, size_z))
        rough = _skin_before_blobs(image, body, outer)
        blobs, sizes = label_blobs(rough)
        keep = sizes > SKIN_MINIMUM_VOXELS
        keep[0] = False
        skin[:, :, start:stop] = keep[blobs[:, :, start - outer.start : stop - outer.start]]
    return skin


def _skin_before_blobs(
    image: ScannerImage, body: NDArray[np.bool_], part: slice
) -> NDArray[np.bool_]:
    """Skin in a range of slices, before small blobs are removed."""
    from scipy.ndimage import binary_dilation, binary_erosion

    reach = SKIN_EROSIONS + 1
    slab = slice(max(part.start - reach, 0), min(part.stop + reach, body.shape[2]))
    # scipy treats voxels beyond the array as background. That is right at the ends of the volume;
    # elsewhere it changes only the halo.
    dilated = binary_dilation(body[:, :, slab])
    shell = dilated & ~binary_erosion(dilated, iterations=SKIN_EROSIONS)
    inside = slice(part.start - slab.start, part.stop - slab.start)
    intensity = image.scale(image.stored[:, :, part])
    low, high = SKIN_HU
    result: NDArray[np.bool_] = shell[:, :, inside] & (intensity > low) & (intensity < high)
    return result
