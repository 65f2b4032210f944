"""Build one standard gzip member from pieces that are compressed separately.

Masks are mostly long runs of zeros. Such a run is compressed once and then reused, and its checksum
is combined from known checksums.
"""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from isal import isal_zlib

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import TypeAlias

    Buffer: TypeAlias = bytes | memoryview

LEVEL = 1
"""ISA-L's level. Level 0 is 10 % faster, but its files of label maps are a third larger."""

START = 8
"""Bytes that are compressed as a block of their own, so that equal data give equal files.

ISA-L's fast loop takes the hash of a stream's third byte from an address in memory, so one file in
thousands has other bytes. So few bytes do not enter this loop. Not less than 4, or they leave no
history, and the next block starts the stream again.
"""

ZERO_RUN = 1 << 20
"""Length of the run of zeros that is compressed once."""

GZIP_HEADER = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff"
"""RFC 1952: deflate, no name, no time (so that equal masks give equal files), unknown system."""

FINAL_BLOCK = b"\x03\x00"
"""RFC 1951: an empty last block with fixed Huffman codes."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Byte-aligned deflate blocks without a last block; CRC-32 and length of the decoded bytes."""

    blocks: tuple[bytes, ...]
    crc: int
    length: int


def compress(data: Buffer) -> Piece:
    """Compress a buffer. Releases the GIL, so several threads can compress at the same time."""
    view = memoryview(data).cast("B")
    encoder = isal_zlib.compressobj(LEVEL, isal_zlib.DEFLATED, -isal_zlib.MAX_WBITS)
    blocks: list[bytes] = []
    for part in (view[:START], view[START:]):
        blocks += (encoder.compress(part), encoder.flush(isal_zlib.Z_SYNC_FLUSH))
    return Piece(blocks=tuple(blocks), crc=isal_zlib.crc32(view), length=len(view))


def zeros(length: int) -> Piece:
    """Compress ``length`` zeros in almost no time."""
    count, rest = divmod(length, ZERO_RUN)
    piece = Piece(blocks=(), crc=0, length=0)
    if count:
        run = _zero_run()
        piece = Piece(
            blocks=run.blocks * count, crc=_zeros_crc(count * ZERO_RUN), length=count * ZERO_RUN
        )
    return join((piece, compress(bytes(rest)))) if rest else piece


@functools.cache
def _zero_run() -> Piece:
    return compress(bytes(ZERO_RUN))


@functools.cache
def _zeros_crc(length: int) -> int:
    """CRC-32 of ``length`` zeros, computed from two halves."""
    if length <= ZERO_RUN:
        return int(isal_zlib.crc32(bytes(length)))
    half = length // 2
    return int(isal_zlib.crc32_combine(_zeros_crc(half), _zeros_crc(length - half), length - half))


def join(pieces: Iterable[Piece]) -> Piece:
    """Concatenate pieces."""
    blocks: list[bytes] = []
    crc, length = 0, 0
    for piece in pieces:
        blocks.extend(piece.blocks)
        crc = isal_zlib.crc32_combine(crc, piece.crc, piece.length) if length else piece.crc
        length += piece.length
    return Piece(blocks=tuple(blocks), crc=crc, length=length)


def member(piece: Piece) -> Sequence[bytes]:
    """Wrap a piece as a complete gzip file: header, blocks, checksum and length."""
    trailer = struct.pack("<II", piece.crc, piece.length & 0xFFFFFFFF)
    return (GZIP_HEADER, *piece.blocks, FINAL_BLOCK, trailer)
