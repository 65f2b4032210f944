"""Requests to one DICOMweb server: login, time limits, which errors may pass, repeated tries.

Knows neither runs nor what is fetched. Messages name the server, but no address and no credentials.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import ssl
from typing import TYPE_CHECKING, Any, TypeVar

import aiohttp

from totalfast.errors import TotalfastError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

    from totalfast.serve.dicomweb_servers import DicomWebServer

    Result = TypeVar("Result")

logger = logging.getLogger(__name__)

CONNECT_S = 10.0
"""Seconds until a connection must be open."""

STALL_S = 60.0
"""Seconds without data after which a connection counts as broken."""

TRIES = 4
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0

TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
"""HTTP statuses after which a later request may succeed."""

ANSWER_BYTES = 64 << 20
"""Maximum size of a JSON answer."""


class DicomWebError(TotalfastError):
    """A DICOMweb server can't be used, or refuses a request."""


class TransientError(DicomWebError):
    """A request failed, and a later one may succeed.

    Parameters
    ----------
    pause_s
        Seconds that the server wants to pass first.
    """

    def __init__(self, message: str, *, pause_s: float = 0.0) -> None:
        super().__init__(message)
        self.pause_s = pause_s


class DicomWeb:
    """Requests to a DICOMweb server.

    Parameters
    ----------
    http
        For all servers; it must hold no cookies and no credentials.
    server
        The server.
    """

    def __init__(self, http: aiohttp.ClientSession, server: DicomWebServer) -> None:
        self._http, self._server = http, server

    @property
    def name(self) -> str:
        """What requests call the server."""
        return self._server.name

    @contextlib.asynccontextmanager
    async def ask(
        self,
        method: str,
        path: str,
        *,
        headers: Mapping[str, str],
        params: Mapping[str, str] | None = None,
        data: aiohttp.MultipartWriter | None = None,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Send a request; the answer's body can be read until the context ends.

        A redirect is an error: it could lead the credentials or a scan to another host.

        Parameters
        ----------
        method, path, headers, params, data
            Of the request; the path starts with a slash, below the server's root.

        Raises
        ------
        TransientError
            If the server can't be reached, is busy, or the connection breaks.
        DicomWebError
            If its certificate is not trusted.
        """
        own = {"Authorization": self._server.authorization} if self._server.authorization else {}
        try:
            async with self._http.request(
                method,
                self._server.url + path,
                headers={"Accept-Encoding": "identity", **headers, **own},
                params=params,
                data=data,
                allow_redirects=False,
            ) as response:
                self._check(response)
                yield response
        except (aiohttp.ClientSSLError, ssl.SSLError) as error:
            raise DicomWebError(
                f"there is no safe connection to {self.name} ({type(error).__name__}): its "
                "certificate must be valid for its name, and of an authority that this system "
                "trusts, or that is in the file of SSL_CERT_FILE."
            ) from error
        except (aiohttp.ClientError, asyncio.TimeoutError, ConnectionError) as error:
            raise TransientError(f"{self.name} {_reason(error)}") from error

    async def json(self, path: str, params: Mapping[str, str]) -> list[dict[str, Any]]:
        """Send a query (QIDO-RS), several times if need be; return its list of JSON objects."""
        return await self.retrying(lambda: self._json_once(path, params))

    async def _json_once(self, path: str, params: Mapping[str, str]) -> list[dict[str, Any]]:
        headers = {"Accept": "application/dicom+json"}
        async with self.ask("GET", path, headers=headers, params=params) as response:
            if response.status == 204:  # noqa: PLR2004 - no content
                return []
            body = await self.body(response)
        try:
            found = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise DicomWebError(f"{self.name} answers a query without JSON.") from error
        if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
            raise DicomWebError(f"{self.name} answers a query without a list of objects.")
        return found

    async def body(self, response: aiohttp.ClientResponse) -> bytes:
        """Read the body of a small answer."""
        body = bytearray()
        async for part in response.content.iter_any():
            body += part
            if len(body) > ANSWER_BYTES:
                raise DicomWebError(f"{self.name} answers with more than {ANSWER_BYTES} bytes.")
        return bytes(body)

    async def retrying(self, work: Callable[[], Awaitable[Result]]) -> Result:
        """Await a function's result; call it again after errors that may pass.

        Raises
        ------
        DicomWebError
            The last error.
        """
        for number in range(1, TRIES):
            try:
                return await work()
            except TransientError as error:  # noqa: PERF203 - each try on its own
                pause_s = max(FIRST_PAUSE_S * 2 ** (number - 1), error.pause_s)
                pause_s = min(pause_s, LONGEST_PAUSE_S)
                logger.info("%s; trying again in %.1f s", error, pause_s)
                await asyncio.sleep(pause_s)
        return await work()

    def _check(self, response: aiohttp.ClientResponse) -> None:
        status = response.status
        if status in TRANSIENT:
            wanted = response.headers.get("Retry-After", "")
            pause_s = float(wanted) if wanted.isdecimal() else 0.0
            raise TransientError(f"{self.name} answers with HTTP status {status}", pause_s=pause_s)
        if 300 <= status < 400:  # noqa: PLR2004 - redirects
            raise DicomWebError(
                f"{self.name} answers with a redirect (HTTP status {status}), which is not "
                "followed; give the address that it leads to with --dicomweb."
            )
        if status in (401, 403):
            raise DicomWebError(
                f"{self.name} refuses the login (HTTP status {status}); check the credentials of "
                "the server that runs totalfast."
            )


def open_client() -> aiohttp.ClientSession:
    """Return a client without cookies; it uses neither proxies nor .netrc."""
    trusted = ssl.create_default_context()  # reads SSL_CERT_FILE
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(ssl=trusted),
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=STALL_S),
    )


def _reason(error: Exception) -> str:
    if isinstance(error, aiohttp.ClientConnectorError):
        return f"can't be reached ({error.os_error.strerror or type(error.os_error).__name__})"
    if isinstance(error, asyncio.TimeoutError):
        return "does not answer, or stopped sending"
    return f"broke the connection ({type(error).__name__})"
