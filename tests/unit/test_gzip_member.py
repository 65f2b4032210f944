from __future__ import annotations

import gzip
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
