"""The steps of a run that was submitted by HTTP: fetch a series, run, store the result."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING

from totalfast.errors import TotalfastError
from totalfast.serve.run_queue import CANCELLED

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from typing import Any, TypeVar

    from totalfast.serve.frames import Frame
    from totalfast.serve.run_queue import RunQueue
    from totalfast.serve.studies import Studies, StudyOrder
    from totalfast.serve.submitted import Submitted

    Result = TypeVar("Result")

logger = logging.getLogger(__name__)

AHEAD = 2
"""Series that are fetched before their runs begin; more would only fill the disk."""


class Steps:
    """Does the steps of runs. The methods are for the event loop's thread.

    Parameters
    ----------
    queue
        Does the runs.
    studies
        Fetches and stores studies; None if there are no DICOMweb servers.
    """

    def __init__(self, queue: RunQueue, studies: Studies | None) -> None:
        self._queue, self._studies = queue, studies
        self._transfers: dict[Submitted, asyncio.Task[Any]] = {}
        self._ahead = asyncio.Semaphore(AHEAD)

    def cancel(self, submitted: Submitted) -> None:
        """End the step of a run that is in work; no later one begins."""
        self._queue.cancel(submitted.run)
        if submitted in self._transfers:
            self._transfers[submitted].cancel()

    async def last_event(self, submitted: Submitted, order: StudyOrder | None) -> Frame:
        """Do the steps of a run; return its last event.

        Parameters
        ----------
        submitted
            The run; its state is noted on the way.
        order
            What is fetched and where the result is stored; None for no transfers.
        """
        try:
            return await self._steps(submitted, order)
        except asyncio.CancelledError:
            if not submitted.run.cancelled.is_set():
                raise
            return {"event": "ended", "code": CANCELLED, "error": ""}
        except TotalfastError as error:
            text = str(error)
        except OSError as error:
            text = f"{error.strerror or type(error).__name__}."
        except Exception as error:  # noqa: BLE001 - it ends the run, not the server
            logger.warning("WARNING: %s failed: %s.", submitted.run, type(error).__name__)
            text = f"the server failed: unexpected {type(error).__name__}."
        if submitted.has_result:
            text = f"the result can be fetched, but it is not pushed: {text}"
        return {"event": "ended", "code": 1, "error": f"ERROR: {text}"}

    async def _steps(self, submitted: Submitted, order: StudyOrder | None) -> Frame:
        """Fetch, run and push; return the last event."""
        studies, folder = self._studies, submitted.folder
        if order is None or studies is None or folder is None:
            return await self._run(submitted)
        running = await self._fetch(submitted, studies.fetch(order, folder, submitted.note))
        last = await running
        if submitted.has_result and order.push is not None:
            submitted.note({"event": "pushing"})
            push = studies.push(order, folder / "result")
            submitted.stored = await self._transfer(submitted, push)
        return last

    async def _fetch(
        self, submitted: Submitted, fetch: Coroutine[Any, Any, str]
    ) -> asyncio.Task[Frame]:
        """Fetch a series and wait until its run begins, so that few series wait on the disk."""
        with contextlib.closing(fetch):
            await self._transfer(submitted, self._ahead.acquire())
            try:
                submitted.series = await self._transfer(submitted, fetch)
                submitted.note({"event": "waiting"})
                running = asyncio.ensure_future(self._run(submitted))
                begun = asyncio.ensure_future(submitted.begun.wait())
                await asyncio.wait([running, begun], return_when=asyncio.FIRST_COMPLETED)
                begun.cancel()
            finally:
                self._ahead.release()
        return running

    async def _run(self, submitted: Submitted) -> Frame:
        if submitted.run.cancelled.is_set():
            raise asyncio.CancelledError
        if self._queue.is_stopping:
            return {"event": "refused", "reason": "the server ends"}
        last = await self._queue.start(submitted.run)
        submitted.has_result = last.get("code") == 0 and submitted.folder is not None
        return last

    async def _transfer(self, submitted: Submitted, work: Coroutine[Any, Any, Result]) -> Result:
        """Await a transfer, which can be cancelled."""
        self._queue.reserve(submitted.run)
        task = asyncio.ensure_future(work)
        self._transfers[submitted] = task
        if submitted.run.cancelled.is_set():
            task.cancel()
        try:
            return await task
        finally:
            del self._transfers[submitted]
