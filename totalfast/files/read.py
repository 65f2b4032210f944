"""Read a scan: stored voxels and geometry from an image file or a nibabel image."""

from __future__ import annotations

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
from totalfast.files import itk
from totalfast.files.nifti import as_stored, open_nifti, partner_of
from totalfast.files.nifti_header import UNIT_MM, is_usable, mm_per_unit
from totalfast.geometry import Grid
from totalfast.scan import ScannerImage

if TYPE_CHECKING:
    from typing import TypeAlias, TypeGuard

    from numpy.typing import NDArray

    ArrayLike: TypeAlias = Any
    """An array, or one of nibabel's or our proxies, which have no common type."""


logger = logging.getLogger(__name__)

NIFTI_ENDINGS = (".nii", ".nii.gz")
PAIR_ENDINGS = (".hdr", ".img", ".hdr.gz", ".img.gz")

UNREADABLE = (ImageFileError, HeaderDataError, WrapStructError)
"""nibabel's errors for content that is not NIfTI."""

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


def is_dicom(source: object) -> TypeGuard[str | Path]:
    """Whether a source is read as DICOM: a path without another format's ending."""
    if not isinstance(source, str | os.PathLike):
        return False
    path = Path(source)
    if path.name.lower().endswith(NIFTI_ENDINGS + itk.ENDINGS):
        return False
    # Some DICOM files are called .img, so a pair is recognised by its two files.
    return not (path.name.lower().endswith(PAIR_ENDINGS) and partner_of(path))


def open_scan(source: str | Path | nib.Nifti1Image | BinaryIO) -> nib.Nifti1Image:
    """Open a scan and check its header, without reading the voxels of a file.

    Parameters
    ----------
    source
        Path of a NIfTI, NRRD or MetaImage file, an open NIfTI file (plain or gzipped), or a nibabel
        image.

    Returns
    -------
        A 3-D image whose affine is in mm. If the file has another unit, ``extra`` holds the file's
        header ("header") and the unit's size ("mm_per_unit").

    Raises
    ------
    InputError
        If the file is missing, damaged or not 3-D, or its voxels are not real numbers.
    """
    if isinstance(source, SpatialImage):
        image = as_stored(source) if isinstance(source, nib.Nifti1Pair) else source
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
    if min(image.shape) < 1:
        raise InputError(f"{name} is empty: its shape is {image.shape}.")
    _check_affine(image.affine, name)
    image = _in_three_dimensions(image, name)
    itk.check_axes(image.shape, name)
    return _in_mm(image, name)


def _name(image: nib.Nifti1Image) -> str:
    filename = image.get_filename()
    return Path(filename).name if filename else "the input image"


def read_image(source: str | Path | nib.Nifti1Image | BinaryIO) -> ScannerImage:
    """Read a 3-D scan with its stored dtype, without a float64 copy.

    The parameters and errors are those of ``open_scan``; a truncated file is an error, too.
    """
    image = open_scan(source)
    stored, slope, intercept = _stored_voxels(image, _name(image))
    return ScannerImage(
        stored=stored,
        slope=slope,
        intercept=intercept,
        grid=Grid(shape=stored.shape, affine=np.asarray(image.affine, dtype=np.float64)),
        header=image.extra.get("header", image.header),
        mm_per_unit=image.extra.get("mm_per_unit", 1.0),
    )


def _open(path: Path) -> nib.Nifti1Image:
    if not path.exists():
        raise InputError(f"{path} does not exist.")
    try:
        if path.name.lower().endswith(itk.ENDINGS):
            return itk.open_itk(path)
        partner = partner_of(path)
        if partner is None:
            return open_nifti(path, path.name)
        header, voxels = sorted((path, partner))
        return open_nifti(header, path.name, voxels=voxels)
    except UNREADABLE as error:
        raise InputError(f"{path} is not a readable NIfTI file: {error}") from error
    except InputError:
        raise
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
        return open_nifti(_bytes(content), "the input file")
    except UNREADABLE as error:
        raise InputError(f"the input file is not a readable NIfTI file: {error}") from error
    except InputError:
        raise
    except UNEXPECTED_CONTENT as error:
        raise InputError(f"the input file can't be read: {error}") from error


