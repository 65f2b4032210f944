"""What a run tells while it runs: one bar for the whole of it, and a line a stage.

Knows amounts of work and names of stages; knows nothing of what is done in them.
"""

from __future__ import annotations

import logging
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType


logger = logging.getLogger(__name__)


class Progress:
    """A tqdm bar over expected seconds of work, so that the share it shows is one of time.

    Parameters
    ----------
    disable
        Show nothing.
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
        """Name what is being done now."""
        self._bar.set_description_str(name)

    def expect(self, total: float) -> None:
        """Say how much work there is in all. Units need not be right, only their ratios."""
        self._bar.total = total
        self._bar.refresh()

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


@contextmanager
def timed(before: str | None, after: str) -> Iterator[None]:
    """Say what begins, and how long it took: lines that programs around upstream read."""
    if before is not None:
        logger.info(before)
    began = time.perf_counter()
    yield
    logger.info("%s %.2fs", after, time.perf_counter() - began)
