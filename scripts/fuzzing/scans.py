"""NIfTI headers, and gzip streams of NIfTI files."""

from __future__ import annotations

import gzip
import io
import itertools
import math
import struct
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import nibabel as nib
import numpy as np

from fuzzing.case import PATIENT, Case, Place, WrongResultError
from fuzzing.damage import damage_bytes
from totalfast.files.read import open_scan, read_image
from totalfast.files.write import _header_bytes, label_image

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from totalfast.scan import ScannerImage

NAME = "^".join(PATIENT)

WITHOUT_EFFECT = (
    *("data_type", "db_name", "extents", "session_error", "regular", "dim_info", "intent_p1"),
    *("intent_p2", "intent_p3", "intent_code", "slice_start", "slice_end", "slice_code", "cal_max"),
    *("cal_min", "slice_duration", "toffset", "glmax", "glmin", "descrip", "aux_file"),
    *("intent_name", "unused_str"),
)
"""Fields of NIfTI headers that neither voxels nor their places depend on."""

WHOLE = (0, 1, 2, 3, 4, 5, 7, 8, 16, 32, 64, 128, 256, 348, 352, 512, 540, 768, 1024, 1792, 2048)
"""Numbers that fields of whole numbers are set to: sizes, codes of datatypes, and offsets."""

REAL = (0.0, -0.0, 0.5, 1.0, -1.0, 1.001, 352.0, 1e-40, 1e38, -1e38, 1e300, math.inf, math.nan)

AFFINE = np.asarray([[0, -2.0, 0, 10], [1.5, 0, 0, -7], [0, 0, 3, 50], [0, 0, 0, 1]])
"""Affine of the NIfTI files."""

ONE_VOLUME = ((6, 5, 4), (6, 5, 4, 1), (5, 4, 1, 6))
SEVERAL = (4, 4, 4, 2)
"""Shape of several volumes, of which the first is read."""

TOLERANCE = 1e-3
"""Relative difference of an affine and of the one that is written, as float32 or a quaternion."""


class Scan(NamedTuple):
    """What was read: intensities (x, y, z), and the affine in mm."""

    intensities: NDArray[np.float64]
    affine: NDArray[np.float64]


class Scans:
    """Reads scans, and checks what was read."""

    slack_mb = 64

    def read(self, case: Case) -> Scan:
        """Read a scan as a run does, and write its header."""
        if hasattr(case.source, "seek"):
            case.source.seek(0)
        image = read_image(open_scan(case.source))
        with np.errstate(all="ignore"):
            scan = Scan(np.array(image.scale(image.stored)), np.asarray(image.grid.affine))
        _check(image)
        return scan

    def equal(self, result: Scan, expected: Scan) -> bool:
        """Compare intensities and affine."""
        return same_scan(result, expected)


def same_scan(one: Scan, other: Scan) -> bool:
    """Whether two scans have the same intensities and affine."""
    return all(np.array_equal(a, b, equal_nan=True) for a, b in zip(one, other, strict=True))


def _check(image: ScannerImage) -> None:
    """Check that the scan has a volume, and that its header is written as it was understood."""
    shape, affine = image.grid.shape, np.asarray(image.grid.affine)
    if image.stored.shape != shape or min(shape) < 1 or len(shape) != 3:
        raise WrongResultError("the shape of the voxels")
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    if not np.all(np.isfinite(affine)) or not abs(np.linalg.det(axes)) > 1e-7:
        raise WrongResultError("the affine is not finite or singular")
    zooms = np.asarray(image.zooms_mm, dtype=np.float64)
    if not np.all(np.isfinite(zooms)) or min(zooms) <= 0:
        raise WrongResultError("voxel sizes that are not positive")
    written = label_image(
        np.zeros(shape, np.uint8),
        affine=image.written_affine,
        header=image.header,
        names={1: "liver"},
    )
    content = _header_bytes(written) + bytes(math.prod(shape))
    again = nib.Nifti1Image.from_bytes(content)
    largest = float(np.abs(image.written_affine[:3]).max())
    if again.shape != shape:
        raise WrongResultError("the shape in the written header")
    if not np.allclose(again.affine, image.written_affine, rtol=TOLERANCE, atol=1e-4 * largest):
        raise WrongResultError("the affine in the written header")