def _bytes(content: object) -> bytes:
    if not isinstance(content, bytes):
        raise InputError("the input file is open in text mode; open it with mode 'rb'.")
    return content


def _in_three_dimensions(image: nib.Nifti1Image, name: str) -> nib.Nifti1Image:
    """Return the first volume; axes behind the third that have one voxel are dropped.

    Files whose slices lie along the fourth axis, (x, y, 1, slices), are read as one volume.
    """
    shape = tuple(int(size) for size in image.shape)
    if len(shape) == 3:
        return image
    if math.prod(shape[4:]) > 1:
        raise InputError(
            f"{name} is {len(shape)}-D {shape}; totalfast reads 3-D volumes, and the first volume "
            "of 4-D files."
        )
    if shape[2] == 1 and shape[3] > 1:
        logger.warning(
            "WARNING: the scan's shape is %s; its %d slices lie along the fourth axis and are read "
            "as one volume.",
            shape,
            shape[3],
        )
        shape = (shape[0], shape[1], shape[3])
    elif shape[3] > 1:
        logger.warning("WARNING: Input image has 4 dimensions. Only using first three dimensions.")
    voxels = _first_volume(image.dataobj, shape[:3])
    # As in upstream, a new header.
    header = nib.Nifti1Image(np.zeros((1, 1, 1), np.uint8), image.affine).header
    itk.check_axes(shape[:3], name)
    header.set_data_shape(shape[:3])
    header.set_data_dtype(image.get_data_dtype())
    if isinstance(image.header, nib.Nifti1Header) and _unit(image.header) in UNIT_MM:
        header["xyzt_units"] = _unit(image.header)
    return nib.Nifti1Image(voxels, image.affine, header, file_map=_named(image))


def _unit(header: nib.Nifti1Header) -> int:
    return int(header["xyzt_units"]) & 7


def _first_volume(voxels: ArrayLike, shape: tuple[int, ...]) -> ArrayLike:
    """The first voxels of an array or a proxy, without reading them where that is possible."""
    if hasattr(voxels, "with_shape"):
        return voxels.with_shape(shape)
    if not nib.is_proxy(voxels):
        array = np.asanyarray(voxels)
        array = array.reshape(array.shape[:4])
        return array[:, :, 0] if array.shape[2] == 1 else array[..., 0]
    return (
        np.asanyarray(voxels).reshape(-1, order="F")[: math.prod(shape)].reshape(shape, order="F")
    )


def _check_affine(affine: NDArray[np.float64] | None, name: str) -> None:
    if not is_usable(affine):
        raise InputError(
            f"{name} has an affine that is no usable orientation (zero, not finite, singular, or "
            "beyond float32). Repair it."
        )


def _in_mm(image: nib.Nifti1Image, name: str) -> nib.Nifti1Image:
    """Convert an image's affine to mm, and keep its header."""
    factor = mm_per_unit(image.header, image.shape, image.affine)
    if factor == 1.0:
        return image
    affine = np.array(image.affine, dtype=np.float64)
    affine[:3] *= factor
    _check_affine(affine, name)
    header = nib.Nifti1Image(np.zeros((1, 1, 1), np.uint8), affine).header
    header.set_data_shape(image.shape)
    header.set_data_dtype(image.get_data_dtype())
    extra = {"header": image.header, "mm_per_unit": factor}
    return nib.Nifti1Image(image.dataobj, affine, header, extra, file_map=_named(image))


def _named(image: nib.Nifti1Image) -> dict[str, nib.FileHolder]:
    """The file map of an image of one file, with the name of another image's file."""
    file_map: dict[str, nib.FileHolder] = nib.Nifti1Image.make_file_map()
    file_map["image"].filename = image.get_filename()
    return file_map


def _stored_voxels(image: nib.Nifti1Image, name: str) -> tuple[NDArray[Any], float, float]:
    """Return the stored voxels, and the slope and intercept that are not applied yet."""
    proxy = image.dataobj
    if not nib.is_proxy(proxy):
        return np.asanyarray(proxy), 1.0, 0.0
    try:
        stored = np.asanyarray(proxy.get_unscaled())
    except InputError:
        raise
    except UNEXPECTED_CONTENT as error:
        raise InputError(f"{name} is damaged or truncated: {error}") from error
    return stored, float(proxy.slope), float(proxy.inter)
