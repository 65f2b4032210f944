"""The runs of a server: in order, a few at a time, cancelled one by one or all together.

Knows nothing of connections. All methods are for the event loop's thread; the runs are in threads.
"""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from totalfast.errors import TotalfastError
from totalfast.serve.runs import Ending, EventProgress, RunLog
from totalfast.system.process_memory import release_free_memory
from totalfast.system.progress import Cancelled

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from concurrent.futures import Future

    from totalfast.serve.frames import Frame
    from totalfast.serve.runs import Job, Run

logger = logging.getLogger(__name__)

STOP_S = 30.0
"""Seconds that cancelled runs have to end when the server stops. On a CPU a tile takes up to a few
seconds."""

TIDY_S = 2.0
"""Pause after the last run before memory is returned to the system, which takes a few tenths of a
second."""

CANCELLED = 130
"""Exit code of a cancelled run, that of a command after Ctrl-C."""

STOPPED = (
    "ERROR: the server was stopped, and this run with it; no file is half-written. Run the command "
    "again."
)


class RunQueue:
    """Runs in work and waiting.

    Parameters
    ----------
    job
        Does a run.
    at_a_time
        Number of runs in work.
    waiting
        Number of runs that may wait.
    """

    def __init__(self, job: Job, *, at_a_time: int, waiting: int) -> None:
        self._job = job
        self._at_a_time, self._waiting = at_a_time, waiting
        self._pool = ThreadPoolExecutor(at_a_time, thread_name_prefix="totalfast-served")
        self._log = RunLog()
        logging.getLogger("totalfast").addHandler(self._log)
        self._runs: dict[Run, Future[Ending | None]] = {}
        self._reserved: set[Run] = set()
        self._stopping = False
        self._count = 0
        self.idle_since = time.monotonic()
        """When a run has ended last."""

    def __len__(self) -> int:
        return len(self._runs) + len(self._reserved)

    @property
    def is_stopping(self) -> bool:
        """Whether the server ends."""
        return self._stopping

    def next_number(self) -> int:
        """Return the number of a new run."""
        self._count += 1
        return self._count

    def why_closed(self) -> str:
        """Why no run is accepted now; an empty text if one is."""
        if self._stopping:
            return "the server ends"
        waiting = len(self) - self._at_a_time
        if waiting >= self._waiting:
            return f"{waiting} runs are waiting for the server"
        return ""

    def reserve(self, run: Run) -> None:
        """Keep a place for a run whose files are being fetched or stored."""
        self._reserved.add(run)

    def release(self, run: Run) -> None:
        """Give up the place of a run that is not started, if it has one."""
        self._reserved.discard(run)
        self.idle_since = time.monotonic()

    def start(self, run: Run) -> Coroutine[None, None, Frame]:
        """Put a run into the queue; wait for its last event, "ended" or "refused", with await."""
        self._reserved.discard(run)
        self._runs[run] = self._pool.submit(self._work, run)
        return self._ended(run)

    async def _ended(self, run: Run) -> Frame:
        future = self._runs[run]
        try:
            await asyncio.wait([asyncio.wrap_future(future)])
        finally:
            del self._runs[run]
            self.idle_since = time.monotonic()
            asyncio.get_running_loop().call_later(TIDY_S, self._tidy)
        return self._last_event(run, future)

    def cancel(self, run: Run) -> None:
        """End a run at its next sign of progress, or take it out of the queue."""
        run.cancelled.set()
        if run in self._runs:
            self._runs[run].cancel()  # if it waits

    async def stop(self) -> None:
        """Accept no more runs, cancel all, and wait until they have ended."""
        self._stopping = True
        for run in list(self._runs):
            self.cancel(run)
        end = time.monotonic() + STOP_S
        while self._runs and time.monotonic() < end:
            await asyncio.sleep(0.02)
        for run in self._runs:
            logger.warning("WARNING: %s did not end in %.0f s.", run, STOP_S)
        self._pool.shutdown(wait=False, cancel_futures=True)
        logging.getLogger("totalfast").removeHandler(self._log)

    def _tidy(self) -> None:
        """Free memory in a pause between runs."""
        if not self._runs and not self._stopping:
            asyncio.get_running_loop().run_in_executor(None, release_free_memory)

    def _last_event(self, run: Run, future: Future[Ending | None]) -> Frame:
        """Return the last event of a run, and log how it ended."""
        elapsed_s = run.elapsed_s()
        if future.cancelled():  # it has not begun
            logger.info("%s is cancelled; it waited for %.2f s", run, elapsed_s)
            if self._stopping:
                return {"event": "refused", "reason": "the server ends"}
            return {"event": "ended", "code": CANCELLED, "error": ""}
        error = future.exception()
        if error is not None:
            logger.warning("WARNING: %s failed: %s.", run, type(error).__name__)
            text = f"ERROR: the server failed: unexpected {type(error).__name__}."
            return {"event": "ended", "code": 1, "error": text}
        ending = future.result()
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
            return self._job(run.words, run.check(run.paths), EventProgress(run))
        except Cancelled:
            return None
        except TotalfastError as error:
            return Ending(code=2, error=f"ERROR: {error}")
        finally:
            self._log.remove()