@dataclass(frozen=True, kw_only=True)
class _Base:
    """An undamaged file: its bytes, and what must be read from it.

    ``pair_at`` is where the second file of a pair begins; None for single files.
    """

    content: bytes
    header: np.dtype[Any]
    pair_at: int | None
    scan: Scan | None = None


class Nifti(Scans):
    """NIfTI-1 and NIfTI-2 files and pairs, from a path or a stream, with damaged headers."""

    def __init__(
        self, place: Place, shapes: Sequence[tuple[int, ...]] = (*ONE_VOLUME, SEVERAL)
    ) -> None:
        self._place = place
        self.bases = [
            self._base(*each)
            for each in itertools.product(
                (nib.Nifti1Image, nib.Nifti1Pair, nib.Nifti2Image, nib.Nifti2Pair),
                "<>",
                (np.uint8, np.int16, np.float32, np.float64),
                shapes,
            )
        ]

    def _base(
        self, kind: type[nib.Nifti1Pair], order: str, dtype: type, shape: tuple[int, ...]
    ) -> _Base:
        header = kind.header_class(endianness=order)
        header.set_data_dtype(np.dtype(dtype).newbyteorder(order))
        voxels = np.arange(math.prod(shape)).reshape(shape).astype(header.get_data_dtype())
        image = kind(voxels, AFFINE, header)
        image.header.set_qform(AFFINE, 1)
        image.header.set_xyzt_units("mm")
        image.header["descrip"] = NAME
        image.header.extensions.append(nib.nifti1.Nifti1Extension(6, NAME.encode()))
        streams = {name: io.BytesIO() for name in sorted(dict(kind.files_types))}
        image.to_file_map(kind.make_file_map(streams))
        parts = [stream.getvalue() for stream in streams.values()]
        base = _Base(
            content=b"".join(parts),
            header=kind.header_class.template_dtype.newbyteorder(order),
            pair_at=len(streams["header"].getvalue()) if "header" in streams else None,
        )
        source = self._write(base, base.content)
        return replace(base, scan=self.read(Case(source=source, note="none")))

    def _write(self, base: _Base, content: bytes) -> Path:
        path = self._place.work / "scan.nii"
        if base.pair_at is not None:
            path = path.with_suffix(".hdr")
            path.with_suffix(".img").write_bytes(content[base.pair_at :])
            content = content[: base.pair_at]
        path.write_bytes(content)
        return path

    def damage(self, chance: random.Random) -> Case:
        """Set fields of a header; sometimes cut the file, add to it, or compress it."""
        base = chance.choice(self.bases)
        has_effect, notes = chance.random() < 0.8, []
        content = bytearray(base.content)
        names = list(base.header.names or ()) if has_effect else _without_effect(base.header)
        for _ in range(chance.choice((1, 1, 1, 2, 3, 6))):
            name = chance.choice(names)
            notes.append(name)
            _set_field(content, base.header, name, chance)
        damaged = bytes(content)
        if has_effect and chance.random() < 0.2:
            damaged = damage_bytes(damaged, chance)
            notes.append("bytes")
        elif base.pair_at is None and chance.random() < 0.1:
            damaged += chance.choice((b"\0", bytes(500), b"more"))
            notes.append("longer")
        source: Any = self._write(base, damaged)
        if base.pair_at is None and chance.random() < 0.4:
            packed = chance.random() < 0.5
            damaged = zlib.compress(damaged, 1, 31) if packed else damaged
            notes.append("gzip" if packed else "plain")
            source.write_bytes(damaged)
            source = io.BytesIO(damaged) if chance.random() < 0.5 else source
        return Case(
            source=source,
            note=", ".join(notes),
            expected=None if has_effect else base.scan,
            must_read=not has_effect,
        )


def _without_effect(header: np.dtype[Any]) -> list[str]:
    return [name for name in header.names or () if name in WITHOUT_EFFECT]


