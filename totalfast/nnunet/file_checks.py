"""What SimpleITK, nnU-Net's reader and writer, does not check: truncated files, NaN, names."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from totalfast.files.gunzip import unpack
from totalfast.files.stored_voxels import GZIP_MAGIC

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PART = 1 << 22
"""Voxels that are looked at at a time."""


def check_voxels(path: Path) -> tuple[int, int] | None:
    """Refuse a truncated or damaged NIfTI file; count its voxels that are NaN or infinite.

    SimpleITK reads a truncated file without an error, and the voxels that are missing get random
    values. It also writes truncated files without an error if the disk is full. NaN and infinity
    are read as 0.

    Returns
    -------
        Number of voxels that are NaN or infinite, and number of all voxels. None if nothing is
        known about the file, because nibabel can't read its header. Files of other formats are not
        looked at: (0, 0).

    Raises
    ------
    OSError
        If the file does not exist, or is shorter than its header promises.
    EOFError, ValueError
        If its gzip data are damaged.
    """
    import nibabel as nib
    import numpy as np
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError

    if not path.name.lower().endswith((".nii", ".nii.gz")):
        return 0, 0
    try:
        stored = nib.load(path).dataobj
    except (ImageFileError, HeaderDataError):
        return None
    count = math.prod(stored.shape)
    needed = stored.offset + count * stored.dtype.itemsize
    with path.open("rb") as stream:
        is_packed = stream.read(2) == GZIP_MAGIC
    # One byte more than needed, so that the checksum behind the last byte is verified.
    contents = unpack(path.read_bytes(), needed + 1) if is_packed else None
    size = path.stat().st_size if contents is None else len(contents)
    if size < needed:
        raise OSError(f"it ends after {size} of {needed} bytes")
    if stored.dtype.kind != "f" or not count:
        return 0, count
    voxels: NDArray[np.floating]
    if contents is None:
        voxels = np.memmap(path, stored.dtype, "r", stored.offset, count)
    else:
        voxels = np.frombuffer(contents, stored.dtype, count, stored.offset)
    parts = (voxels[start : start + PART] for start in range(0, count, PART))
    return sum(len(part) - int(np.isfinite(part).sum()) for part in parts), count


def is_utf8(path: str) -> bool:
    """Whether a path can be given to SimpleITK, which ends the process if it is not UTF-8."""
    try:
        path.encode()
    except UnicodeEncodeError:  # Python keeps undecodable bytes as surrogates
        return False
    return True
