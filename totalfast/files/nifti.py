"""Open NIfTI files by their content: header, place of the voxels, compression.

nibabel reads by the file's ending and believes the header. Here the header is compared with the
file, repaired where only one reading is possible, and refused in one line elsewhere.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING

import nibabel as nib
import numpy as np

from totalfast.errors import InputError
from totalfast.files.itk import check_axes
from totalfast.files.itk_header import MOST_PER_BYTE
from totalfast.files.nifti_header import read_extensions, repair_orientation
from totalfast.files.stored_voxels import GZIP_MAGIC, StoredVoxels, unpacked

if TYPE_CHECKING:
    from typing import TypeAlias

    Image: TypeAlias = nib.Nifti1Image
    Header: TypeAlias = nib.Nifti1Header

logger = logging.getLogger(__name__)

FIRST_BYTES = 1 << 16
HEADER_BYTES = 1024
"""Bytes of a file, and of a gzip stream in it, that are read to find its header, and bytes that the
innermost stream is unpacked to."""

LARGEST_EXTENSIONS = 1 << 24
"""Bytes of header extensions that are read at most."""

FLAG_BYTES = 4
"""Bytes between header and voxels that tell whether there are extensions."""

MOST_LAYERS = 2
"""Times that a file may be compressed; some programs compress what is compressed already."""

NIFTI_2_SIZES = (b"\x1c\x02\0\0", b"\0\0\x02\x1c")
NIFTI_1_SIZES = (b"\x5c\x01\0\0", b"\0\0\x01\x5c")
"""First bytes of a header in both byte orders: its size, 540 or 348."""

NIFTI_1: tuple[type[Image], ...] = (nib.Nifti1Image, nib.Nifti1Pair)
NIFTI_2: tuple[type[Image], ...] = (nib.Nifti2Image, nib.Nifti2Pair)
"""nibabel's classes of single files and of pairs."""

NIFTI_1_MAGIC = (b"n+1\0", b"ni1\0")

OTHER_CONTENT = {
    b"version https://git-lfs": "a pointer of Git LFS, not the scan; run 'git lfs pull'",
    b"NRRD": "a NRRD file; its name must end in .nrrd",
    b"ObjectType": "a MetaImage file; its name must end in .mha or .mhd",
    b"PK\x03\x04": "a zip file",
    b"<": "a web page or XML; the download may have failed",
    b"{": "JSON; the download may have failed",
    b"BZh": "compressed by bzip2; unpack it first",
    b"\xfd7zXZ": "compressed by xz; unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed by zstd; unpack it first",
    b"../.git/annex": "a pointer of git-annex, not the scan; run 'git annex get'",
    b"/annex/objects": "a pointer of git-annex, not the scan; run 'git annex get'",
}
"""What else a file with a NIfTI ending holds, by its first bytes."""

QUIET = logging.Logger("nibabel's reports", logging.CRITICAL + 1)
"""Receives nibabel's reports of what it repairs; totalfast's own name the file."""


@np.errstate(all="ignore")  # damaged headers hold NaN and numbers beyond float32
def open_nifti(content: Path | bytes, name: str, *, voxels: Path | None = None) -> Image:
    """Open a NIfTI-1 or NIfTI-2 file without reading its voxels.

    Parameters
    ----------
    content
        Path of the file, or its bytes; plain or compressed by gzip, whatever its ending.
    name
        Name of the file, for messages.
    voxels
        The file with the voxels, if ``content`` is the header of a pair.

    Raises
    ------
    InputError
        If it is another file, or its header contradicts itself or the file.
    ValueError, OSError
        If the file can't be read or unpacked.
    """
    layers, head = _peel(content, name)
    kind = _kind(head, name, is_pair=voxels is not None)
    header = kind.header_class(head[: kind.header_class.template_dtype.itemsize], check=False)
    dtype = header.get_data_dtype()
    shape = tuple(int(size) for size in header.get_data_shape())
    if min(shape, default=0) < 0:
        raise InputError(f"{name} has a header with a negative size: {shape}.")
    data, data_layers = content, layers
    if voxels is not None:
        data, data_layers = voxels, _peel(voxels, name)[0]
    first = 0 if voxels is not None else len(header.binaryblock) + FLAG_BYTES
    offset = _find_voxels(
        data, data_layers, header, name, first=first, size=math.prod(shape) * dtype.itemsize
    )
    header["vox_offset"] = 0  # writers set it
    header.check_fix(logger=QUIET)
    repair_orientation(header, name)
    if voxels is None:
        block = _extension_bytes(header, content, layers, head, offset)
        header.extensions.extend(read_extensions(block, header, name))
    slope, inter = header.get_slope_inter()
    proxy = StoredVoxels(
        content=data,
        layers=data_layers,
        offset=offset,
        shape=shape,
        dtype=dtype,
        slope=1.0 if slope is None else float(slope),
        inter=0.0 if inter is None else float(inter),
    )
    check_axes(shape, name)
    header = nib.Nifti1Header.from_header(header, check=False)
    header.check_fix(logger=QUIET)
    image = nib.Nifti1Image(proxy, header.get_best_affine(), header)
    image.file_map["image"].filename = str(data) if isinstance(data, Path) else None
    return image


