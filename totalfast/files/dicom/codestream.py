"""Size of a compressed plane, from its own header; decoders take memory for that size.

Knows JPEG, JPEG-LS, JPEG 2000 and RLE, not DICOM's files.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

START_OF_IMAGE, START_OF_SCAN, END_OF_IMAGE = 0xD8, 0xDA, 0xD9
JPEG_FRAMES = frozenset({*range(0xC0, 0xD0), 0xF7}) - {0xC4, 0xC8, 0xCC}
"""Markers of a JPEG frame's header (ITU-T T.81, table B.1), and of JPEG-LS's (T.87)."""

WITHOUT_LENGTH = frozenset({0x01, *range(0xD0, 0xD9)})
"""JPEG markers that no segment follows."""

CODESTREAM = b"\xff\x4f\xff\x51"
"""JPEG 2000 (ITU-T T.800): start of the codestream, and the marker of its size."""

BOXES = b"\x00\x00\x00\x0cjP  "
"""First box of a JP2 file, which some scanners store instead of the codestream alone."""

RLE_GROWTH = 4
"""Largest ratio of an RLE plane to its pixels. The worst encoder doubles the pixels."""

RLE_HEADER = 64
"""Bytes."""


def compressed_sizes(plane: bytes) -> list[tuple[int, int, int]]:
    """Sizes (rows, columns, samples per pixel) in the header of a JPEG or JPEG 2000 plane.

    There are several if a file around the codestream has its own. The list is empty if no size was
    found.
    """
    try:
        if plane.startswith(BOXES):
            return list(_box_sizes(plane))
        if plane.startswith(CODESTREAM):
            return [_jpeg_2000_size(plane)]
        return list(_jpeg_sizes(plane))
    except (IndexError, struct.error):
        return []


def rle_is_too_long(plane: bytes, pixel_bytes: int) -> bool:
    """Whether an RLE plane is longer than its pixels need; it can unpack to 64 times its length."""
    return len(plane) > RLE_GROWTH * pixel_bytes + RLE_HEADER


def _jpeg_sizes(plane: bytes) -> Iterator[tuple[int, int, int]]:
    """Sizes of all frame headers before the first scan."""
    place = 0
    while place < len(plane):
        if plane[place] != 0xFF:
            return
        marker = plane[place + 1]
        if marker == 0xFF:  # fill byte
            place += 1
            continue
        if marker in (START_OF_SCAN, END_OF_IMAGE):
            return
        place += 2
        if marker in WITHOUT_LENGTH:
            continue
        if marker in JPEG_FRAMES:
            _, rows, columns, samples = struct.unpack_from(">BHHB", plane, place + 2)
            yield rows, columns, samples
        (length,) = struct.unpack_from(">H", plane, place)
        place += length


def _jpeg_2000_size(plane: bytes, start: int = 0) -> tuple[int, int, int]:
    x_end, y_end, x_start, y_start = struct.unpack_from(">4I", plane, start + 8)
    (samples,) = struct.unpack_from(">H", plane, start + 40)
    return y_end - y_start, x_end - x_start, samples


def _box_sizes(plane: bytes) -> Iterator[tuple[int, int, int]]:
    """Sizes in the image header box of a JP2 file, and in its codestream."""
    place = 0
    while place < len(plane):
        length, kind = struct.unpack_from(">I4s", plane, place)
        content = place + 8
        if length == 1:  # the length follows, in 8 bytes
            (length,) = struct.unpack_from(">Q", plane, content)
            content += 8
        if kind == b"jp2h":  # holds boxes itself, the first of which is the image header
            rows, columns, samples = struct.unpack_from(">IIH", plane, content + 8)
            yield rows, columns, samples
        if kind == b"jp2c":
            if plane.startswith(CODESTREAM, content):
                yield _jpeg_2000_size(plane, content)
            return
        if length < 8:  # 0: up to the end of the file
            return
        place += length
