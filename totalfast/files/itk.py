"""Open NRRD and MetaImage files with SimpleITK: first the header, the voxels when needed."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import nibabel as nib
import numpy as np

from totalfast.errors import InputError
from totalfast.files.itk_header import ItkHeader
from totalfast.files.nifti_header import is_usable

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

ENDINGS = (".nrrd", ".nhdr", ".mha", ".mhd")
"""Endings of formats that upstream does not read."""

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])

LARGEST_AXIS = 32767
"""Voxels along an axis that a NIfTI-1 file, in which results are written, can hold (int16)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ItkVoxels:
    """Voxels that SimpleITK reads; an array proxy for nibabel's images."""

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    slope: float = 1.0
    inter: float = 0.0

    is_proxy: ClassVar[bool] = True

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def with_shape(self, shape: tuple[int, ...]) -> ItkVoxels:
        """Return the first voxels in another shape, which has as many or fewer voxels."""
        return replace(self, shape=shape)

    def get_unscaled(self) -> NDArray[Any]:
        """Read the voxels.

        Raises
        ------
        OSError
            If they can't be read.
        """
        import SimpleITK as sitk  # noqa: N813 - as everyone calls it

        try:
            voxels = sitk.GetArrayFromImage(sitk.ReadImage(str(self.path))).T
        except RuntimeError as error:
            raise OSError(reason(error)) from error
        first: NDArray[Any] = voxels.reshape(-1, order="F")[: math.prod(self.shape)]
        return first.reshape(self.shape, order="F")

    def __array__(
        self, dtype: DTypeLike | None = None, *, copy: bool | None = None
    ) -> NDArray[Any]:
        """Read the voxels; numpy's protocol."""
        return np.asarray(self.get_unscaled(), dtype=dtype)


def open_itk(path: Path) -> nib.Nifti1Image:
    """Open a NRRD or MetaImage file, whose axes are LPS+, as a nibabel image, whose axes are RAS+.

    Raises
    ------
    InputError
        If the header is damaged, or describes something else than a 3-D volume.
    """
    import SimpleITK as sitk  # noqa: N813 - as everyone calls it

    header = ItkHeader.of(path)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise InputError(f"{path} can't be read: {reason(error)}") from error
    dimensions, components = reader.GetDimension(), reader.GetNumberOfComponents()
    if dimensions < 3 or components != 1:
        raise InputError(
            f"{path} is {dimensions}-D {reader.GetSize()} with {components} values per voxel; "
            "totalfast needs a 3-D volume with one value per voxel."
        )
    direction = np.reshape(reader.GetDirection(), (dimensions, dimensions))[:3, :3]
    affine = np.eye(4)
    affine[:3, :3] = direction * np.asarray(reader.GetSpacing()[:3])
    affine[:3, 3] = reader.GetOrigin()[:3]
    if not is_usable(affine):
        raise InputError(f"{path} has a header without a usable orientation; repair its header.")
    shape = tuple(int(size) for size in reader.GetSize())
    check_axes(shape, str(path))
    voxels = ItkVoxels(path=path, shape=shape, dtype=_dtype(reader.GetPixelID(), path))
    header.check_size(math.prod(shape) * voxels.dtype.itemsize)
    opened = nib.Nifti1Image(voxels, LPS_TO_RAS @ affine, dtype=voxels.dtype)
    opened.file_map["image"].filename = str(path)
    return opened


def check_axes(shape: tuple[int, ...], name: str) -> None:
    """Refuse axes that are longer than those of the files that results are written in."""
    if max(shape, default=0) > LARGEST_AXIS:
        raise InputError(
            f"{name} has the shape {shape}; results are NIfTI-1 files, whose axes hold at most "
            f"{LARGEST_AXIS} voxels. Crop the scan."
        )


def reason(error: RuntimeError) -> str:
    """Return the line of an ITK error that tells the reason."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # "Reason:" is followed by the system's last error, which need not belong to this file.
    noise = ("Exception thrown", "/", "Reason:")
    lines = [line for line in lines if not line.startswith(noise)]
    lines = [re.sub(r"^(ITK ERROR|itk::ERROR): (\w+\(0x\w+\): )?", "", line) for line in lines]
    return (lines[-1] if lines else "SimpleITK can't read it").rstrip(".")


def _dtype(pixel: int, path: Path) -> np.dtype[Any]:
    import SimpleITK as sitk  # noqa: N813 - as everyone calls it

    kinds = {
        sitk.sitkUInt8: np.uint8,
        sitk.sitkInt8: np.int8,
        sitk.sitkUInt16: np.uint16,
        sitk.sitkInt16: np.int16,
        sitk.sitkUInt32: np.uint32,
        sitk.sitkInt32: np.int32,
        sitk.sitkUInt64: np.uint64,
        sitk.sitkInt64: np.int64,
        sitk.sitkFloat32: np.float32,
        sitk.sitkFloat64: np.float64,
    }
    if pixel not in kinds:
        kind = sitk.GetPixelIDValueAsString(pixel)
        raise InputError(f"{path} has voxels of type {kind}; totalfast needs one real number each.")
    return np.dtype(kinds[pixel])
