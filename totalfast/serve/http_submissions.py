"""What clients send by HTTP to submit a run: a JSON object, or a scan."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Any

from anyio import fail_after, move_on_after, open_file
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from totalfast.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from starlette.requests import Request

    from totalfast.serve.storage import Storage

UPLOAD_S = 1800
"""Maximum seconds of an upload."""

DISCARD_S = 2.0
"""Maximum seconds for which the rest of a refused request is read."""

OBJECT_BYTES = 1 << 20
"""Maximum size of a JSON object."""


async def read_object(request: Request) -> dict[str, Any]:
    """Read a JSON object.

    Raises
    ------
    OptionError
        If the body is something else.
    """
    body = b"".join([part async for part in _limited(request, OBJECT_BYTES)])
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise OptionError("a JSON object is expected.") from error
    if not isinstance(found, dict):
        raise OptionError("a JSON object is expected.")
    return found


def read_flags(flags: object) -> list[str]:
    """Check the flags of a JSON object.

    Raises
    ------
    OptionError
        If they are no list of texts.
    """
    if not isinstance(flags, list) or not all(isinstance(flag, str) for flag in flags):
        raise OptionError("flags must be a list of texts.")
    return flags


async def store_upload(
    request: Request, storage: Storage, folder: Path, name: str, limit: int
) -> Path:
    """Write an upload to a file in the subfolder "scan" of a folder of the storage.

    Raises
    ------
    HTTPException
        If it is larger than ``limit`` bytes, or takes too long.
    FullError
        If there is no room for it.
    """
    expected = request.headers.get("content-length", "")
    if expected.isdecimal():
        _check_size(int(expected), limit)
        storage.check(int(expected))
    path = folder / "scan" / name
    path.parent.mkdir()
    try:
        with fail_after(UPLOAD_S):
            async with await open_file(path, "wb") as file:
                async for part in _limited(request, limit):
                    storage.claim(folder, len(part))
                    await file.write(part)
    except TimeoutError as error:
        raise HTTPException(408, f"the upload took more than {UPLOAD_S} s") from error
    return path


async def discard_rest(request: Request) -> None:
    """Read the rest of a refused request for a moment.

    A client that still sends when its connection is closed may not see the answer.
    """
    # RuntimeError: it was read to its end.
    with move_on_after(DISCARD_S), contextlib.suppress(ClientDisconnect, RuntimeError):
        async for _ in request.stream():
            pass


async def _limited(request: Request, limit: int) -> AsyncIterator[bytes]:
    """Yield the parts of a request's body, up to a number of bytes."""
    received = 0
    async for part in request.stream():
        received += len(part)
        _check_size(received, limit)
        yield part


def _check_size(size: int, limit: int) -> None:
    if size > limit:
        raise HTTPException(413, f"at most {limit} bytes are accepted")
