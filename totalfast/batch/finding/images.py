"""Image files by their names and headers: NIfTI, pairs of .hdr and .img, NRRD, MetaImage."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import nibabel as nib

from totalfast.errors import InputError
from totalfast.files import itk
from totalfast.files.gunzip import MAGIC, unpack
from totalfast.files.nifti import partner_of
from totalfast.files.read import (
    NIFTI_ENDINGS,
    PAIR_ENDINGS,
    UNEXPECTED_CONTENT,
    UNREADABLE,
    is_dicom,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

OTHER_ENDINGS = (".zip", ".dcm", ".dicom")
"""Endings, beside those of image files, that are no part of a case's name."""

SLICER_SEGMENTATIONS = (".seg.nrrd", ".seg.nhdr")
"""Endings that 3D Slicer gives to segmentations."""

VOXEL_ENDINGS = (".raw", ".zraw", ".raw.gz", ".gz", ".img", ".bin", ".dat")
"""Endings of files that hold the voxels of a header with the same name."""

HEADER_BYTES = 540
"""Bytes of a NIfTI-2 header; that of NIfTI-1 has 348."""

PACKED_BYTES = 1 << 14
"""Bytes of a gzipped file that unpack to a header, also if the file has a comment."""


def is_image(path: Path) -> bool:
    """Whether a name is that of an image file; of a pair, which must exist, only the .hdr file."""
    return not is_dicom(path) and not is_second_of_pair(path)


def is_second_of_pair(path: Path) -> bool:
    """Whether a file has the voxels of a pair."""
    return path.name.lower().endswith((".img", ".img.gz")) and partner_of(path) is not None


def is_slicer_segmentation(path: Path) -> bool:
    """Whether a file's name is one of 3D Slicer's for segmentations."""
    return path.name.lower().endswith(SLICER_SEGMENTATIONS)


def stem_of(name: str) -> str:
    """Return a file's name without the endings of scans; other dots belong to the name."""
    endings = (*NIFTI_ENDINGS, *itk.ENDINGS, *PAIR_ENDINGS, *OTHER_ENDINGS)
    while True:
        ending = next((each for each in endings if name.lower().endswith(each)), "")
        if not ending or len(ending) == len(name):
            return name
        name = name[: -len(ending)]


def files_of(path: Path) -> Iterator[Path]:
    """The files that form an image file: itself, the other one of a pair, its file of voxels."""
    yield path
    partner = partner_of(path)
    if partner is not None:
        yield partner
    if path.name.lower().endswith((".mhd", ".nhdr")):
        start = path.name[: -len(path.suffix)]
        yield from (
            path.with_name(start + ending)
            for ending in VOXEL_ENDINGS
            if path.with_name(start + ending).is_file()
        )


def slices_of(path: Path) -> int | None:
    """Number of voxels along the third axis, from the header alone.

    None if the header can't be read, or describes no volume; reading the scan tells why.
    """
    try:
        shape = _itk_shape(path) if path.name.lower().endswith(itk.ENDINGS) else _shape(path)
    except (InputError, struct.error, *UNREADABLE, *UNEXPECTED_CONTENT):
        return None
    if len(shape) < 3:  # noqa: PLR2004 - a volume has three axes
        return None
    along_fourth = len(shape) > 3 and shape[2] == 1  # noqa: PLR2004 - as files.read reads them
    return shape[3] if along_fourth else shape[2]


def _itk_shape(path: Path) -> tuple[int, ...]:
    return tuple(itk.open_itk(path).shape)


def _shape(path: Path) -> tuple[int, ...]:
    with path.open("rb") as file:
        start = file.read(PACKED_BYTES)
    if start.startswith(MAGIC):
        start = unpack(start, HEADER_BYTES)
    sizes = {struct.unpack(f"{order}i", start[:4])[0] for order in "<>"}
    kind = nib.Nifti2Header if HEADER_BYTES in sizes else nib.Nifti1Header
    header = kind(start[: kind.template_dtype.itemsize], check=False)
    return tuple(int(size) for size in header.get_data_shape())
