"""Bring labels from the model grid back to the scanner grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import nibabel as nib
import numpy as np
from nibabel.orientations import axcodes2ornt, ornt_transform

from totalfast.export import nearest_to_scanner_grid
from totalfast.export.legacy import smooth_to_scanner_grid
from totalfast.files.write import label_image
from totalfast.system.cores import usable_cores
from totalfast.system.progress import timed

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from totalfast.labels.statistics import Statistics
    from totalfast.options import Options
    from totalfast.scan import ModelImage, ScannerImage


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelMap:
    """A scan's label map, and the statistics that were measured on the model grid.

    Parameters
    ----------
    image
        uint8, (x, y, z), scanner grid (model grid with ``save_lowres``).
    statistics
        None if none were asked for, or if they are measured on the scanner grid.
    """

    image: nib.Nifti1Image
    statistics: Statistics | None = None

    @property
    def voxels(self) -> NDArray[np.uint8]:
        """The labels, (x, y, z); changing them changes the image."""
        return np.asanyarray(self.image.dataobj)


def restore(
    labels: NDArray[np.uint8],
    model_image: ModelImage,
    image: ScannerImage,
    options: Options,
    names: Mapping[int, str],
) -> nib.Nifti1Image:
    """Bring labels (z, y, x) to the scanner grid, or only to the scan's axes with save_lowres."""
    if options.lowres:
        lowres = nib.Nifti1Image(labels.T, model_image.grid.stored().affine)
        lowres = lowres.as_reoriented(ornt_transform(axcodes2ornt("RAS"), image.grid.orientation))
        voxels = np.asfortranarray(lowres.dataobj)
        return label_image(voxels, affine=lowres.affine, header=lowres.header, names=names)
    with timed("Resampling...", "  Resampled in"):
        legacy = options.higher_order_resampling_LEGACY
        to_scanner_grid = smooth_to_scanner_grid if legacy else nearest_to_scanner_grid
        voxels = to_scanner_grid(labels, scanner=image.grid, threads=usable_cores())
    return label_image(voxels, affine=image.written_affine, header=image.header, names=names)