def _set_field(content: bytearray, header: np.dtype[Any], name: str, chance: random.Random) -> None:
    """Set one number of a field, or its text, in the file's byte order or, rarely, the other."""
    dtype, at = header.fields[name][:2]  # type: ignore[index]
    if dtype.subdtype:
        dtype, (count, *_) = dtype.subdtype
        at += dtype.itemsize * chance.randrange(count)
    if chance.random() < 0.1:
        dtype = dtype.newbyteorder()
    if chance.random() < 0.15 or dtype.kind == "S":
        value = chance.randbytes(dtype.itemsize)
    elif dtype.kind == "f":
        with np.errstate(over="ignore"):
            value = np.asarray(_real(chance)).astype(dtype).tobytes()
    else:
        whole = chance.choice((*WHOLE, -1, -2, 1 << (8 * dtype.itemsize - 1), -(1 << 31)))
        order = "little" if dtype.str[0] in "<|" else "big"
        value = (whole % (1 << 8 * dtype.itemsize)).to_bytes(dtype.itemsize, order)
    content[at : at + dtype.itemsize] = value


def _real(chance: random.Random) -> float:
    return chance.choice((*REAL, chance.uniform(-2, 2), chance.uniform(-500, 500)))


class Gzip(Scans):
    """Gzip streams that hold a NIfTI file: of several members, nested, with names, and bombs."""

    def __init__(self, place: Place) -> None:
        nifti = Nifti(place, ONE_VOLUME)
        self._bases = [base for base in nifti.bases if base.pair_at is None]
        self._path = place.work / "packed.nii.gz"
        zeros = zlib.compressobj(9, zlib.DEFLATED, 31)
        self._bomb = zeros.compress(self._bases[0].content + bytes(1 << 26)) + zeros.flush()

    def damage(self, chance: random.Random) -> Case:
        """Compress a file in an unusual way, and damage the stream."""
        base = chance.choice(self._bases)
        packed, notes = _packed(base.content, chance)
        if chance.random() < 0.2:
            packed = gzip.compress(packed, 1)
            notes.append("nested")
        must_read, action = True, chance.random()
        if action < 0.01:
            base, packed, notes = self._bases[0], self._bomb, ["64 MB behind the voxels"]
        elif action < 0.15:
            packed += chance.choice((bytes(5), b"more", chance.randbytes(9), b"\x1f\x8b"))
            notes.append("longer")
        elif action < 0.9:
            packed = damage_bytes(packed, chance)
            notes.append("bytes")
            must_read = False
        if chance.random() < 0.5:
            source: Any = io.BytesIO(packed)
        else:
            self._path.write_bytes(packed)
            source = self._path
        return Case(source=source, note=", ".join(notes), expected=base.scan, must_read=must_read)


def _packed(content: bytes, chance: random.Random) -> tuple[bytes, list[str]]:
    """Compress into one or several members, with the header fields that RFC 1952 allows."""
    cuts = sorted(chance.randrange(len(content)) for _ in range(chance.choice((0, 0, 0, 1, 3))))
    parts = [content[a:b] for a, b in itertools.pairwise([0, *cuts, len(content)])]
    members = [_member(part, chance) for part in parts]
    joint = chance.choice((b"", b"", b"\0", bytes(100))) if len(members) > 1 else b""
    return joint.join(members), [f"{len(members)} members"]


def _member(content: bytes, chance: random.Random) -> bytes:
    strategy = chance.choice((zlib.Z_DEFAULT_STRATEGY, zlib.Z_FIXED, zlib.Z_HUFFMAN_ONLY))
    packer = zlib.compressobj(chance.choice((0, 1, 6, 9)), zlib.DEFLATED, -15, 8, strategy)
    body = packer.compress(content) + packer.flush()
    flags, fields = 0, b""
    if chance.random() < 0.3:
        extra = chance.randbytes(chance.choice((0, 4, 300)))
        flags, fields = flags | 4, fields + struct.pack("<H", len(extra)) + extra
    if chance.random() < 0.3:
        flags, fields = flags | 8, fields + NAME.encode() + b"\0"
    if chance.random() < 0.3:
        flags, fields = flags | 16, fields + b"comment\0"
    head = b"\x1f\x8b\x08" + bytes([flags]) + chance.randbytes(4) + b"\0\xff" + fields
    if chance.random() < 0.3:
        head = head[:3] + bytes([flags | 2]) + head[4:]
        head += struct.pack("<H", zlib.crc32(head) & 0xFFFF)
    return head + body + struct.pack("<II", zlib.crc32(content), len(content))
