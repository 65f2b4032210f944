"""What SimpleITK, nnU-Net's reader and writer, does not check: truncated files, unusual names."""

from __future__ import annotations

import math
from pathlib import Path

from totalfast.files.gunzip import unpack
from totalfast.files.stored_voxels import GZIP_MAGIC


def check_complete(path: Path) -> bool:
    """Refuse a truncated or damaged NIfTI file. Files of other formats are not looked at.

    SimpleITK reads a truncated file without an error, and the voxels that are missing get random
    values. It also writes truncated files without an error if the disk is full.

    Returns
    -------
        False if nothing is known about the file, because nibabel can't read its header.

    Raises
    ------
    OSError
        If the file does not exist, or is shorter than its header promises.
    EOFError, ValueError
        If its gzip data are damaged.
    """
    import nibabel as nib
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError

    if not path.name.lower().endswith((".nii", ".nii.gz")):
        return True
    try:
        stored = nib.load(path).dataobj
    except (ImageFileError, HeaderDataError):
        return False
    needed = stored.offset + math.prod(stored.shape) * stored.dtype.itemsize
    with path.open("rb") as stream:
        is_packed = stream.read(2) == GZIP_MAGIC
    # One byte more than needed, so that the checksum behind the last byte is verified.
    size = len(unpack(path.read_bytes(), needed + 1)) if is_packed else path.stat().st_size
    if size < needed:
        raise OSError(f"it ends after {size} of {needed} bytes")
    return True


def is_utf8(path: str) -> bool:
    """Whether a path can be given to SimpleITK, which ends the process if it is not UTF-8."""
    try:
        path.encode()
    except UnicodeEncodeError:  # Python keeps undecodable bytes as surrogates
        return False
    return True
