"""Where a server listens: its socket or port, its token, and whether their folder is private."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import socket
import stat
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from totalfast.errors import OptionError

SERVER_VARIABLE = "TOTALFAST_SERVER"
"""Environment variable with the place of the server that runs are handed to."""

LOOPBACK = "127.0.0.1"
"""The only network address that a server listens on."""

HAS_UNIX_SOCKETS = hasattr(socket, "AF_UNIX")

TOKEN_BYTES = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A Unix socket or a port of 127.0.0.1; one of the two is None.

    Parameters
    ----------
    socket
        Absolute path of the socket.
    port
        Number of the port.
    """

    socket: Path | None = None
    port: int | None = None

    def __str__(self) -> str:
        return str(self.socket) if self.port is None else f"{LOOPBACK}:{self.port}"

    @property
    def token_file(self) -> Path | None:
        """File with the token that clients of a port must send; sockets need none."""
        return None if self.port is None else runtime_folder() / f"port-{self.port}.token"


def runtime_folder() -> Path:
    """Folder for the default socket and for tokens; it may not exist."""
    return Path(platformdirs.user_runtime_dir("totalfast", appauthor=False))


def default_place() -> Place:
    """The place that "auto" means: the default socket, or the port whose token is the newest.

    Raises
    ------
    OptionError
        If the system has no Unix sockets, and there is no token.
    """
    if HAS_UNIX_SOCKETS:
        return Place(socket=runtime_folder() / "server.sock")
    ports: list[tuple[float, int]] = []
    for file in runtime_folder().glob("port-*.token"):
        with contextlib.suppress(OSError, ValueError):
            ports.append((file.stat().st_mtime, int(file.stem.removeprefix("port-"))))
    if not ports:
        raise OptionError(f"no server is running: {runtime_folder()} has no token.")
    return Place(port=max(ports)[1])


def place_of(text: str) -> Place:
    """Return the place that a text names: "auto", a path, or "127.0.0.1:PORT".

    Raises
    ------
    OptionError
        If it names another machine, or is no place.
    """
    if text == "auto":
        return default_place()
    host, colon, port = text.rpartition(":")
    if colon and re.fullmatch(r"[0-9]{1,5}", port) and not re.search(r"[/\\]", host):
        if host not in (LOOPBACK, "localhost"):
            raise OptionError(f"a server must be on this machine, {LOOPBACK}:PORT, not {text}.")
        return Place(port=int(port))
    if not HAS_UNIX_SOCKETS:
        raise OptionError(f"this system has no Unix sockets; use {LOOPBACK}:PORT, not {text}.")
    return Place(socket=Path(text).absolute())


def make_private(folder: Path) -> None:
    """Create a folder for this user alone, or check that an existing one is.

    Raises
    ------
    OptionError
        If other users could enter or exchange it.
    """
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700, parents=True)
    reason = _why_not_private(folder)
    if reason:
        raise OptionError(
            f"{folder} is not safe for a server: {reason}. Set XDG_RUNTIME_DIR to a folder of your "
            "own, or use --socket."
        )


def _why_not_private(folder: Path) -> str:
    """Why a folder is not private to this user; an empty text if it is, and on Windows."""
    if not hasattr(os, "geteuid"):
        return ""
    status = folder.lstat()
    if stat.S_ISLNK(status.st_mode) or not stat.S_ISDIR(status.st_mode):
        return "it is a symbolic link or no folder"
    if status.st_uid != os.geteuid():
        return f"it belongs to another user (id {status.st_uid}, yours is {os.geteuid()})"
    if status.st_mode & 0o077:
        return f"other users may enter it (mode {stat.S_IMODE(status.st_mode):03o}, not 700)"
    for parent in folder.parents:
        reason = _who_can_replace_entries(parent)
        if reason:
            return reason
    return ""


def _who_can_replace_entries(folder: Path) -> str:
    """Say who else can rename what is in a folder; an empty text if nobody can."""
    status = folder.stat()
    if status.st_uid not in (os.geteuid(), 0):
        return f"{folder} belongs to another user (id {status.st_uid})"
    if status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX:
        return f"other users can write to {folder}"
    return ""


def write_token(file: Path) -> str:
    """Write a new random token to a file that only this user can read, and return the token."""
    make_private(file.parent)
    token = secrets.token_hex(TOKEN_BYTES)
    file.unlink(missing_ok=True)
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as opened:
        opened.write(token)
    return token


def read_token(file: Path) -> str:
    """Read a server's token.

    Raises
    ------
    OSError
        If it can't be read.
    OptionError
        If others could have written or read it.
    """
    reason = _why_not_private(file.parent)
    status = file.lstat()
    if hasattr(os, "geteuid") and not reason:
        own = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()
        reason = "" if own and not status.st_mode & 0o077 else "it is not private to you"
    if reason:
        raise OptionError(f"the token {file} is not used: {reason}.")
    return file.read_text()
