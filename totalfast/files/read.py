"""Read a scan: stored voxels and geometry from an image file or a nibabel image."""

from __future__ import annotations

import io
import logging
import math
import os
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError, SpatialImage
from nibabel.wrapstruct import WrapStructError

from totalfast.errors import InputError
from totalfast.files.gunzip import unpack
from totalfast.geometry import Grid
from totalfast.scan import ScannerImage

if TYPE_CHECKING:
    from typing import TypeAlias, TypeGuard

    from numpy.typing import NDArray

    ArrayProxy: TypeAlias = Any
    """nibabel's ArrayProxy, which has no types."""


logger = logging.getLogger(__name__)

NIFTI_ENDINGS = (".nii", ".nii.gz")
ITK_ENDINGS = (".nrrd", ".nhdr", ".mha", ".mhd")
"""Endings of formats that upstream does not read."""

UNEXPECTED_CONTENT = (
    ArithmeticError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    TypeError,
    ValueError,
    zlib.error,
)
"""Errors that nibabel raises for damaged headers, beside its own; a size that no memory can hold is
one of them."""

LONGEST_HEADER = 4096
"""Bytes that hold the header of a NIfTI file of either version."""

GZIP_MAGIC = b"\x1f\x8b"
NIFTI_2_SIZES = (b"\x1c\x02\0\0", b"\0\0\x02\x1c")
"""First bytes of a NIfTI-2 file in both byte orders: 540, the size of its header."""

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def is_dicom(source: object) -> TypeGuard[str | Path]:
    """Whether a source is read as DICOM: a path without another format's ending."""
    if not isinstance(source, str | os.PathLike):
        return False
    return not Path(source).name.lower().endswith(NIFTI_ENDINGS + ITK_ENDINGS)


def open_scan(source: str | Path | nib.Nifti1Image | BinaryIO) -> nib.Nifti1Image:
    """Open a scan and check its header, without reading the voxels of a NIfTI file.

    Parameters
    ----------
    source
        Path of a NIfTI, NRRD or MetaImage file, an open NIfTI file (plain or gzipped), or a nibabel
        image.

    Raises
    ------
    InputError
        If the file is missing, damaged or not 3-D, or its voxels are not real numbers.
    """
    if isinstance(source, SpatialImage):
        image = source
    elif isinstance(source, str | os.PathLike):
        image = _open(Path(source))
    else:
        image = _open_stream(source)
    name = _name(image)
    dtype = image.get_data_dtype()
    if dtype.fields is not None or dtype.kind not in "iufb":
        raise InputError(
            f"{name} has voxels of type {dtype}; totalfast needs one real number per voxel."
        )
    if len(image.shape) < 3:
        raise InputError(
            f"{name} is {len(image.shape)}-D {image.shape}; totalfast needs a 3-D volume."
        )
    if len(image.shape) > 4:
        raise InputError(
            f"{name} is {len(image.shape)}-D {image.shape}; totalfast reads 3-D volumes, and the "
            "first volume of 4-D files."
        )
    if 0 in image.shape:
        raise InputError(f"{name} is empty: its shape is {image.shape}.")
    return image


def _name(image: nib.Nifti1Image) -> str:
    filename = image.get_filename()
    return Path(filename).name if filename else "the input image"


def read_image(source: str | Path | nib.Nifti1Image | BinaryIO) -> ScannerImage:
    """Read a 3-D scan with its stored dtype, without a float64 copy.

    The parameters and errors are those of ``open_scan``; a truncated file is an error, too.
    """
    image = open_scan(source)
    name = _name(image)
    stored, slope, intercept = _stored_voxels(image, name)
    header = image.header
    if stored.ndim == 4:
        logger.warning("WARNING: Input image has 4 dimensions. Only using first three dimensions.")
        stored = stored[..., 0]
        header = nib.Nifti1Image(np.zeros((1, 1, 1), np.uint8), image.affine).header
        header.set_data_shape(stored.shape)
    grid = Grid(shape=stored.shape, affine=np.asarray(image.affine, dtype=np.float64))
    return ScannerImage(stored=stored, slope=slope, intercept=intercept, grid=grid, header=header)


