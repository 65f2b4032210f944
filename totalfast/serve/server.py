"""The server: accepts connections, keeps runs in order, and ends when it is idle.

The event loop's thread only receives and sends; runs are in threads of a pool, in the order in
which they were handed over. Knows neither flags nor scans: a ``Job`` does the runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from totalfast.serve.conditions import differing
from totalfast.serve.frames import FrameError, encode, read_frame
from totalfast.serve.peers import is_other_user
from totalfast.serve.runs import Cancelled, Ending, EventProgress, Run, RunLog
from totalfast.system.process_memory import release_free_memory

if TYPE_CHECKING:
    import socket
    from collections.abc import Mapping
    from concurrent.futures import Future
    from typing import TypeGuard

    from totalfast.serve.frames import Frame
    from totalfast.serve.runs import Job

logger = logging.getLogger(__name__)

REQUEST_S = 10.0
"""Seconds within which a connection must send its request."""

STOP_S = 30.0
"""Seconds that cancelled runs have to end when the server stops. On a CPU a tile takes up to a few
seconds."""

CLOSING_S = 2.0
"""Seconds for the last bytes of a connection."""

ACCEPTED_S = 0.05
"""Seconds until connections that were accepted just before the end are known."""

UNSENT_BYTES = 8 << 20
"""Events that a client has not received; with more it counts as gone."""

MAX_CONNECTIONS = 256

TIDY_S = 2.0
"""Pause after the last run before memory is returned to the system, which takes a few tenths of a
second."""

CANCELLED = 130
"""Exit code of a cancelled run, that of a command after Ctrl-C."""

STOPPED = (
    "ERROR: the server was stopped, and this run with it; no file is half-written. Run the command "
    "again."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds of a server.

    Parameters
    ----------
    at_a_time
        Number of runs in work.
    queue
        Number of runs that may wait; more are refused.
    idle_s
        Seconds without a connection after which the server ends; None for never.
    """

    at_a_time: int
    queue: int
    idle_s: float | None


