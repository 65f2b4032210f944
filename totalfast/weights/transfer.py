"""Download one file: over proxies, continued after breaks, given up if no data arrive."""

from __future__ import annotations

import logging
import os
import shutil
import time
from typing import TYPE_CHECKING

from totalfast.errors import OptionError, WeightsError
from totalfast.weights.bar import DownloadBar
from totalfast.weights.connection import BrokenError, Connection, RefusedError, shown

if TYPE_CHECKING:
    from collections.abc import Mapping

    import requests

    from totalfast.upstream import WeightsRequest
    from totalfast.weights.partial_file import PartialFile

logger = logging.getLogger(__name__)

STALL_VARIABLE = "TOTALFAST_DOWNLOAD_STALL_S"
"""Environment variable: seconds without data after which a connection counts as broken."""

STALL_S = 30.0
TRIES = 4
"""Tries without progress until the download is given up."""

PATIENCE = 2.0
"""Stall times without progress until the download is given up."""

PROGRESS_BYTES = 1 << 16
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 8.0
ZIP_SIGNATURE = b"PK\x03\x04"
TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
"""HTTP statuses after which a later request may succeed."""


def fetch(request: WeightsRequest, partial: PartialFile, *, label: str, quiet: bool) -> None:
    """Download a zip file to ``partial.path``; continue what is there already.

    Parameters
    ----------
    request
        URL, and the body of a POST request. An answer to a POST is never continued.
    partial
        The file to write.
    label
        What is downloaded, such as "model 297", for messages.
    quiet
        Show no bar.

    Raises
    ------
    WeightsError
        If the server refuses, sends something else, or no data arrive.
    OSError
        If the file can't be written.
    """
    import requests

    stall_s = _stall_s()
    patience = _Patience(stall_s)
    with requests.Session() as session, DownloadBar(label, quiet=quiet) as bar:
        connection = Connection(session, request, stall_s)
        while (error := _failure(connection, partial, bar)) is not None:
            patience.note(partial.size)
            if isinstance(error, RefusedError) or patience.ended:
                raise WeightsError(
                    f"the download of {label} from {shown(request.url)} failed: {error}."
                ) from error
            logger.info("  download of %s: %s; trying again", label, error)
            patience.pause()


def _failure(
    connection: Connection, partial: PartialFile, bar: DownloadBar
) -> BrokenError | RefusedError | None:
    """Try once; return the error, or None."""
    try:
        _try_once(connection, partial, bar)
    except (BrokenError, RefusedError) as error:
        return error
    return None


class _Patience:
    """Counts tries, and time, since the download last made progress."""

    def __init__(self, stall_s: float) -> None:
        self._stall_s = stall_s
        self._best = self._tries = 0
        self._since_s = time.monotonic()

    def note(self, received: int) -> None:
        """Count a failed try, after which ``received`` bytes are there."""
        self._tries += 1
        if received >= self._best + PROGRESS_BYTES:
            self._best, self._tries, self._since_s = received, 1, time.monotonic()

    @property
    def ended(self) -> bool:
        """Whether to give up."""
        waited_s = time.monotonic() - self._since_s
        return self._tries >= TRIES or waited_s >= PATIENCE * self._stall_s

    def pause(self) -> None:
        """Wait before the next try, longer each time."""
        time.sleep(min(FIRST_PAUSE_S * 2**self._tries, LONGEST_PAUSE_S, self._stall_s))


def _try_once(connection: Connection, partial: PartialFile, bar: DownloadBar) -> None:
    """Download the file, or its rest, by one request."""
    offset = partial.offset if connection.request.body is None else 0
    headers = {"Accept-Encoding": "identity"}  # lengths and ranges are those of the zip file
    if offset and partial.validator is not None:
        headers |= {"Range": f"bytes={offset}-", "If-Range": partial.validator}
    with connection.ask(headers) as response:
        if response.status_code == 416 or (
            response.status_code == 206 and not partial.continues(response.headers, offset)
        ):
            partial.remove()
            raise BrokenError("the file on the server has changed")
        if response.status_code != 206:
            _check_status(response)
            offset = 0
        start = b"" if offset else _first_bytes(connection, response)
        if offset:
            stream = partial.reopen(offset)
        else:
            total = _content_length(response.headers)
            _check_disk(partial, total)
            continuable = connection.request.body is None
            stream = partial.start(response.headers if continuable else {}, total)
        with stream:
            bar.start(partial.total, offset)
            stream.write(start)
            bar.update(len(start))
            connection.copy(response, stream, bar)
    if partial.total is not None and partial.size != partial.total:
        raise BrokenError(f"{partial.size} bytes arrived instead of {partial.total}")


def _check_status(response: requests.Response) -> None:
    status = response.status_code
    if status == 200:
        return
    text = f"HTTP status {status} {response.reason}".strip()
    if status in TRANSIENT:
        raise BrokenError(f"the server is not ready ({text})")
    raise RefusedError(f"the server answered with {text}")


def _first_bytes(connection: Connection, response: requests.Response) -> bytes:
    """Read the first bytes of an answer, which must be those of a zip file."""
    start = b""
    while len(start) < len(ZIP_SIGNATURE) and (chunk := connection.read(response)):
        start += chunk
    if start.startswith(ZIP_SIGNATURE):
        return start
    if "html" in response.headers.get("Content-Type", "").lower() or start[:1] == b"<":
        raise RefusedError(
            "a web page came instead of a zip file, probably the page of a proxy or of a login. "
            "Open the address in a browser to see it"
        )
    raise RefusedError("what came is no zip file")


def _content_length(headers: Mapping[str, str]) -> int | None:
    length = headers.get("Content-Length", "")
    return int(length) if length.isdecimal() else None


def _check_disk(partial: PartialFile, total: int | None) -> None:
    """Refuse a download for which the disk has no room: the zip file and its content."""
    needed = 2 * (total or 0)  # weights can hardly be compressed
    free = shutil.disk_usage(partial.path.parent).free + partial.size
    if needed > free:
        raise RefusedError(
            f"it needs {needed / 1e6:.0f} MB, zip file and content, but "
            f"{partial.path.parent} has {free / 1e6:.0f} MB free"
        )


def _stall_s() -> float:
    text = os.environ.get(STALL_VARIABLE, "")
    try:
        seconds = float(text or STALL_S)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise OptionError(f"{STALL_VARIABLE} must be a number of seconds above 0, not '{text}'.")
    return seconds
