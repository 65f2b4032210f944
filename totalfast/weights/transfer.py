"""Download one file: over proxies, continued after breaks, given up if no data arrive."""

from __future__ import annotations

import logging
import os
import re
import shutil
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from totalfast.errors import OptionError, WeightsError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import BinaryIO

    import requests

    from totalfast.upstream import WeightsRequest
    from totalfast.weights.partial_file import PartialFile

logger = logging.getLogger(__name__)

STALL_VARIABLE = "TOTALFAST_DOWNLOAD_STALL_S"
"""Environment variable: seconds without data after which a connection counts as broken."""

STALL_S = 30.0
STALL_BYTES = 1024
"""A connection that brings less in the stall time counts as silent."""

CONNECT_S = 10.0
TRIES = 4
"""Tries without progress until the download is given up."""

PATIENCE = 2.0
"""Stall times without progress until the download is given up."""

PROGRESS_BYTES = 1 << 16
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 8.0
CHUNK = 1 << 18
ZIP_SIGNATURE = b"PK\x03\x04"
TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
"""HTTP statuses after which a later request may succeed."""

NO_ADDRESS = (
    "this, or the address of the proxy, is no http or https address. TOTALFAST_WEIGHTS_MIRROR sets "
    "the first, HTTPS_PROXY the second"
)

Headers = dict[str, str]


class _BrokenError(Exception):
    """The connection broke, or the server is busy; another try may succeed."""


