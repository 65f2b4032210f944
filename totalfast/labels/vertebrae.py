"""Clean-up of the vertebrae tasks: one label per vertebral body, and vertebrae cut to a mask.

The steps are TotalSegmentator's own functions (2.18.0, postprocessing.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from totalfast.labels.blobs import label_blobs
from totalfast.upstream import postprocessing

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from numpy.typing import NDArray

REFINED_DILATION_MM = 2.0


def separate_vertebrae(
    labels: NDArray[np.uint8], classes: Mapping[int, str], *, zooms_mm: Iterable[np.float32]
) -> NDArray[np.uint8]:
    """Give each vertebral body one label, and grow it by 3 mm.

    Parameters
    ----------
    labels
        (z, y, x), RAS+ axes, model grid.
    classes
        Label to class name.
    zooms_mm
        Spacing along (x, y, z), float32 as in a file's header.

    Notes
    -----
    Where bodies of several labels touch and only one blob is large enough, upstream fails with an
    IndexError. Here that blob gets the label that upstream's rule gives to the first of several.
    """
    upstream = postprocessing()
    voxels = np.ascontiguousarray(labels.T)
    spacing = tuple(zooms_mm)
    volume = np.prod(spacing)
    try:
        separated = upstream.postprocess_vertebrae_pp(
            voxels, dict(classes), voxel_volume=volume, voxel_spacing=spacing
        )
    except IndexError:
        separated = upstream.dilate_vertebrae_labels(
            _one_body(voxels, classes, voxel_mm3=float(volume)), dict(classes), spacing
        )
    return np.ascontiguousarray(np.asarray(separated, dtype=np.uint8).T)


def _one_body(
    voxels: NDArray[np.uint8], classes: Mapping[int, str], *, voxel_mm3: float
) -> NDArray[np.uint8]:
    """The one blob of 100 mm3 or more, with one label: upstream's rule for several."""
    blobs, voxel_counts = label_blobs(voxels > 0)
    sizes = voxel_counts * voxel_mm3
    sizes[0] = 0
    body = blobs == int(np.argmax(sizes))
    present = [label for label in np.unique(voxels[body]) if label in classes]
    label_of = {name: label for label, name in classes.items()}
    first, last = label_of["vertebrae_C1"], label_of["vertebrae_L5"]
    from_top = last not in present and first in present
    separated: NDArray[np.uint8] = body * np.uint8(first if from_top else max(present))
    return separated


def refine_vertebrae(
    labels: NDArray[np.uint8],
    bodies: NDArray[np.uint8],
    classes: Mapping[int, str],
    *,
    zooms_mm: Iterable[np.float32],
) -> NDArray[np.uint8]:
    """Grow vertebrae by 2 mm and cut them to the vertebral bodies.

    Parameters
    ----------
    labels, bodies
        (x, y, z), scanner grid; ``bodies`` is 1 in vertebral bodies.
    classes
        Label to class name, of the vertebrae.
    zooms_mm
        Spacing along (x, y, z).
    """
    refined = postprocessing().refine_vertebrae_pp_with_body_mask(
        labels,
        bodies,
        dict(classes),
        voxel_spacing=tuple(zooms_mm),
        dilation_mm=REFINED_DILATION_MM,
    )
    return np.asarray(refined, dtype=np.uint8)
