"""Headers of NRRD and MetaImage files, with voxels inside and in files beside."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np
import SimpleITK as sitk  # noqa: N813 - as everyone calls it

from fuzzing.case import Case, Place
from fuzzing.damage import damage_bytes
from fuzzing.scans import NAME, Scan, Scans

if TYPE_CHECKING:
    import random

WORDS = [
    *b"nan inf -1 0 3 4 10 11 300 1e400 1e-300 99999999999 2147483648 -2147483649".split(),
    *b"LIST LOCAL True False left big block .. /dev/zero ??? (1,2) (nan,0,0) \xff\xfe".split(),
    *b"raw ascii hex gzip bzip2 none MET_FLOAT MET_USHORT double int64 uint8".split(),
    *b"%d %s%n %1000d".split(),
    *(b"scan_%03d.raw 1 9 1", b"scan%d.raw 1 999999999 1", b"scan%d.raw 1 6 1 2", b"%d%d 1 2 1"),
    *(b"", b"1 " * 200, b"9" * 300, b"x" * 900, b"x" * 5000, b"x" * 40000),
]
"""Words that those of a header are exchanged with."""


class Itk(Scans):
    """NRRD and MetaImage files with damaged headers, with voxels inside and in files beside."""

    def __init__(self, place: Place) -> None:
        sitk.ProcessObject.SetGlobalWarningDisplay(False)
        self._folder = place.work
        voxels = np.arange(6 * 7 * 8, dtype=np.int16).reshape(6, 7, 8)
        self._bases: list[tuple[str, bytes, Scan]] = []
        for name, packed in (
            *(("scan.nrrd", False), ("packed.nrrd", True), ("scan.nhdr", False)),
            *(("scan.mha", False), ("packed.mha", True), ("beside.mhd", False)),
        ):
            image = sitk.GetImageFromArray(voxels)
            image.SetSpacing((1.5, 2.0, 3.0))
            image.SetOrigin((10.0, -20.0, 30.0))
            path = place.work / name
            sitk.WriteImage(image, str(path), packed)
            self._bases.append((name, path.read_bytes(), self.read(Case(source=path, note=""))))

    def damage(self, chance: random.Random) -> Case:
        """Exchange words and lines of a header, or add a comment, which has no effect."""
        name, content, scan = chance.choice(self._bases)
        path = self._folder / f"damaged_{name}"
        head, rest = _split(content)
        if chance.random() < 0.1:
            comment = _comment(name, chance)
            path.write_bytes(_with_line(head, comment) + rest)
            return Case(source=path, note=repr(comment), expected=scan, must_read=True)
        damaged = _damage_text(head, chance) + rest
        if chance.random() < 0.1:
            damaged = damage_bytes(damaged, chance)
        path.write_bytes(damaged)
        return Case(source=path, note=repr(damaged[: len(head)]))


def _split(content: bytes) -> tuple[bytes, bytes]:
    """Split a file into the lines of its header and the rest."""
    blank, local = content.find(b"\n\n"), content.find(b"LOCAL\n")
    end = blank + 1 if content.startswith(b"NRRD") and blank >= 0 else local + 6 * (local >= 0)
    end = end if end > 0 else len(content)
    return content[:end], content[end:]


def _comment(name: str, chance: random.Random) -> bytes:
    text = chance.choice((NAME.encode(), b"encoding: gzip", b"a = b", b"\xc3\xa9", b"x" * 200))
    if name.endswith((".nrrd", ".nhdr")):
        return b"# " + text if chance.random() < 0.5 else b"comment:=" + text
    return b"Comment = " + text


def _with_line(head: bytes, line: bytes) -> bytes:
    """Add a line behind the first one."""
    first, _, others = head.partition(b"\n")
    return first + b"\n" + line + b"\n" + others


def _damage_text(head: bytes, chance: random.Random) -> bytes:
    for _ in range(chance.choice((1, 1, 2, 4))):
        lines = head.split(b"\n")
        at, action = chance.randrange(len(lines)), chance.random()
        if action < 0.6:
            words = list(re.finditer(rb"[^\s=:(),]+", lines[at]))
            if words:
                word = chance.choice(words)
                new = chance.choice(WORDS)
                lines[at] = lines[at][: word.start()] + new + lines[at][word.end() :]
        elif action < 0.75:
            del lines[at]
        elif action < 0.9:
            lines.insert(chance.randrange(len(lines)), chance.choice(lines))
        else:
            lines[at] = damage_bytes(lines[at], chance)
        head = b"\n".join(lines)
    return head
