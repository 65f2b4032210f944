"""One request to a server: errors of the network in plain words, silence is an error."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from typing import BinaryIO

    import requests

    from totalfast.upstream import WeightsRequest
    from totalfast.weights.bar import DownloadBar

CONNECT_S = 10.0
STALL_BYTES = 1024
"""A connection that brings less in the stall time counts as silent."""

CHUNK = 1 << 18

NO_ADDRESS = (
    "this, or the address of the proxy, is no http or https address. TOTALFAST_WEIGHTS_MIRROR sets "
    "the first, HTTPS_PROXY the second"
)


class BrokenError(Exception):
    """The connection broke, or the server is busy; another try may succeed."""


class RefusedError(Exception):
    """Another try would have the same result."""


class Connection:
    """Sends one request and reads its answer; network errors become ``BrokenError``."""

    def __init__(self, session: requests.Session, request: WeightsRequest, stall_s: float) -> None:
        self._session, self.request, self._stall_s = session, request, stall_s

    def ask(self, headers: dict[str, str]) -> requests.Response:
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
            raise RefusedError(
                f"the server's certificate was not accepted ({_innermost(error)}); if a proxy "
                "of your organisation replaces certificates, REQUESTS_CA_BUNDLE names the file "
                "with its own"
            ) from error
        except requests.exceptions.ProxyError as error:
            raise BrokenError(f"the proxy gives no connection ({_innermost(error)})") from error
        except requests.exceptions.ReadTimeout as error:
            raise BrokenError(f"no answer within {self._stall_s:g} s (timeout)") from error
        except (requests.exceptions.ConnectionError, requests.exceptions.Timeout) as error:
            raise BrokenError(f"no connection ({_innermost(error)})") from error
        except (
            requests.exceptions.InvalidURL,
            requests.exceptions.InvalidSchema,
            requests.exceptions.MissingSchema,
        ) as error:
            raise RefusedError(NO_ADDRESS) from error
        except requests.RequestException as error:
            raise RefusedError(f"it ended with {type(error).__name__}") from error

    def read(self, response: requests.Response) -> bytes:
        """Return the bytes that arrive next; b"" at the end of the answer."""
        import urllib3.exceptions

        try:
            chunk: bytes = response.raw.read1(CHUNK)
        except urllib3.exceptions.TimeoutError as error:
            raise self.silent() from error
        except urllib3.exceptions.HTTPError as error:
            raise BrokenError("the connection broke off") from error
        return chunk

    def copy(self, response: requests.Response, stream: BinaryIO, bar: DownloadBar) -> None:
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

    def silent(self) -> BrokenError:
        """Return the error of a connection that brings no data."""
        return BrokenError(f"no data arrived for {self._stall_s:g} s (timeout)")


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
