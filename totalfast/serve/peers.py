"""Which user a connection comes from, where the system tells."""

from __future__ import annotations

import os
import socket
import struct
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from asyncio.trsock import TransportSocket

CREDENTIALS = struct.Struct("3i")
"""Linux's struct ucred: process, user, group."""

LOCAL_PEERCRED, XUCRED = 1, struct.Struct("2I")
"""macOS's option, and the first fields of its struct xucred: version, user (sys/un.h, ucred.h)."""


def peer_user(connection: socket.socket | TransportSocket) -> int | None:
    """Return the user id of the other end's process; None for a port, and where it is unknown."""
    if connection.family != getattr(socket, "AF_UNIX", None):
        return None
    if sys.platform == "linux":
        found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
        return int(CREDENTIALS.unpack(found)[1])
    if sys.platform == "darwin":
        found = connection.getsockopt(0, LOCAL_PEERCRED, 76)
        return int(XUCRED.unpack_from(found)[1])
    return None


def is_other_user(connection: socket.socket | TransportSocket) -> bool:
    """Whether the other end is known to be a process of another user."""
    user = peer_user(connection)
    return user is not None and user != os.geteuid()
