"""Check the text of a NRRD or MetaImage header before SimpleITK reads the file.

SimpleITK believes the header: it opens the data files that are named, and some numbers end the
process.
"""

from __future__ import annotations

import re
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

from totalfast.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MOST_PER_BYTE = 1040
"""Bytes that a byte of deflate data unpacks to at most: 1032, and some for the block's header."""

HEADER_BYTES = 1 << 20
"""Bytes of a file in which the fields of its header are looked for."""

NRRD_END = re.compile(rb"\n\r?\n")
"""The empty line between header and voxels."""

MOST_DIMENSIONS = 10
"""MetaIO's arrays have this length; it does not compare it with the header's number."""

DATA_FILE = re.compile(rb"^(?:ElementDataFile\s*=|data ?file:)[ \t]*([^\r\n]*)\r?\n?", re.M | re.I)
ENCODING = re.compile(rb"^(?:CompressedData\s*=|encoding:)[ \t]*([^\r\n]*)", re.M | re.I)
DIMENSIONS = re.compile(rb"^\s*NDims\s*[=:]\s*([^\r\n]*)", re.M)

LONGEST_LINE = 500
"""Bytes of a NRRD field. NrrdIO writes a line that it can't read into an array of some thousand
bytes. Comments, keys with values (``:=``) and the description in ``content`` may be longer."""

LONG_LINE = re.compile(rb"^(?!#|content:|[^\r\n]*?:=)[^\r\n]{%d,}" % (LONGEST_LINE + 1), re.M)

NUMBERED = re.compile(r"[^%]*%0?\d{0,2}d[^%]*")
"""A pattern of file names, which MetaIO and NrrdIO use as a format of C's printf."""

UNBOUNDED = (b"bzip2", b"bz2", b"ascii", b"text", b"txt", b"hex")
"""Encodings in which the size of the data does not bound the number of voxels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ItkHeader:
    """The beginning of a file with one of the endings of ``itk``."""

    path: Path
    text: bytes

    @classmethod
    def of(cls, path: Path) -> ItkHeader:
        """Read and check the text of a header.

        Raises
        ------
        InputError
            If data files are missing or no regular files, which could block for ever, or there are
            dimensions, lines or patterns that SimpleITK can't hold.
        """
        if not path.is_file():
            raise InputError(f"{path} is no regular file.")
        with path.open("rb") as file:
            start = file.read(HEADER_BYTES)
        text = NRRD_END.split(start, 1)[0] if start.startswith(b"NRRD") else start
        header = cls(path=path, text=text)
        header._check_dimensions()
        header._check_lines()
        header._check_data_files()
        return header

    def check_size(self, size: int) -> None:
        """Refuse a header that promises more bytes of voxels than its files can hold."""
        field = ENCODING.search(self.text)
        encoding = field[1].strip().lower() if field else b""
        if encoding in UNBOUNDED:
            return
        files = list(self._data_files())
        stored = sum(file.stat().st_size for file in files or [self.path])
        if not files and "%" in self._named():
            return
        if encoding in (b"true", b"gzip", b"gz"):
            stored *= MOST_PER_BYTE
        if stored < size:
            raise InputError(
                f"{self.path.name} is damaged or truncated: its header promises {size} bytes of "
                f"voxels, and its data can hold at most {stored}."
            )

    def _named(self) -> str:
        """What the header names as its data file."""
        field = DATA_FILE.search(self.text)
        return field[1].decode("utf-8", "replace").strip() if field else ""

    def _data_files(self) -> Iterator[Path]:
        """The files that hold the voxels, as far as the header names them one by one."""
        field, named = DATA_FILE.search(self.text), self._named()
        if field is None or named.upper() == "LOCAL" or "%" in named:
            return
        names = [named]
        if named.upper().startswith("LIST"):
            rest = self.text[field.end() :].decode("utf-8", "replace")
            names = [line.strip() for line in rest.split("\n") if line.strip()]
        for name in names:
            yield self.path.parent / name

    def _check_data_files(self) -> None:
        for file in self._data_files():
            try:
                is_file = stat.S_ISREG(file.stat().st_mode)
            except (OSError, ValueError):
                is_file = False
            if not is_file:
                raise InputError(
                    f"{self.path.name} names a file with its voxels that does not exist or is no "
                    f"regular file: {str(file)[:1000]!r}. Put it there, or convert the scan to one "
                    "file."
                )

    def _check_dimensions(self) -> None:
        for field in DIMENSIONS.finditer(self.text):
            number = field[1].strip()
            if not number.isdigit() or not 1 <= int(number[:9]) <= MOST_DIMENSIONS:
                raise InputError(
                    f"{self.path.name} has a damaged header: its number of dimensions (NDims) is "
                    f"{number[:20]!r}, but must be a number from 1 to {MOST_DIMENSIONS}."
                )

    def _check_lines(self) -> None:
        """Refuse what SimpleITK's readers copy without comparing its length with their arrays."""
        if self.text.startswith(b"NRRD") and (line := LONG_LINE.search(self.text)):
            raise InputError(
                f"{self.path.name} has a damaged header: a field has {len(line[0])} bytes, but "
                f"must have at most {LONGEST_LINE}: {line[0][:20]!r}."
            )
        named = self._named()
        if "%" in named and not NUMBERED.fullmatch(named):
            raise InputError(
                f"{self.path.name} has a damaged header: {named[:100]!r} is no pattern of file "
                "names; it must hold one %d, or a width such as %03d."
            )
