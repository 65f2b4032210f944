"""Show the progress of a download: as a bar, or where a run shows its progress.

A resident process does runs for others: its own stderr is no place for a bar.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from totalfast.system.progress import Progress

_of_run: ContextVar[Progress | None] = ContextVar("of_run", default=None)


@contextmanager
def downloads_shown_by(progress: Progress) -> Iterator[None]:
    """Show this thread's downloads by a run's progress, which may also cancel them."""
    token = _of_run.set(progress)
    try:
        yield
    finally:
        _of_run.reset(token)


class DownloadBar:
    """The bytes of a download; a context manager.

    Parameters
    ----------
    label
        What is downloaded.
    quiet
        Show nothing.
    """

    def __init__(self, label: str, *, quiet: bool) -> None:
        from tqdm import tqdm

        self._label = f"Downloading {label}"
        self._progress = None if quiet else _of_run.get()
        self._is_open = self._has_total = False
        self._bar: Any = tqdm(
            desc=self._label,
            disable=quiet or self._progress is not None,
            leave=False,
            dynamic_ncols=True,
            unit="B",
            unit_scale=True,
        )

    def __enter__(self) -> DownloadBar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        self._close_progress()

    def start(self, total: int | None, done: int) -> None:
        """Show that a try begins: bytes of the file, if known, and bytes that are there."""
        self._bar.total, self._bar.n = total, done
        self._bar.refresh()
        self._close_progress()
        if self._progress is not None:
            self._progress.__enter__()
            self._is_open, self._has_total = True, bool(total)
            self._progress.stage(self._label)
            if total:
                self._progress.expect(total)
            self.update(done)

    def update(self, count: int) -> None:
        """Show that bytes have arrived."""
        self._bar.update(count if self._progress is None else 0)
        if self._progress is not None and self._has_total:
            self._progress.advance(count)

    def _close_progress(self) -> None:
        if self._is_open and self._progress is not None:
            self._is_open = False
            self._progress.__exit__(None, None, None)
