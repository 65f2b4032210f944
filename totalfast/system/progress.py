"""Progress of a run: one bar for the whole run, and log lines per stage."""

from __future__ import annotations

import logging
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType


logger = logging.getLogger(__name__)


class Progress:
    """A tqdm bar whose percentage is a share of the expected time.

    Parameters
    ----------
    disable
        Show no bar.
    """

    def __init__(self, *, disable: bool) -> None:
        from tqdm import tqdm

        self._bar: Any = tqdm(
            total=1.0,
            disable=disable,
            leave=False,
            dynamic_ncols=True,
            bar_format="{desc:<15}{percentage:3.0f}%|{bar}| {elapsed}<{remaining}",
        )

    def stage(self, name: str) -> None:
        """Show the name of the current stage."""
        self._bar.set_description_str(name)

    def expect(self, total: float) -> None:
        """Set the total amount of work. Only ratios matter, so any unit can be used."""
        self._bar.total = total
        self._bar.refresh()

    def correct(self, total: float) -> None:
        """Set another total amount of work; what is done stays done."""
        self.expect(total)

    def advance(self, work: float) -> None:
        """Add finished work."""
        self._bar.update(max(min(work, self._bar.total - self._bar.n), 0.0))

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.refresh()
        self._bar.close()


class Cancelled(BaseException):
    """A run is to end; not an error of the run."""


class CancellableProgress(Progress):
    """A base for what takes the place of the bar where other threads can end a run.

    Parameters
    ----------
    cancelled
        Set to end the run at its next sign of progress.
    """

    def __init__(self, cancelled: threading.Event) -> None:
        self._cancelled = cancelled

    def _check(self) -> None:
        if self._cancelled.is_set():
            raise Cancelled


@contextmanager
def timed(before: str | None, after: str) -> Iterator[None]:
    """Log a line at the start, and a line with the elapsed time at the end.

    Programs around TotalSegmentator parse these lines.
    """
    if before is not None:
        logger.info(before)
    start_s = time.perf_counter()
    yield
    logger.info("%s %.2fs", after, time.perf_counter() - start_s)