def _open(path: Path) -> nib.Nifti1Image:
    if not path.exists():
        raise InputError(f"{path} does not exist.")
    if path.name.lower().endswith(ITK_ENDINGS):
        return _open_itk(path)
    try:
        return nib.load(path)
    except (ImageFileError, HeaderDataError) as error:
        raise InputError(f"{path} is not a readable NIfTI file: {error}") from error
    except UNEXPECTED_CONTENT as error:
        raise InputError(f"{path} can't be read: {error}") from error


def _open_stream(stream: BinaryIO) -> nib.Nifti1Image:
    """Open a NIfTI file, plain or gzipped, from an open file's current position."""
    if not hasattr(stream, "read"):
        raise InputError(
            f"the input is of type {type(stream).__name__}; it must be a path, a nibabel image or "
            "an open file."
        )
    try:
        content = stream.read()
        if not isinstance(content, bytes):
            raise InputError("the input file is open in text mode; open it with mode 'rb'.")
        head = content[:LONGEST_HEADER]
        if content.startswith(GZIP_MAGIC):
            head = unpack(content, LONGEST_HEADER)
        kind = nib.Nifti2Image if head[:4] in NIFTI_2_SIZES else nib.Nifti1Image
        if content.startswith(GZIP_MAGIC):
            header = kind.header_class.from_fileobj(io.BytesIO(head), check=False)
            size = math.prod(header.get_data_shape()) * header.get_data_dtype().itemsize
            content = unpack(content, int(header.get_data_offset()) + size)
        return kind.from_bytes(content)
    except (ImageFileError, HeaderDataError, WrapStructError) as error:
        raise InputError(f"the input file is not a readable NIfTI file: {error}") from error
    except UNEXPECTED_CONTENT as error:
        raise InputError(f"the input file can't be read: {error}") from error


def _open_itk(path: Path) -> nib.Nifti1Image:
    """Read a NRRD or MetaImage file with SimpleITK, whose axes are LPS+."""
    import SimpleITK as sitk  # noqa: N813 - as everyone calls it

    try:
        image = sitk.ReadImage(str(path))
    except RuntimeError as error:
        raise InputError(f"{path} can't be read: {error}") from error
    dimensions = image.GetDimension()
    if dimensions < 3 or image.GetNumberOfComponentsPerPixel() != 1:
        raise InputError(
            f"{path} is {dimensions}-D {image.GetSize()} with "
            f"{image.GetNumberOfComponentsPerPixel()} values per voxel; totalfast needs a 3-D "
            "volume with one value per voxel."
        )
    direction = np.reshape(image.GetDirection(), (dimensions, dimensions))[:3, :3]
    affine = np.eye(4)
    affine[:3, :3] = direction * np.asarray(image.GetSpacing()[:3])
    affine[:3, 3] = image.GetOrigin()[:3]
    voxels = sitk.GetArrayFromImage(image).T
    opened = nib.Nifti1Image(voxels, LPS_TO_RAS @ affine, dtype=voxels.dtype)
    opened.file_map["image"].filename = str(path)
    return opened


def _stored_voxels(image: nib.Nifti1Image, name: str) -> tuple[NDArray[Any], float, float]:
    """Return the stored voxels, and the slope and intercept that are not applied yet."""
    proxy = image.dataobj
    if not nib.is_proxy(proxy):
        return np.asanyarray(proxy), 1.0, 0.0
    path = getattr(proxy, "file_like", None)
    try:
        if isinstance(path, str | Path) and str(path).lower().endswith(".gz"):
            stored = _inflate(Path(path), proxy)
        else:
            stored = np.asanyarray(proxy.get_unscaled())
    except UNEXPECTED_CONTENT as error:
        raise InputError(f"{name} is damaged or truncated: {error}") from error
    return stored, float(proxy.slope), float(proxy.inter)


def _inflate(path: Path, proxy: ArrayProxy) -> NDArray[Any]:
    """Read a gzipped NIfTI's voxels, and nothing that follows them."""
    offset, size = int(proxy.offset), math.prod(proxy.shape) * proxy.dtype.itemsize
    content = unpack(path.read_bytes(), offset + size)
    if len(content) < offset + size:
        raise EOFError(f"it ends after {max(len(content) - offset, 0)} of {size} bytes of voxels")
    voxels: NDArray[Any] = np.frombuffer(
        content, proxy.dtype, offset=offset, count=math.prod(proxy.shape)
    ).reshape(proxy.shape, order="F")
    return voxels
