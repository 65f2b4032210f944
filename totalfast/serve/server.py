"""The server: accepts connections, hands their runs to a queue, and ends when it is idle.

The event loop's thread only receives and sends. Knows neither flags nor scans.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import time
from typing import TYPE_CHECKING

from totalfast.serve.conditions import differing
from totalfast.serve.frames import FrameError, encode, read_frame
from totalfast.serve.peers import is_other_user
from totalfast.serve.runs import Run

if TYPE_CHECKING:
    import socket
    from collections.abc import Mapping
    from typing import TypeGuard

    from totalfast.serve.frames import Frame
    from totalfast.serve.run_queue import RunQueue

logger = logging.getLogger(__name__)

REQUEST_S = 10.0
"""Seconds within which a connection must send its request."""

CLOSING_S = 2.0
"""Seconds for the last bytes of a connection."""

ACCEPTING_STEPS = 10
"""Rounds of the event loop until a connection that was accepted just before the end is served."""

UNSENT_BYTES = 8 << 20
"""Events that a client has not received; with more it counts as gone."""

MAX_CONNECTIONS = 256


class Server:
    """Does the runs that clients hand over; created in a running event loop.

    Parameters
    ----------
    queue
        Does the runs.
    conditions
        From ``conditions.conditions``; clients with others are refused.
    token
        What clients must send; None for Unix sockets.
    idle_s
        Seconds without a connection or a run after which the server ends; None for never.
    """

    def __init__(
        self,
        queue: RunQueue,
        *,
        conditions: Mapping[str, str],
        token: str | None,
        idle_s: float | None,
    ) -> None:
        self._queue = queue
        self._conditions = conditions
        self._token = token
        self._idle_s = idle_s
        self._connections = 0
        self._idle_since = time.monotonic()
        self._stop = asyncio.Event()

    def stop(self) -> None:
        """Cancel the runs and end; for the event loop's thread."""
        self._stop.set()

    async def serve(self, opened: socket.socket) -> None:
        """Serve at a listening socket until the server is idle or stopped."""
        # A socket of either kind is listening already, so that both are served in the same way.
        server = await asyncio.start_server(self._connected, sock=opened)
        try:
            await self._until_idle_or_stopped()
        finally:
            # Python 3.11 leaks a connection that is being accepted when the server is closed.
            for _ in range(ACCEPTING_STEPS):
                await asyncio.sleep(0.005)
            server.close()
            await self._queue.stop()
            end = time.monotonic() + CLOSING_S
            while self._connections and time.monotonic() < end:
                await asyncio.sleep(0.02)

    async def _until_idle_or_stopped(self) -> None:
        while (left := self._seconds_left()) is None or left > 0:
            try:
                await asyncio.wait_for(self._stop.wait(), left)
            except asyncio.TimeoutError:  # noqa: UP041 - not TimeoutError in Python 3.10
                continue
            logger.info("the server is stopped")
            return
        logger.info("idle for %.0f s; the server ends", self._idle_s)

    def _seconds_left(self) -> float | None:
        """Seconds until the server ends if nobody connects; None for never."""
        if self._idle_s is None or self._connections or len(self._queue):
            return self._idle_s
        idle_since = max(self._idle_since, self._queue.idle_since)
        return self._idle_s - (time.monotonic() - idle_since)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        self._connections += 1
        try:
            await self._answer(reader, writer)
        except FrameError as error:
            logger.info("a connection is closed: %s", error)
        except OSError as error:
            logger.debug("a connection was lost: %s", error)
        finally:
            writer.close()
            with contextlib.suppress(OSError, asyncio.TimeoutError):
                await asyncio.wait_for(writer.wait_closed(), CLOSING_S)
            self._connections -= 1
            self._idle_since = time.monotonic()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if is_other_user(writer.get_extra_info("socket")):
            return  # the client has seen whose server it is
        try:
            request = await asyncio.wait_for(read_frame(reader), REQUEST_S)
        except asyncio.TimeoutError:  # noqa: UP041 - not TimeoutError in Python 3.10
            return
        if request is None:
            return
        refusal = self._why_refused(request)
        if refusal:
            logger.info("a run is refused: %s", refusal)
            writer.write(encode({"event": "refused", "reason": refusal}))
            await writer.drain()
            return
        await self._serve_run(self._new_run(request, writer), reader, writer)

    def _why_refused(self, request: Frame) -> str:
        """Why a request is not accepted; an empty text if it is."""
        token = request.get("token")
        if self._token is not None and not (
            isinstance(token, str)
            and hmac.compare_digest(token.encode(errors="replace"), self._token.encode())
        ):
            return "its token is another one"
        if self._connections > MAX_CONNECTIONS:
            return f"the server has {MAX_CONNECTIONS} connections"
        theirs = request.get("conditions")
        if not (
            _is_table(theirs) and _is_table(request.get("paths")) and _is_list(request.get("words"))
        ):
            return "the server does not understand the request"
        different = differing(theirs, self._conditions)
        if different:
            return f"{', '.join(different)} differs from the server's"
        return self._queue.why_closed()

    def _new_run(self, request: Frame, writer: asyncio.StreamWriter) -> Run:
        loop = asyncio.get_running_loop()

        def write(event: Frame) -> None:
            if writer.is_closing():
                return
            writer.write(encode(event))
            if writer.transport.get_write_buffer_size() > UNSENT_BYTES:
                writer.transport.abort()

        def send(event: Frame) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended
                loop.call_soon_threadsafe(write, event)

        return Run(
            number=self._queue.next_number(),
            words=tuple(request["words"]),
            paths=request["paths"],
            send=send,
        )

    async def _serve_run(
        self, run: Run, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Do a run, and cancel it if its client cancels it or is gone."""
        writer.write(encode({"event": "queued", "ahead": len(self._queue)}))
        watching = asyncio.ensure_future(self._watch(run, reader))
        try:
            last = await self._queue.start(run)
        finally:
            watching.cancel()
        writer.write(encode(last))
        await writer.drain()

    async def _watch(self, run: Run, reader: asyncio.StreamReader) -> None:
        """Wait until the client cancels its run, or is gone."""
        try:
            while (frame := await read_frame(reader)) is not None:
                if frame.get("event") == "cancel":
                    break
        except FrameError as error:
            logger.info("%s is cancelled: %s", run, error)
        self._queue.cancel(run)


def _is_table(value: object) -> TypeGuard[dict[str, str]]:
    """Whether a value is an object of texts."""
    return isinstance(value, dict) and all(isinstance(item, str) for item in value.values())


def _is_list(value: object) -> TypeGuard[list[str]]:
    """Whether a value is a list of texts."""
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
