from __future__ import annotations

import gzip
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from isal import isal_zlib

from totalfast.files import gzip_member
from totalfast.files.gzip_member import ZERO_RUN, compress, join, member, zeros

PIECES = st.lists(st.one_of(st.binary(max_size=300), st.integers(0, 3 * ZERO_RUN)), max_size=6)


@settings(deadline=None)  # compressing long runs takes longer on busy machines
@given(PIECES)
def test_any_mixture_is_one_member_with_the_right_checksum(parts):
    pieces = [zeros(part) if isinstance(part, int) else compress(part) for part in parts]
    expected = b"".join(bytes(part) for part in parts)
    written = b"".join(member(join(pieces)))
    assert gzip.decompress(written) == expected
    decoder = zlib.decompressobj(zlib.MAX_WBITS | 16)
    decoder.decompress(written)
    assert decoder.eof
    assert decoder.unused_data == b""


@pytest.mark.parametrize("length", [0, 1, ZERO_RUN - 1, ZERO_RUN, ZERO_RUN + 1, 7 * ZERO_RUN + 5])
def test_zeros_decompress_to_zeros(length):
    assert gzip.decompress(b"".join(member(zeros(length)))) == bytes(length)
    assert zeros(length).length == length


def test_a_long_run_of_zeros_is_small_and_compressed_once():
    first, second = zeros(200 * ZERO_RUN), zeros(200 * ZERO_RUN)
    assert first.blocks[0] is second.blocks[0]
    assert sum(map(len, first.blocks)) < 200 * ZERO_RUN / 500


@pytest.mark.parametrize("next_page", [0, 1])  # the stream lies in the object, less than 64 KB on
def test_equal_data_give_equal_bytes_wherever_the_compressor_lies(next_page, monkeypatch):
    """ISA-L hashes the third byte of a stream by its own address: see ``gzip_member.START``."""
    settings = (gzip_member.LEVEL, isal_zlib.DEFLATED, -isal_zlib.MAX_WBITS)
    encoders = [isal_zlib.compressobj(*settings) for _ in range(8)]  # at eight addresses
    word = _bytes_in_the_bucket_of((id(encoders[0]) >> 16) + next_page)
    data = b"\xf0\xf1" + 2 * (word + bytes(range(100, 200))) + bytes(3000)
    results = set()
    for encoder in encoders:
        monkeypatch.setattr(isal_zlib, "compressobj", lambda *_, encoder=encoder: encoder)
        results.add(b"".join(compress(data).blocks))
    assert len(results) == 1


def _bytes_in_the_bucket_of(page: int) -> bytes:
    """Find four bytes of which ISA-L's hash (CRC-32C, 8,192 buckets) is that of a number."""
    wanted = _crc32c(page & 0xFFFFFFFF) % 8192
    return next(
        value.to_bytes(4, "little")
        for value in range(0x01010101, 0xFFFFFFFF, 65_537)
        if _crc32c(value) % 8192 == wanted
    )


def _crc32c(value: int) -> int:
    for _ in range(32):
        value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
    return value
