"""Serve an ASGI application in the event loop of the server, with uvicorn."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import uvicorn

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncIterator, Iterator

    from starlette.types import ASGIApp

CONNECTIONS = 256
"""Maximum number of connections at a time; more are answered with 503."""

CLOSING_S = 5
"""Seconds for answers in progress when the server ends."""


class _Server(uvicorn.Server):
    """Leaves the signals to the program."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.asynccontextmanager
async def serving(app: ASGIApp, opened: socket.socket) -> AsyncIterator[None]:
    """Serve an application at a listening socket until the context ends."""
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=CLOSING_S,
    )
    server = _Server(config)
    task = asyncio.ensure_future(server.serve(sockets=[opened]))
    try:
        yield
    finally:
        server.should_exit = True
        await task
