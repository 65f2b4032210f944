"""Gzip data are unpacked up to a limit."""

from __future__ import annotations

import gzip
import tracemalloc
import zlib

import pytest

from totalfast.files.gunzip import REST_BYTES, unpack

DATA = bytes(range(256)) * 500


def test_the_limit_and_members():
    packed = gzip.compress(DATA)
    assert unpack(packed, len(DATA)) == DATA
    assert unpack(packed, 10**9) == DATA
    assert unpack(packed, 1000) == DATA[:1000]
    two = gzip.compress(DATA[:700]) + b"\0\0\0" + gzip.compress(DATA[700:])
    assert unpack(two, len(DATA)) == DATA
    assert unpack(two, 800) == DATA[:800]
    for limit in (len(DATA), 2 * len(DATA)):
        assert unpack(packed + b"something else", limit) == DATA


def test_a_checksum_that_does_not_fit_is_an_error():
    packed = bytearray(gzip.compress(DATA))
    packed[-6] ^= 1
    with pytest.raises(ValueError, match="damaged"):
        unpack(bytes(packed), 2 * len(DATA))
    with pytest.raises(ValueError, match="damaged"):
        unpack(b"\x1f\x8b" + b"x" * 50, 100)


def test_a_cut_stream_gives_what_there_is():
    packed = zlib.compressobj(1, zlib.DEFLATED, 31)
    content = packed.compress(DATA) + packed.flush()
    assert len(unpack(content[: len(content) // 2], len(DATA))) < len(DATA)


def test_what_follows_takes_no_memory():
    packed = zlib.compressobj(1, zlib.DEFLATED, 31)
    parts = [packed.compress(DATA)] + [packed.compress(bytes(1 << 24)) for _ in range(16)]
    bomb = b"".join([*parts, packed.flush()])
    tracemalloc.start()
    try:
        assert unpack(bomb, len(DATA)) == DATA
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()


def test_a_verified_stream_must_end_with_its_checksum():
    packed = gzip.compress(DATA)
    assert unpack(packed, len(DATA), verified=True) == DATA
    assert unpack(packed, len(DATA) - 5, verified=True) == DATA[:-5]
    damaged = packed[:-6] + bytes([packed[-6] ^ 1]) + packed[-5:]
    for content, error in ((damaged, ValueError), (packed[:-7], EOFError)):
        assert unpack(content, len(DATA) - 5) == DATA[:-5]
        with pytest.raises(error):
            unpack(content, len(DATA) - 5, verified=True)
    longer = gzip.compress(DATA + bytes(2 * REST_BYTES))
    assert unpack(longer[:-4] + b"bad!", len(DATA), verified=True) == DATA
