"""Check the fields of a NIfTI header, and repair those that contradict each other.

Headers are repaired before anything is computed, so that results are written with a sound header.
An ordinary header is not changed.
"""

from __future__ import annotations

import logging
import struct
from typing import TYPE_CHECKING

import nibabel as nib
import numpy as np

from totalfast.errors import InputError

if TYPE_CHECKING:
    from typing import TypeAlias

    from numpy.typing import NDArray

    Header: TypeAlias = nib.Nifti1Header

logger = logging.getLogger(__name__)

LONGEST_QUATERNION = 1.001
"""Length of (b, c, d) that is still read as rounding. nifti_clib, which ITK and FSL use, shortens
any length; nibabel accepts 1.0000002."""

LARGEST_DIFFERENCE = 0.01
"""Relative difference of pixdim and affine that is still read as rounding."""

UNIT_MM = {1: 1000.0, 3: 0.001}
UNIT_NAMES = {1: "metres", 3: "micrometres"}
"""Units of length by their code in xyzt_units (NIfTI-1); 2 is mm, 0 is unknown and read as mm."""

SMALLEST_MM, LARGEST_MM = 5.0, 4000.0
"""Extents of scans of people."""

SMALLEST_MATRIX, LARGEST_MATRIX = 1e-18, 1e18
"""Smallest length of an affine's axis, and largest number in an affine; the squares of smaller and
larger numbers are no normal float32."""

DICOM_EXTENSION = 2
UNREADABLE_DICOM = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    NotImplementedError,
    OSError,
    TypeError,
    ValueError,
    struct.error,
)
"""Errors of nibabel and pydicom for a DICOM extension that holds something else."""


def repair_orientation(header: Header, name: str) -> None:
    """Repair a header's sform, qform and pixdim in place, and warn of what matters.

    Parameters
    ----------
    header
        Its codes and its datatype were checked.
    name
        Name of the file, for messages.

    Raises
    ------
    InputError
        If neither sform nor qform is usable.
    """
    has_sform, has_qform = int(header["sform_code"]) > 0, int(header["qform_code"]) > 0
    if not has_sform and not has_qform:
        if not is_usable(header.get_base_affine()):
            raise InputError(
                f"{name} has a header whose voxel sizes (pixdim) are not usable: "
                f"{', '.join(f'{mm:g}' for mm in _zooms(header))}. Repair its header."
            )
        return
    _shorten_quaternion(header)
    sform = header.get_sform() if has_sform else None
    qform = _qform(header) if has_qform else None
    sform_usable, qform_usable = is_usable(sform), is_usable(qform)
    if not sform_usable and not qform_usable:
        raise InputError(
            f"{name} has a header without a usable orientation: {_complaint(header)}. Repair the "
            "header, for example with the tool that wrote the file."
        )
    if has_sform and not sform_usable:
        logger.warning(
            "WARNING: the sform of %s is no usable orientation (zero or NaN); its qform is used.",
            name,
        )
        header.set_sform(qform, int(header["qform_code"]))
    elif has_qform and not qform_usable:
        logger.info("The qform of %s is no rotation; its sform is used.", name)
        header.set_qform(sform, int(header["qform_code"]))
    _compare_zooms(header, name)


def is_usable(affine: NDArray[np.float64] | None) -> bool:
    """Whether a matrix maps a grid to a volume: finite, its axes neither zero nor parallel."""
    if affine is None or not np.all(np.abs(affine) < LARGEST_MATRIX):  # false for NaN
        return False
    columns = np.asarray(affine[:3, :3], dtype=np.float64)
    with np.errstate(all="ignore"):
        lengths = np.sqrt((columns**2).sum(axis=0))
        if not np.all(lengths >= SMALLEST_MATRIX):
            return False
        return bool(abs(np.linalg.det(columns / lengths)) > 1e-6)


def mm_per_unit(header: Header, shape: tuple[int, ...], affine: NDArray[np.float64]) -> float:
    """Return the factor from the header's unit of length to mm, and warn if it is not 1.

    Notes
    -----
    nibabel and upstream ignore the unit, ITK and FSL use it. Some files name a unit that their
    affine does not have; a unit that makes the scan smaller or larger than people is not believed.
    """
    if not isinstance(header, nib.Nifti1Header):
        return 1.0
    code = int(header["xyzt_units"]) & 7
    factor = UNIT_MM.get(code, 1.0)
    if factor == 1.0:
        return factor
    extent = float(np.max(np.asarray(shape[:3]) * np.linalg.norm(affine[:3, :3], axis=0)))
    unit = UNIT_NAMES[code]
    if not is_a_scan(extent * factor) and is_a_scan(extent):
        logger.warning(
            "WARNING: the scan's header names %s as its unit, but the scan would then be %.3g mm "
            "large; it is read in mm.",
            unit,
            extent * factor,
        )
        return 1.0
    logger.warning(
        "WARNING: the scan's header is in %s; it is converted to mm for the models. Results keep "
        "the header's unit.",
        unit,
    )
    return factor


