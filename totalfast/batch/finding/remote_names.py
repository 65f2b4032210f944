"""Which names of files are those of scans, as far as a name tells."""

from __future__ import annotations

import mimetypes
from pathlib import Path
from typing import TYPE_CHECKING

from totalfast.batch.finding.images import VOXEL_ENDINGS
from totalfast.files.itk import ENDINGS as ITK_ENDINGS
from totalfast.files.read import NIFTI_ENDINGS

if TYPE_CHECKING:
    from collections.abc import Collection

DICOM_ENDINGS = (".dcm", ".dicom", ".ima")

NO_SCANS = ("dicomdir", "readme", "license", "licence", "changelog", "makefile")
"""Names without an ending that are not those of DICOM slices."""

HEADER_ENDINGS = (".mhd", ".nhdr")
"""Endings of headers whose voxels are in another file."""

KNOWN_TYPES = mimetypes.MimeTypes(filenames=())
"""Endings that Python knows; not those of this machine, so that all machines find the same."""


def is_image(name: str, beside: Collection[str]) -> bool:
    """Whether a name is that of an image file, given the names beside it; of a pair the header."""
    lower = name.lower()
    if lower.endswith((*NIFTI_ENDINGS, *ITK_ENDINGS)):
        return True
    return lower.endswith((".hdr", ".hdr.gz")) and bool(parts_of(name, beside))


def has_parts(name: str) -> bool:
    """Whether a name is that of a header whose voxels may be in another file."""
    return name.lower().endswith((".hdr", ".hdr.gz", *HEADER_ENDINGS))


def parts_of(name: str, beside: Collection[str]) -> list[str]:
    """Names of the files with the voxels of a header."""
    for ending, others in (
        (".hdr", (".img", ".img.gz")),
        (".hdr.gz", (".img.gz", ".img")),
        (".mhd", VOXEL_ENDINGS),
        (".nhdr", VOXEL_ENDINGS),
    ):
        if name.lower().endswith(ending):
            stem = name[: -len(ending)]
            return [stem + other for other in others if stem + other in beside]
    return []


def is_part(name: str, beside: Collection[str]) -> bool:
    """Whether a file has the voxels of a header."""
    stem = name
    while (shorter := Path(stem).stem) != stem:
        stem = shorter
        headers = (stem + ending for ending in (".hdr", ".hdr.gz", *HEADER_ENDINGS))
        if any(header in beside and name in parts_of(header, beside) for header in headers):
            return True
    return False


def may_be_dicom(name: str, beside: Collection[str]) -> bool:
    """Whether a name is that of a DICOM file: by its ending, or because the ending is unknown."""
    lower = name.lower()
    if lower.endswith(DICOM_ENDINGS):
        return True
    if lower.endswith((*NIFTI_ENDINGS, *ITK_ENDINGS, *VOXEL_ENDINGS, ".hdr", ".zip")):
        return lower.endswith(".img") and not is_part(name, beside)
    return lower not in NO_SCANS and KNOWN_TYPES.guess_type(name) == (None, None)