def _peel(content: Path | bytes, name: str) -> tuple[int, bytes]:
    """Return the number of gzip layers, and the first unpacked bytes."""
    if isinstance(content, Path):
        if not content.is_file():
            raise InputError(f"{content} is no regular file.")
        with content.open("rb") as file:
            head = file.read(FIRST_BYTES)
    else:
        head = content[:FIRST_BYTES]
    layers = 0
    while head.startswith(GZIP_MAGIC) and layers <= MOST_LAYERS:
        layers += 1
        inner = unpacked(head, 1, HEADER_BYTES)
        is_nested = inner.startswith(GZIP_MAGIC)
        head = unpacked(head, 1, FIRST_BYTES) if is_nested else inner
    if layers > MOST_LAYERS:
        raise InputError(f"{name} is compressed by gzip more than {MOST_LAYERS} times.")
    return layers, head


def _kind(head: bytes, name: str, *, is_pair: bool) -> type[Image]:
    """Return nibabel's class for a header."""
    for begin, what in OTHER_CONTENT.items():
        if head.startswith(begin):
            raise InputError(f"{name} is not a readable NIfTI file: it is {what}.")
    if head[128:132] == b"DICM":
        raise InputError(f"{name} is not a readable NIfTI file: it is a DICOM file.")
    if len(head) >= 540 and head[:4] in NIFTI_2_SIZES:
        return NIFTI_2[is_pair]
    if len(head) >= 348 and head[344:348] in NIFTI_1_MAGIC:
        return NIFTI_1[is_pair]
    if len(head) >= 348 and head[:4] in NIFTI_1_SIZES:
        raise InputError(
            f"{name} is not a readable NIfTI file: it has the header of an Analyze 7.5 file, which "
            "has no orientation. Convert it to NIfTI with a program that knows its orientation."
        )
    what = "it is empty" if not head else f"it begins with {head[:8].hex(' ')}"
    raise InputError(f"{name} is not a readable NIfTI file: {what}.")


def _find_voxels(
    data: Path | bytes, layers: int, header: Header, name: str, *, first: int, size: int
) -> int:
    """Return the first byte of the voxels.

    A wrong vox_offset is replaced only if the voxels fill the file exactly behind the header:
    nibabel takes its value, nifti_clib (ITK, FSL) at least 348, and most writers mean 352.
    """
    offset = float(header["vox_offset"])
    length = data.stat().st_size if isinstance(data, Path) else len(data)
    most = length * MOST_PER_BYTE**layers
    if size > most:
        raise InputError(
            f"{name} is damaged or truncated: its header promises {size} bytes of voxels, and the "
            f"file can hold at most {most}."
        )
    if math.isfinite(offset) and first <= offset <= most - size:
        return int(offset)
    if layers:
        length = len(unpacked(data, layers, first + size + 1))
    for start in (first, first - FLAG_BYTES):
        if start >= 0 and length == start + size:
            logger.warning(
                "WARNING: the header of %s puts its voxels at byte %g; they begin at byte %d.",
                name,
                offset,
                start,
            )
            return start
    if math.isfinite(offset) and offset >= first:
        have = max(length - int(offset), 0)
        raise InputError(
            f"{name} is damaged or truncated: it has {have} of {size} bytes of voxels behind "
            f"vox_offset, {offset:g}."
        )
    raise InputError(
        f"{name} has a header whose vox_offset is {offset:g}; voxels can't begin there, and where "
        "they begin is not known."
    )


def _extension_bytes(
    header: Header, content: Path | bytes, layers: int, head: bytes, stop: int
) -> bytes:
    """Return the bytes between the header's flags and the voxels; none if there is no extension."""
    start = len(header.binaryblock) + FLAG_BYTES
    if stop <= start or head[start - FLAG_BYTES : start - FLAG_BYTES + 1] in (b"", b"\0"):
        return b""
    stop = min(stop, start + LARGEST_EXTENSIONS)
    if stop > len(head):
        if layers == 0 and isinstance(content, Path):
            with content.open("rb") as file:
                head = file.read(stop)
        else:
            head = unpacked(content, layers, stop)
    return head[start:stop]


def partner_of(path: Path) -> Path | None:
    """Return the other file of a ``.hdr``/``.img`` pair; None for other files."""
    for ending, other in ((".hdr", ".img"), (".img", ".hdr")):
        for packed in ("", ".gz"):
            if path.name.lower().endswith(ending + packed):
                stem = path.name[: -len(ending + packed)]
                for name in (stem + other + packed, stem + other, stem + other + ".gz"):
                    if path.with_name(name).exists():
                        return path.with_name(name)
    return None


def as_stored(image: Image) -> Image:
    """Return a file that nibabel opened with voxels that are read here."""
    proxy = image.dataobj
    path = getattr(proxy, "file_like", None)
    if not nib.is_proxy(proxy) or not isinstance(path, str | Path) or proxy.order != "F":
        return image
    layers, _ = _peel(Path(path), Path(path).name)
    voxels = StoredVoxels(
        content=Path(path),
        layers=layers,
        offset=int(proxy.offset),
        shape=tuple(proxy.shape),
        dtype=np.dtype(proxy.dtype),
        slope=float(proxy.slope),
        inter=float(proxy.inter),
    )
    return type(image)(voxels, image.affine, image.header, file_map=image.file_map)
