"""The HTTP side of ``totalfast serve``: its flags, and what requests may ask for."""

from __future__ import annotations

import argparse
import importlib.util
import re
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from totalfast.cli.parser import build_parser
from totalfast.errors import OptionError
from totalfast.serve.places import LOOPBACK

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncIterator, Sequence
    from typing import NoReturn

    from totalfast.serve.run_queue import RunQueue

NOT_BY_HTTP = ("trust_model", "license_number", "nora_tag", "list_tasks", "list_classes", "debug")
"""Arguments that run code of a model or another program, are stored, or quote files' content."""

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
    add("--max-upload", type=float, default=4, metavar="GB", help="Largest upload (4 GB).")
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
    """

    opened: socket.socket
    token_file: Path
    token: str
    folder: Path

    @property
    def url(self) -> str:
        """Address for clients."""
        host, port = self.opened.getsockname()
        return f"http://{host}:{port}"


def open_http(args: argparse.Namespace, stack: ExitStack) -> Http | None:
    """Listen for HTTP, if that is asked for."""
    if args.http is None:
        return None
    from totalfast.serve.listening import listening_for_http
    from totalfast.serve.uploads import upload_folder

    if any(importlib.util.find_spec(name) is None for name in ("starlette", "uvicorn")):
        raise OptionError(
            "--http needs Starlette and uvicorn, which are not installed: "
            "pip install 'totalfast[serve]'."
        )
    opened, file, token = stack.enter_context(listening_for_http(args.http_host, args.http))
    folder = stack.enter_context(upload_folder())
    return Http(opened=opened, token_file=file, token=token, folder=folder)


@asynccontextmanager
async def http_serving(
    http: Http, queue: RunQueue, args: argparse.Namespace
) -> AsyncIterator[None]:
    """Serve HTTP until the context ends."""
    from totalfast.serve.http import create_app
    from totalfast.serve.http_runs import HttpLimits, HttpRuns
    from totalfast.serve.http_server import serving

    limits = HttpLimits(
        roots=tuple(args.http_root),
        upload_bytes=int(args.max_upload * 1e9),
        run_s=args.max_time,
        keep_s=args.keep,
    )
    runs = HttpRuns(queue, limits=limits, paths_of=_paths_of_http, folder=http.folder)
    async with serving(create_app(runs, http.token), http.opened):
        yield


def _paths_of_http(words: Sequence[str]) -> dict[str, str]:
    """Return the paths in a command line that came by HTTP.

    Raises
    ------
    OptionError
        If the command line is not valid, or has a flag that is not for HTTP.
    """
    from totalfast.serve.client import absolute_paths

    args = parse_quietly(words)
    parser = build_parser()
    for name in NOT_BY_HTTP:
        if getattr(args, name) != parser.get_default(name):
            raise OptionError(f"{name} can't be set by HTTP.")
    return absolute_paths(vars(args))


def parse_quietly(words: Sequence[str]) -> argparse.Namespace:
    """Parse a command line of the main command without printing or exiting.

    Raises
    ------
    OptionError
        If it is not valid, or wants help or the version.
    """

    def refuse(message: str) -> NoReturn:
        raise OptionError(message)

    parser = build_parser()
    parser.error = refuse  # type: ignore[method-assign] # it would print and exit
    if any(word in ("-h", "--help", "--version") for word in words):
        raise OptionError("help and version are not for a server.")
    try:
        return parser.parse_args(words)
    except SystemExit as error:  # an abbreviation of these
        raise OptionError("the server only segments scans.") from error


def seconds(text: str) -> float | None:
    """Seconds of a time such as 90s or 15m; None for never."""
    if text == "never":
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"'{text}' is no time such as 90s, 15m, 2h or never.")
    return float(found[1]) * SECONDS[found[2]]
