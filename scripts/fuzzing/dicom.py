"""DICOM series and multi-frame files, plain and compressed, and the folders that they lie in."""

from __future__ import annotations

import shutil
import struct
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from fuzzing.case import Case, Place, WrongResultError
from fuzzing.damage import damage_bytes
from fuzzing.dicom_bases import IDENTIFYING, undamaged_series
from fuzzing.scans import Scan, same_scan
from totalfast.files.dicom.read import open_series
from totalfast.files.read import read_image

if TYPE_CHECKING:
    import random
    from collections.abc import Mapping

TEXTS = (
    *b"nan inf -1 0 1e400 1\\2 1\\2\\3\\4\\5\\6\\7 0\\0\\1\\0\\0\\1 99999999999 0.0001".split(),
    *b"MR SEG LOCALIZER MONOCHROME1 ISO_IR\\999 1.2.840.10008.1.2.1 1.2.840.10008.1.2.4.90".split(),
    *(b"", b" ", b"\\\\\\", b"\xff\xfe\x00", b"ISO 2022 IR 149", b"x" * 300, b"\0\0", b"\0\0\0\0"),
    *(b"\xff\xff", b"\xff\xff\xff\x7f", b"\x10\x00", b"\x20\x00", b"\x0c\x00"),
)
"""Values that elements are given."""

JUNK = (
    *(b"", b"text\n", bytes(200), b"PK\x03\x04", b"\x00\x05\x16\x07" + bytes(100)),
    *(bytes(128) + b"DICM", bytes(128) + b"DICM\x02\x00\x00\x00UL\x04\x00\xff\xff\xff\xff"),
)
"""Content of other files in a series' folder."""

LONG_VRS = tuple(b"OB OD OF OL OW SQ UC UN UR UT OV SV UV".split())
"""VRs with two reserved bytes and a length of four bytes."""


def read_series(source: Path) -> Scan:
    """Read a series as a run does: its voxels and its geometry."""
    with open_series(source) as series:
        image = read_image(series.image)
        with np.errstate(all="ignore"):
            scan = Scan(np.array(image.scale(image.stored)), np.asarray(image.grid.affine))
        if len(series.slices) not in image.grid.shape:
            raise WrongResultError("a volume of another number of slices")
    if min(scan.intensities.shape) < 1 or not np.all(np.isfinite(scan.affine)):
        raise WrongResultError("an empty image, or an affine that is not finite")
    if not abs(np.linalg.det(scan.affine)) > 0:
        raise WrongResultError("a singular affine")
    return scan


class Dicom:
    """Series in folders, with damaged elements, bytes, files and folders."""

    slack_mb = 64

    def __init__(self, place: Place) -> None:
        Image.init()  # imports Pillow's plugins, which it would do at the first unknown image
        self._folder = place.work
        self._bases = []
        for base in undamaged_series(place.work):
            source = self._write(base.files)
            self._bases.append(replace(base, scan=self.read(Case(source=source, note="none"))))

    def _write(self, files: Mapping[str, bytes]) -> Path:
        shutil.rmtree(self._folder / "series", ignore_errors=True)
        folder = self._folder / "series"
        for name, content in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return folder

    def damage(self, chance: random.Random) -> Case:
        """Damage elements or bytes of a file or of all files, or the folder."""
        base = chance.choice(self._bases)
        files, notes = dict(base.files), [base.name]
        action = chance.random()
        has_effect = True
        if action < 0.15:
            has_effect = False
            notes.append(_add_files(files, chance))
        elif action < 0.3 and base.splits:
            has_effect = False
            names = list(files) if chance.random() < 0.5 else [chance.choice(list(files))]
            seed = chance.random()
            notes.extend(_damage_identity(files, name, chance, seed) for name in names)
        elif action < 0.4:
            notes.append(_damage_folder(files, chance))
        else:
            names = list(files) if chance.random() < 0.3 else [chance.choice(list(files))]
            for name in names:
                if base.splits and chance.random() < 0.6:
                    files[name], note = _damage_elements(files[name], chance)
                else:
                    files[name], note = damage_bytes(files[name], chance), "bytes"
                notes.append(note)
        source = self._write(files)
        if not has_effect and chance.random() < 0.2:
            (source / "loop").symlink_to(source, target_is_directory=True)
        if len(files) == 1 and chance.random() < 0.5:
            source = source / next(iter(files))
        return Case(
            source=source,
            note=", ".join(notes),
            expected=None if has_effect else base.scan,
            must_read=not has_effect,
        )

    def read(self, case: Case) -> Scan:
        """Read a series."""
        return read_series(case.source)

    def equal(self, result: Scan, expected: Scan) -> bool:
        """Compare intensities and affine."""
        return same_scan(result, expected)


