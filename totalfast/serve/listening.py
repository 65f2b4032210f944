"""A server's socket: created so that only its user can connect, and removed at the end."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from totalfast.errors import OptionError
from totalfast.serve.places import LOOPBACK, Place, make_private, runtime_folder, write_token

if TYPE_CHECKING:
    from collections.abc import Iterator

PROBE_S = 5.0
"""Seconds within which a server that is alive accepts a connection."""


@contextlib.contextmanager
def listening(place: Place) -> Iterator[tuple[socket.socket, Place, str | None]]:
    """Listen at a place.

    Yields
    ------
        The socket, the place with the port that the system chose if it was 0, and the token that
        clients must send, None for Unix sockets.

    Raises
    ------
    OptionError
        If a server is alive there, or the place can't be used.
    """
    if place.port is not None:
        with _bound(LOOPBACK, place.port) as opened:
            place = Place(port=opened.getsockname()[1])
            with _token(place.token_file or Path()) as token:
                yield opened, place, token
    else:
        path = place.socket or Path()
        with _unix_socket(path) as opened:
            yield opened, place, None


@contextlib.contextmanager
def listening_for_http(host: str, port: int) -> Iterator[tuple[socket.socket, Path, str]]:
    """Listen for HTTP at an address.

    Yields
    ------
        The socket, the file of the token, and the token that clients must send.

    Raises
    ------
    OptionError
        If the address can't be used.
    """
    with _bound(host, port) as opened:
        file = runtime_folder() / f"http-{opened.getsockname()[1]}.token"
        with _token(file) as token:
            yield opened, file, token


@contextlib.contextmanager
def _bound(host: str, port: int) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as opened:
        if os.name == "posix":  # on Windows it would let two servers share the port
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            opened.bind((host, port))
            opened.listen()
        except (OSError, OverflowError) as error:
            raise OptionError(f"port {port} of {host} can't be used: {error}.") from error
        yield opened


@contextlib.contextmanager
def _token(file: Path) -> Iterator[str]:
    token = write_token(file)
    try:
        yield token
    finally:
        file.unlink(missing_ok=True)


@contextlib.contextmanager
def _unix_socket(path: Path) -> Iterator[socket.socket]:
    if path.parent == runtime_folder():
        make_private(path.parent)
    with socket.socket(socket.AF_UNIX) as opened:
        try:
            with _alone_in(path.parent):
                _remove_dead(path)
                umask = os.umask(0o177)
                try:
                    opened.bind(str(path))
                finally:
                    os.umask(umask)
                opened.listen()
        except OSError as error:
            raise OptionError(f"the socket {path} can't be created: {error}.") from error
        created = path.lstat()
        try:
            yield opened
        finally:
            with contextlib.suppress(OSError):
                if os.path.samestat(path.lstat(), created):  # not another server's
                    path.unlink()


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keep out other servers that start in the same folder at this moment."""
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _remove_dead(path: Path) -> None:
    """Remove the socket of a server that ended without removing it.

    Raises
    ------
    OptionError
        If a server is alive, or the path is no socket.
    """
    try:
        is_socket = stat.S_ISSOCK(path.lstat().st_mode)
    except FileNotFoundError:
        return
    if not is_socket:
        raise OptionError(f"{path} exists and is no socket; choose another path.")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(PROBE_S)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
        else:
            raise OptionError(
                f"a server is already running at {path}; end it, or choose another path."
            )
