"""The volume that slices form: its affine, and its voxels, which are read when they are needed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import nibabel as nib
import numpy as np
from nibabel.orientations import (
    apply_orientation,
    axcodes2ornt,
    inv_ornt_aff,
    io_orientation,
    ornt_transform,
)
from nibabel.volumeutils import apply_read_scaling

from totalfast.files.dicom.find import damage_refused
from totalfast.files.dicom.pixels import read_planes

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import DTypeLike, NDArray

    from totalfast.files.dicom.header import Slice

AXES = "LAS"
"""Axes of the image, those of dicom2nifti's."""


class SliceVoxels:
    """Voxels of a volume that are read when they are needed: nibabel's array proxy.

    Parameters
    ----------
    source
        The user's path, for messages.
    slices
        Slices in the order of their positions.

    Notes
    -----
    Slope and intercept are the slices', if all have the same; then the stored integers are kept.
    Otherwise voxels are float64 intensities, as dicom2nifti's.
    """

    is_proxy = True
    file_like = None

    def __init__(self, source: Path, slices: Sequence[Slice]) -> None:
        self._source, self._slices = source, tuple(slices)
        rows, columns = slices[0].shape
        native = io_orientation(native_affine(self._slices))
        self._to_native = ornt_transform(axcodes2ornt(AXES), native)
        self.shape = tuple(
            (columns, rows, len(slices))[int(axis)] for axis in self._to_native[:, 0]
        )
        self.ndim = 3
        scalings = {(each.slope, each.intercept) for each in slices}
        dtypes = [each.dtype for each in slices]
        self._is_scaled = len(scalings) == 1
        self.slope, self.inter = scalings.pop() if self._is_scaled else (1.0, 0.0)
        self.dtype = np.result_type(*set(dtypes)) if self._is_scaled else np.dtype(np.float64)

    def get_unscaled(self) -> NDArray[Any]:
        """Read all voxels (x, y, z), before slope and intercept."""
        voxels: NDArray[Any] = np.empty(self.shape, self.dtype, order="F")
        native = apply_orientation(voxels, self._to_native)
        with damage_refused(self._source):
            for number, (each, plane) in enumerate(read_planes(self._source, self._slices)):
                place = native[:, :, number]
                if self._is_scaled:
                    place[...] = plane.T
                else:
                    np.multiply(plane.T, each.slope, out=place)
                    place += each.intercept
        return voxels

    def __array__(
        self, dtype: DTypeLike | None = None, *, copy: bool | None = None
    ) -> NDArray[Any]:
        """Read the voxels and scale them, as nibabel's proxies do; numpy's protocol."""
        slope, inter = np.asarray(self.slope), np.asarray(self.inter)
        return np.asarray(apply_read_scaling(self.get_unscaled(), slope, inter), dtype=dtype)

    def __getitem__(self, index: slice | tuple[slice | int, ...]) -> NDArray[Any]:
        """Part of the intensities; all voxels are read for it."""
        part: NDArray[Any] = np.asarray(self)[index]
        return part


def native_affine(slices: Sequence[Slice]) -> NDArray[np.float64]:
    """RAS+ affine of (column, row, slice), DICOM PS3.3, C.7.6.2.1.1.

    The step from slice to slice is the mean, which may be sheared.
    """
    first = slices[0]
    down_mm, right_mm = first.spacing_mm
    affine = np.eye(4)
    affine[:3, 0] = np.multiply(first.orientation[:3], right_mm)
    affine[:3, 1] = np.multiply(first.orientation[3:], down_mm)
    affine[:3, 2] = np.subtract(slices[-1].position, first.position) / (len(slices) - 1)
    affine[:3, 3] = first.position
    affine[:2] *= -1
    return affine


def image_of(source: Path, slices: Sequence[Slice]) -> nib.Nifti1Image:
    """Return the image of a volume; its voxels are read from the slices when they are needed."""
    voxels = SliceVoxels(source, slices)
    native = native_affine(slices)
    to_image = ornt_transform(io_orientation(native), axcodes2ornt(AXES))
    rows, columns = slices[0].shape
    affine = native @ inv_ornt_aff(to_image, (columns, rows, len(slices)))
    # The dtype is given because nibabel would read voxels to find it.
    image = nib.Nifti1Image(voxels, affine, dtype=voxels.dtype)
    header = image.header
    header.set_data_dtype(voxels.dtype)
    header.set_xyzt_units("mm")
    # Upstream reads the affine from a file, where it is float32.
    return nib.Nifti1Image(voxels, header.get_best_affine(), header, dtype=voxels.dtype)