class _RefusedError(Exception):
    """Another try would have the same result."""


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
        If the server refuses, sends something else, or no data arrive. What has arrived is kept
        if it can be continued.
    OSError
        If the file can't be written.
    """
    import requests
    from tqdm import tqdm

    stall_s = _stall_s()
    patience = _Patience(stall_s)
    with (
        requests.Session() as session,
        tqdm(
            desc=f"Downloading {label}",
            disable=quiet,
            leave=False,
            dynamic_ncols=True,
            unit="B",
            unit_scale=True,
        ) as bar,
    ):
        connection = _Connection(session, request, stall_s)
        while (error := _failure(connection, partial, bar)) is not None:
            patience.note(partial.size)
            partial.remove_unless_continuable()
            if isinstance(error, _RefusedError) or patience.ended:
                raise WeightsError(
                    f"the download of {label} from {shown(request.url)} failed: {error}."
                ) from error
            logger.info("  download of %s: %s; trying again", label, error)
            patience.pause()


def _failure(
    connection: _Connection,
    partial: PartialFile,
    bar: Any,  # noqa: ANN401 - tqdm is untyped
) -> _BrokenError | _RefusedError | None:
    """Try once; return the error, or None."""
    try:
        _try_once(connection, partial, bar)
    except (_BrokenError, _RefusedError) as error:
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


class _Connection:
    """Sends one request and reads its answer; network errors become ``_BrokenError``."""

    def __init__(self, session: requests.Session, request: WeightsRequest, stall_s: float) -> None:
        self._session, self.request, self._stall_s = session, request, stall_s

    def ask(self, headers: Headers) -> requests.Response:
        """Send the request; return the answer, whose body is not read yet."""
        import requests

        try:
            return self._session.request(
                "GET" if self.request.body is None else "POST",
                self.request.url,
                json=self.request.body,
                headers=headers,
                stream=True,
                timeout=(CONNECT_S, self._stall_s),
            )
        except requests.exceptions.SSLError as error:
            raise _RefusedError(
                f"the server's certificate was not accepted ({_innermost(error)}); if a proxy "
                "of your organisation replaces certificates, REQUESTS_CA_BUNDLE names the file "
                "with its own"
            ) from error
        except requests.exceptions.ProxyError as error:
            raise _BrokenError(f"the proxy gives no connection ({_innermost(error)})") from error
        except requests.exceptions.ReadTimeout as error:
            raise _BrokenError(f"no answer within {self._stall_s:g} s (timeout)") from error
        except (requests.exceptions.ConnectionError, requests.exceptions.Timeout) as error:
            raise _BrokenError(f"no connection ({_innermost(error)})") from error
        except (
            requests.exceptions.InvalidURL,
            requests.exceptions.InvalidSchema,
            requests.exceptions.MissingSchema,
        ) as error:
            raise _RefusedError(NO_ADDRESS) from error
        except requests.RequestException as error:
            raise _RefusedError(f"it ended with {type(error).__name__}") from error

    def read(self, response: requests.Response) -> bytes:
        """Return the bytes that arrive next; b"" at the end of the answer."""
        import urllib3.exceptions

        try:
            chunk: bytes = response.raw.read1(CHUNK)
        except urllib3.exceptions.TimeoutError as error:
            raise self.silent() from error
        except urllib3.exceptions.HTTPError as error:
            raise _BrokenError("the connection broke off") from error
        return chunk

    def copy(self, response: requests.Response, stream: BinaryIO, bar: Any) -> None:  # noqa: ANN401
        """Write the rest of an answer to a file."""
        marked_s, arrived = time.monotonic(), 0
        while chunk := self.read(response):
            stream.write(chunk)
            bar.update(len(chunk))
            arrived += len(chunk)
            now_s = time.monotonic()
            if now_s - marked_s > self._stall_s:
                if arrived < STALL_BYTES:
                    raise self.silent()
                marked_s, arrived = now_s, 0

    def silent(self) -> _BrokenError:
        """Return the error of a connection that brings no data."""
        return _BrokenError(f"no data arrived for {self._stall_s:g} s (timeout)")


def _try_once(connection: _Connection, partial: PartialFile, bar: Any) -> None:  # noqa: ANN401
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
            raise _BrokenError("the file on the server has changed")
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
        bar.total, bar.n = partial.total, offset
        bar.refresh()
        with stream:
            stream.write(start)
            bar.update(len(start))
            connection.copy(response, stream, bar)
    if partial.total is not None and partial.size != partial.total:
        raise _BrokenError(f"{partial.size} bytes arrived instead of {partial.total}")


def _check_status(response: requests.Response) -> None:
    status = response.status_code
    if status == 200:
        return
    text = f"HTTP status {status} {response.reason}".strip()
    if status in TRANSIENT:
        raise _BrokenError(f"the server is not ready ({text})")
    raise _RefusedError(f"the server answered with {text}")


def _first_bytes(connection: _Connection, response: requests.Response) -> bytes:
    """Read the first bytes of an answer, which must be those of a zip file."""
    start = b""
    while len(start) < len(ZIP_SIGNATURE) and (chunk := connection.read(response)):
        start += chunk
    if start.startswith(ZIP_SIGNATURE):
        return start
    if "html" in response.headers.get("Content-Type", "").lower() or start[:1] == b"<":
        raise _RefusedError(
            "a web page came instead of a zip file, probably the page of a proxy or of a login. "
            "Open the address in a browser to see it"
        )
    raise _RefusedError("what came is no zip file")


def _content_length(headers: Mapping[str, str]) -> int | None:
    length = headers.get("Content-Length", "")
    return int(length) if length.isdecimal() else None


def _check_disk(partial: PartialFile, total: int | None) -> None:
    """Refuse a download for which the disk has no room: the zip file and its content."""
    needed = 2 * (total or 0)  # weights can hardly be compressed
    free = shutil.disk_usage(partial.path.parent).free + partial.size
    if needed > free:
        raise _RefusedError(
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


def _innermost(error: BaseException) -> str:
    """Return the cause in an error of requests, without addresses of Python objects and hosts."""
    while True:
        causes = [getattr(error, "original_error", None), getattr(error, "reason", None)]
        causes += error.args
        inner = next((cause for cause in causes if isinstance(cause, BaseException)), None)
        if inner is None:
            text = str(error).rpartition(">: ")[2].partition(" (Caused by")[0]
            return re.sub(r"^\w+\(host=.*?\): ", "", text)
        error = inner


def shown(url: str) -> str:
    """Return a URL without user name, password and query, for messages."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="").geturl()