def elements(content: bytes) -> list[bytes]:
    """Split an explicit little endian file at the elements of its top level.

    The first part is everything up to the end of the meta information; an element of undefined
    length, and what follows it, is the last part.
    """
    (length,) = struct.unpack("<I", content[140:144])
    at = 144 + length
    parts = [content[:at]]
    while at + 8 <= len(content):
        is_long = content[at + 4 : at + 6] in LONG_VRS
        head = 12 if is_long else 8
        (length,) = struct.unpack_from(
            "<I" if is_long else "<H", content, at + head - (4 if is_long else 2)
        )
        end = len(content) if length == 0xFFFFFFFF else at + head + length
        parts.append(content[at:end])
        at = end
    return parts


def _with_value(element: bytes, value: bytes) -> bytes:
    """Give an element another value, of an even length, and its length."""
    value += b" " * (len(value) % 2)
    if element[4:6] in LONG_VRS:
        return element[:8] + struct.pack("<I", len(value)) + value
    return element[:6] + struct.pack("<H", len(value) & 0xFFFF) + value


def _damage_elements(content: bytes, chance: random.Random) -> tuple[bytes, str]:
    parts, notes = elements(content), []
    for _ in range(chance.choice((1, 1, 2, 4))):
        at = chance.randrange(1, len(parts))
        element, action = parts[at], chance.random()
        tag = element[:4].hex()
        if action < 0.5 and element[4:6] != b"SQ":
            parts[at] = _with_value(element, chance.choice((*TEXTS, chance.randbytes(4))))
            notes.append(f"value of {tag}")
        elif action < 0.65 and len(parts) > 2:
            del parts[at]
            notes.append(f"no {tag}")
        elif action < 0.75:
            parts.insert(at, element)
            notes.append(f"twice {tag}")
        elif action < 0.8:
            other = chance.randrange(1, len(parts))
            parts[at], parts[other] = parts[other], parts[at]
            notes.append(f"{tag} at another place")
        else:
            parts[at] = damage_bytes(element, chance)
            notes.append(f"bytes of {tag}")
    return b"".join(parts), " ".join(notes)


def _damage_identity(files: dict[str, bytes], name: str, chance: random.Random, seed: float) -> str:
    """Give an attribute another value that nothing depends on."""
    from pydicom.datadict import tag_for_keyword

    keyword = list(IDENTIFYING)[int(seed * len(IDENTIFYING))]
    tag = tag_for_keyword(keyword) or 0
    wanted = struct.pack("<HH", tag >> 16, tag & 0xFFFF)
    value = chance.choice((*TEXTS, chance.randbytes(8), b"\x1b$B", "é".encode("latin-1")))
    parts = elements(files[name])
    files[name] = b"".join(
        _with_value(part, value) if part[:4] == wanted else part for part in parts
    )
    return keyword


def _add_files(files: dict[str, bytes], chance: random.Random) -> str:
    """Add files that are no slices, or move slices into folders."""
    names = ("readme.txt", "._slice000.dcm", "DICOMDIR", "sub/more", "a b/c.dcm", "Ö.dcm", "z.zip")
    for name in chance.sample(names, chance.choice((1, 2))):
        files[name] = chance.choice(JUNK)
    if chance.random() < 0.3:
        name = chance.choice([name for name in files if name.endswith(".dcm")])
        files[f"moved/{Path(name).name}"] = files.pop(name)
    return "other files"


def _damage_folder(files: dict[str, bytes], chance: random.Random) -> str:
    """Remove, repeat, exchange, cut or empty files."""
    name, other = chance.choice(list(files)), chance.choice(list(files))
    action = chance.choice(("remove", "repeat", "exchange", "cut", "empty", "series"))
    if action == "remove":
        del files[name]
    elif action == "repeat":
        files[f"copy of {name}"] = files[name]
    elif action == "exchange":
        files[name], files[other] = files[other], files[name]
    elif action == "cut":
        files[name] = files[name][: chance.randrange(len(files[name]))]
    elif action == "empty":
        files[name] = b""
    else:
        for each in list(files):
            files[f"second/{each}"] = files[each].replace(b"1.2.3.4", b"1.2.3.5")
    return action
