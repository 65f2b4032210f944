"""Frames between client and server: JSON objects with their length in front.

Knows nothing of what they mean.
"""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any

from totalfast.errors import TotalfastError

if TYPE_CHECKING:
    import asyncio
    import socket
    from typing import TypeAlias

    Frame: TypeAlias = dict[str, Any]
    """The content of a frame; fields that the receiver does not know are ignored."""

LENGTH = struct.Struct(">I")
"""Number of bytes of the JSON text, before it."""

MAX_BYTES = 4 << 20
"""Maximum size of a frame. The largest are command lines, which systems limit to about 2 MB."""

RECEIVED_BYTES = 1 << 16
"""Bytes that are received at a time."""


class FrameError(TotalfastError):
    """What was received is no frame; the connection can't be used any more."""


def encode(frame: Frame) -> bytes:
    """Return a frame's bytes."""
    text = json.dumps(frame).encode()
    return LENGTH.pack(len(text)) + text


def decode(text: bytes) -> Frame:
    """Return the content of a frame, from the bytes after its length.

    Raises
    ------
    FrameError
        If they are not a JSON object.
    """
    try:
        frame = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FrameError(f"a frame of {len(text)} bytes is not JSON.") from error
    if not isinstance(frame, dict):
        raise FrameError(f"a frame holds a {type(frame).__name__}, not an object.")
    return frame


def length_of(header: bytes) -> int:
    """Return the length that a frame's first bytes give.

    Raises
    ------
    FrameError
        If it is above ``MAX_BYTES``.
    """
    (length,) = LENGTH.unpack(header)
    if length > MAX_BYTES:
        raise FrameError(f"a frame of {length} bytes is too large; {MAX_BYTES} are allowed.")
    return int(length)


async def read_frame(reader: asyncio.StreamReader) -> Frame | None:
    """Read the next frame; None if the connection was closed.

    Raises
    ------
    FrameError
        If what was received is no frame.
    """
    import asyncio

    try:
        length = length_of(await reader.readexactly(LENGTH.size))
        return decode(await reader.readexactly(length))
    except (asyncio.IncompleteReadError, OSError):
        return None


class FrameSocket:
    """A connected socket that sends and receives frames; a context manager that closes it."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._received = b""

    def __enter__(self) -> FrameSocket:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def set_timeout(self, seconds: float | None) -> None:
        """Set after how many seconds ``receive`` and ``send`` raise ``TimeoutError``."""
        self._connection.settimeout(seconds)

    def send(self, frame: Frame) -> None:
        """Send a frame."""
        self._connection.sendall(encode(frame))

    def receive(self) -> Frame | None:
        """Wait for the next frame; None if the connection was closed.

        What arrived before an exception, such as ``KeyboardInterrupt``, is kept for the next call.

        Raises
        ------
        FrameError
            If what was received is no frame.
        """
        try:
            while len(self._received) < LENGTH.size:
                if not self._receive_more():
                    return None
            end = LENGTH.size + length_of(self._received[: LENGTH.size])
            while len(self._received) < end:
                if not self._receive_more():
                    return None
        except ConnectionError:
            return None
        text, self._received = self._received[LENGTH.size : end], self._received[end:]
        return decode(text)

    def _receive_more(self) -> bool:
        more = self._connection.recv(RECEIVED_BYTES)
        self._received += more
        return bool(more)
