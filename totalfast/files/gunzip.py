"""Unpack gzip data up to a limit: a file can't need more memory than its header promises."""

from __future__ import annotations

from typing import Any, cast

MAGIC = b"\x1f\x8b"
"""First bytes of a gzip member."""

REST_BYTES = 1 << 20
"""Bytes behind the wanted ones that are unpacked, and dropped, to reach the member's checksum."""


def unpack(packed: bytes, limit: int, *, verified: bool = False) -> bytes:
    """Unpack at most ``limit`` bytes of a gzip stream of one or several members.

    Parameters
    ----------
    packed
        Content of a gzip file, or its beginning.
    limit
        Number of bytes to return at most. What follows is not unpacked.
    verified
        Whether the member in which the limit lies must end, with the right checksum, at most
        ``REST_BYTES`` bytes behind the limit. If it is longer, it is not verified.

    Returns
    -------
        Fewer than ``limit`` bytes if the stream is shorter. The checksum of each member that ends
        within the limit was verified.

    Raises
    ------
    EOFError, ValueError
        If the stream is damaged.

    Notes
    -----
    Each member is unpacked in one call. Another thread may import torch at the same time; a reader
    that takes the GIL after every block needs twice as long.
    """
    from isal import igzip_lib

    damaged = cast("type[Exception]", igzip_lib.error)  # its stub names an instance

    pieces: list[bytes] = []
    left, rest = limit, packed
    try:
        while left > 0 and rest:
            member = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)
            piece = member.decompress(rest, left)
            pieces.append(piece)
            left -= len(piece)
            if not member.eof:
                if verified and left == 0:
                    _verify_rest(member)
                break
            # As gzip does, leave out zeros and other bytes behind the last member.
            rest = member.unused_data.lstrip(b"\0")
            if not rest.startswith(MAGIC):
                break
    except damaged as error:
        raise ValueError(f"the gzip data are damaged ({error})") from error
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _verify_rest(member: Any) -> None:  # noqa: ANN401 - isal has no type for it
    """Unpack what is left of a member; isal compares the checksum at its end."""
    left = REST_BYTES
    while left > 0 and not member.eof:
        more = len(member.decompress(b"", left))
        if not more and not member.eof:
            raise EOFError("the gzip data end before their checksum")
        left -= more
