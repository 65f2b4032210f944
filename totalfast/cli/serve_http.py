"""The HTTP side of ``totalfast serve``: its flags, and what it needs."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import re
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from totalfast.cli.serve_requests import read_command
from totalfast.errors import OptionError
from totalfast.serve.places import LOOPBACK

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncIterator, Mapping

    from totalfast.serve.dicomweb_servers import DicomWebServer
    from totalfast.serve.run_queue import RunQueue

PACKAGES = ("starlette", "uvicorn")
"""That ``--http`` needs, of the extra ``serve``; ``--dicomweb`` also needs aiohttp."""

LOCAL_HOSTS = (LOOPBACK, "localhost", "::1")

FREE_BYTES = 1 << 30
"""Bytes of the disk for temporary files that stay free."""

logger = logging.getLogger("totalfast.serve")

SECONDS = {"s": 1, "m": 60, "h": 3600}


def add_http_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of HTTP."""
    add = parser.add_argument_group(
        "HTTP", "For other programs; needs pip install 'totalfast[serve]'. See /openapi.json."
    ).add_argument
    add(
        "--http",
        type=int,
        metavar="PORT",
        help="Also serve HTTP at this port; 0 lets the system choose. Requests need the token, as "
        "'Authorization: Bearer TOKEN', from the file that is printed at the start.",
    )
    add(
        "--http-host",
        default=LOOPBACK,
        metavar="ADDRESS",
        help="Listen at this address. Default: 127.0.0.1, this machine only. "
        "HTTP is not encrypted.",
    )
    add(
        "--http-root",
        type=lambda text: Path(text).absolute(),
        action="append",
        default=[],
        metavar="DIR",
        help="A folder in which requests may name inputs and outputs. Without it they must upload.",
    )
    add(
        "--max-upload",
        type=float,
        default=4,
        metavar="GB",
        help="Largest upload, or series of a DICOMweb server (4 GB).",
    )
    add(
        "--max-storage",
        type=float,
        default=50,
        metavar="GB",
        help="Largest size of all uploads, fetched series and results together (50 GB).",
    )
    add(
        "--dicomweb",
        action="append",
        default=[],
        metavar="NAME=URL",
        help="A DICOMweb server from which requests may fetch series, and where they may store "
        "results. Its login: environment variable TOTALFAST_DICOMWEB_NAME with user:password or "
        "'Bearer TOKEN', or TOTALFAST_DICOMWEB_NAME_FILE with the path of a file that holds it. "
        "SSL_CERT_FILE: certificates of authorities to trust.",
    )
    add(
        "--max-time",
        type=seconds,
        default=seconds("1h"),
        metavar="TIME",
        help="Cancel a run of HTTP after this time, its waiting included (1h).",
    )
    add(
        "--keep",
        type=seconds,
        default=seconds("1h"),
        metavar="TIME",
        help="Remove uploads and results after this time (1h).",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Http:
    """What HTTP needs: a listening socket, a token, a private folder for uploads.

    Parameters
    ----------
    opened
        The socket.
    token_file, token
        Where clients find the token, and the token.
    folder
        For uploads.
    servers
        DICOMweb servers by name.
    """

    opened: socket.socket
    token_file: Path
    token: str
    folder: Path
    servers: Mapping[str, DicomWebServer]

    @property
    def url(self) -> str:
        """Address for clients."""
        host, port = self.opened.getsockname()
        return f"http://{host}:{port}"


def open_http(args: argparse.Namespace, stack: ExitStack) -> Http | None:
    """Listen for HTTP, if that is asked for."""
    if args.http is None:
        if args.dicomweb:
            raise OptionError("--dicomweb only works together with --http.")
        return None
    from totalfast.serve.dicomweb_servers import take_servers
    from totalfast.serve.listening import listening_for_http
    from totalfast.serve.uploads import upload_folder

    needed = (*PACKAGES, "aiohttp") if args.dicomweb else PACKAGES
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise OptionError(
            f"--http needs packages that are not installed ({', '.join(missing)}): "
            "pip install 'totalfast[serve]'."
        )
    servers = take_servers(args.dicomweb, os.environ)
    for server in servers.values():
        if server.authorization and not server.is_encrypted and server.host not in LOCAL_HOSTS:
            logger.warning(
                "WARNING: The login and the scans of %s are sent without encryption; use https.",
                server.name,
            )
    opened, file, token = stack.enter_context(listening_for_http(args.http_host, args.http))
    folder = stack.enter_context(upload_folder())
    return Http(opened=opened, token_file=file, token=token, folder=folder, servers=servers)


@asynccontextmanager
async def http_serving(
    http: Http, queue: RunQueue, args: argparse.Namespace
) -> AsyncIterator[None]:
    """Serve HTTP until the context ends."""
    from totalfast.serve.http import create_app
    from totalfast.serve.http_limits import HttpLimits
    from totalfast.serve.http_runs import HttpRuns
    from totalfast.serve.http_server import serving
    from totalfast.serve.storage import Storage

    limits = HttpLimits(
        roots=tuple(args.http_root),
        upload_bytes=int(args.max_upload * 1e9),
        run_s=args.max_time,
        keep_s=args.keep,
    )
    storage = Storage(http.folder, limit_bytes=int(args.max_storage * 1e9), free_bytes=FREE_BYTES)
    async with AsyncExitStack() as stack:
        studies = None
        if http.servers:
            from totalfast.serve.dicomweb import open_client
            from totalfast.serve.studies import Studies

            client = await stack.enter_async_context(open_client())
            studies = Studies(
                client, http.servers, storage=storage, series_bytes=limits.upload_bytes
            )
        runs = HttpRuns(
            queue, limits=limits, read_command=read_command, storage=storage, studies=studies
        )
        await stack.enter_async_context(serving(create_app(runs, http.token), http.opened))
        stack.push_async_callback(runs.close)
        yield


def seconds(text: str) -> float | None:
    """Seconds of a time such as 90s or 15m; None for never."""
    if text == "never":
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"'{text}' is no time such as 90s, 15m, 2h or never.")
    return float(found[1]) * SECONDS[found[2]]