class Server:
    """Does the runs that clients hand over.

    Parameters
    ----------
    job
        Does a run.
    limits
        Bounds.
    conditions
        From ``conditions.conditions``; clients with others are refused.
    token
        What clients must send; None for Unix sockets.
    """

    def __init__(
        self,
        job: Job,
        *,
        limits: Limits,
        conditions: Mapping[str, str],
        token: str | None,
    ) -> None:
        self._job = job
        self._limits = limits
        self._conditions = conditions
        self._token = token
        self._pool = ThreadPoolExecutor(limits.at_a_time, thread_name_prefix="totalfast-served")
        self._log = RunLog()
        self._runs: dict[Run, Future[Ending | None]] = {}
        self._connections = 0
        self._count = 0
        self._idle_since = time.monotonic()
        self._stopping = False
        self._stop = asyncio.Event()

    def stop(self) -> None:
        """Cancel the runs and end; for the event loop's thread."""
        self._stop.set()

    async def serve(self, opened: socket.socket) -> None:
        """Serve at a listening socket until the server is idle or stopped."""
        root = logging.getLogger("totalfast")
        root.addHandler(self._log)
        # A socket of either kind is listening already, so that both are served in the same way.
        server = await asyncio.start_server(self._connected, sock=opened)
        try:
            await self._until_idle_or_stopped()
        finally:
            self._stopping = True
            server.close()
            await asyncio.sleep(ACCEPTED_S)
            await self._cancel_all()
            root.removeHandler(self._log)

    async def _until_idle_or_stopped(self) -> None:
        idle_s = self._limits.idle_s
        while True:
            left = None
            if idle_s is not None:
                left = idle_s - (time.monotonic() - self._idle_since)
                if self._connections:
                    left = idle_s
                elif left <= 0:
                    logger.info("idle for %.0f s; the server ends", idle_s)
                    return
            try:
                await asyncio.wait_for(self._stop.wait(), left)
            except asyncio.TimeoutError:  # noqa: UP041 - not TimeoutError in Python 3.10
                continue
            logger.info("the server is stopped")
            return

    async def _cancel_all(self) -> None:
        for run in list(self._runs):
            self._cancel(run)
        self._pool.shutdown(wait=False, cancel_futures=True)
        end = time.monotonic() + STOP_S
        while self._runs and time.monotonic() < end:
            await asyncio.sleep(0.02)
        end = time.monotonic() + CLOSING_S
        while self._connections and time.monotonic() < end:
            await asyncio.sleep(0.02)
        for run in self._runs:
            logger.warning("WARNING: %s did not end in %.0f s.", run, STOP_S)

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
            asyncio.get_running_loop().call_later(TIDY_S, self._tidy)

    def _tidy(self) -> None:
        """Free memory in a pause between runs."""
        if not self._connections and time.monotonic() - self._idle_since >= TIDY_S:
            asyncio.get_running_loop().run_in_executor(None, release_free_memory)

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
        await self._serve(self._new_run(request, writer), reader, writer)

    def _why_refused(self, request: Frame) -> str:
        """Why a request is not accepted; an empty text if it is."""
        token = request.get("token")
        if self._token is not None and not (
            isinstance(token, str)
            and hmac.compare_digest(token.encode(errors="replace"), self._token.encode())
        ):
            return "its token is another one"
        if self._stopping:
            return "the server ends"
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
        waiting = len(self._runs) - self._limits.at_a_time
        if waiting >= self._limits.queue:
            return f"{waiting} runs are waiting for the server"
        return ""

    def _new_run(self, request: Frame, writer: asyncio.StreamWriter) -> Run:
        loop = asyncio.get_running_loop()
        self._count += 1

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
            number=self._count,
            words=tuple(request["words"]),
            paths=request["paths"],
            send=send,
        )

    async def _serve(
        self, run: Run, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Do a run, and cancel it if its client cancels it or is gone."""
        writer.write(encode({"event": "queued", "ahead": len(self._runs)}))
        future = self._runs[run] = self._pool.submit(self._work, run)
        watching = asyncio.ensure_future(self._watch(run, reader))
        try:
            await asyncio.wait([asyncio.wrap_future(future)])
            final = self._final(run, future)
        finally:
            watching.cancel()
            del self._runs[run]
        writer.write(encode(final))
        await writer.drain()

    async def _watch(self, run: Run, reader: asyncio.StreamReader) -> None:
        """Wait until the client cancels its run, or is gone."""
        try:
            while (frame := await read_frame(reader)) is not None:
                if frame.get("event") == "cancel":
                    break
        except FrameError as error:
            logger.info("%s is cancelled: %s", run, error)
        self._cancel(run)

    def _cancel(self, run: Run) -> None:
        run.cancelled.set()
        self._runs[run].cancel()  # if it waits

    def _final(self, run: Run, ended: Future[Ending | None]) -> Frame:
        """Return the last event of a run, and log how it ended."""
        elapsed_s = run.elapsed_s()
        if ended.cancelled():  # it has not begun
            logger.info("%s is cancelled; it waited for %.2f s", run, elapsed_s)
            if self._stopping:
                return {"event": "refused", "reason": "the server ends"}
            return {"event": "ended", "code": CANCELLED, "error": ""}
        error = ended.exception()
        if error is not None:
            logger.warning("WARNING: %s failed: %s.", run, type(error).__name__)
            text = f"ERROR: the server failed: unexpected {type(error).__name__}."
            return {"event": "ended", "code": 1, "error": text}
        ending = ended.result()
        if ending is None:
            logger.info("%s is cancelled after %.2f s", run, elapsed_s)
            text = STOPPED if self._stopping else ""
            return {"event": "ended", "code": 1 if text else CANCELLED, "error": text}
        logger.info("%s has ended after %.2f s, exit code %d", run, elapsed_s, ending.code)
        return {"event": "ended", "code": ending.code, "error": ending.error}

    def _work(self, run: Run) -> Ending | None:
        """Do a run, in a thread of the pool; None if it was cancelled."""
        run.send({"event": "begun"})
        paths = [repr(run.paths.get(name)) for name in ("input", "output")]
        logger.info("%s begins after %.2f s: %s", run, run.elapsed_s(), " -> ".join(paths))
        self._log.add(run)
        try:
            return self._job(run.words, run.paths, EventProgress(run))
        except Cancelled:
            return None
        finally:
            self._log.remove()


def _is_table(value: object) -> TypeGuard[dict[str, str]]:
    """Whether a value is an object of texts."""
    return isinstance(value, dict) and all(isinstance(item, str) for item in value.values())


def _is_list(value: object) -> TypeGuard[list[str]]:
    """Whether a value is a list of texts."""
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