def is_a_scan(extent_mm: float) -> bool:
    """Whether an extent is that of a scan of a person."""
    return SMALLEST_MM <= extent_mm <= LARGEST_MM


def read_extensions(block: bytes, header: Header, name: str) -> list[nib.nifti1.Nifti1Extension]:
    """Read header extensions, which follow the header's four bytes of flags.

    Damaged extensions are left out with a warning; nothing of a scan depends on them.
    """
    found: list[nib.nifti1.Nifti1Extension] = []
    record = struct.Struct(f"{header.endianness}ii")  # size and code
    at = 0
    while at + record.size <= len(block):
        size, code = record.unpack_from(block, at)
        if size < record.size or at + size > len(block) or code < 0:
            if size or not found:
                logger.warning("WARNING: header extensions of %s are damaged and left out.", name)
            break
        content = block[at + record.size : at + size].rstrip(b"\0")
        at += size
        if code != DICOM_EXTENSION or _is_dicom(content):
            found.append(nib.nifti1.Nifti1Extension(code, content))
    return found


def _is_dicom(content: bytes) -> bool:
    """Whether nibabel can read a DICOM extension; it can't open a file that has another one."""
    try:
        nib.nifti1.Nifti1DicomExtension(DICOM_EXTENSION, content)
    except UNREADABLE_DICOM:
        return False
    return True


def _zooms(header: Header) -> NDArray[np.float64]:
    return np.asarray(header["pixdim"][1:4], dtype=np.float64)


def _shorten_quaternion(header: Header) -> None:
    """Make a quaternion that is longer than 1 by rounding as long as 1."""
    names = ("quatern_b", "quatern_c", "quatern_d")
    quaternion = np.asarray([float(header[name]) for name in names])
    with np.errstate(over="ignore", invalid="ignore"):
        length = float(np.sqrt((quaternion**2).sum()))
    if 1.0 + float(header.quaternion_threshold) / 2 < length <= LONGEST_QUATERNION:
        for name, value in zip(names, quaternion / length, strict=True):
            header[name] = value


def _qform(header: Header) -> NDArray[np.float64] | None:
    """The qform; None if its quaternion is longer than 1 or not finite."""
    with np.errstate(all="ignore"):
        try:
            affine: NDArray[np.float64] = header.get_qform()
        except (ValueError, nib.spatialimages.HeaderDataError):
            return None
    return affine


def _complaint(header: Header) -> str:
    parts = []
    if int(header["sform_code"]) > 0:
        parts.append("its sform is zero, not finite or singular")
    if int(header["qform_code"]) > 0:
        parts.append("its qform (quaternion, pixdim) is no rotation")
    return " and ".join(parts)


def _compare_zooms(header: Header, name: str) -> None:
    """Warn if pixdim is unlike the affine, and repair it where nothing else depends on it."""
    affine = np.asarray(header.get_best_affine(), dtype=np.float64)
    zooms, spacing = _zooms(header), np.linalg.norm(affine[:3, :3], axis=0)
    with np.errstate(all="ignore"):
        alike = np.all(np.abs(zooms - spacing) <= LARGEST_DIFFERENCE * spacing)
        volume = abs(np.linalg.det(affine[:3, :3]))
        same_volume = abs(np.prod(zooms) - volume) <= LARGEST_DIFFERENCE * volume
    sheared = volume < (1 - LARGEST_DIFFERENCE) * np.prod(spacing)
    if alike or (sheared and same_volume):
        return
    logger.warning(
        "WARNING: %s has two voxel sizes: %s mm in pixdim, and %s mm in its affine, which is used "
        "for labels and volumes.",
        name,
        " x ".join(f"{mm:.4g}" for mm in zooms),
        " x ".join(f"{mm:.4g}" for mm in spacing),
    )
    if int(header["qform_code"]) == 0 and np.all(spacing < np.finfo(np.float32).max):
        header["pixdim"][1:4] = spacing
