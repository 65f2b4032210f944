"""Printing that can't end a run: log records become lines on stdout, above the progress bar."""

from __future__ import annotations

import io
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, cast

if TYPE_CHECKING:
    from collections.abc import Iterable


class TolerantStream(io.TextIOBase):
    """A text stream that drops what can't be written, instead of raising an error.

    The reader of a pipe can end, a terminal can be closed, and a disk can be full. Characters that
    the encoding lacks are written as escapes.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

    @property
    def encoding(self) -> str:  # type: ignore[override] # a property there, too
        """The wrapped stream's encoding."""
        return self._stream.encoding

    def writable(self) -> bool:
        """Return True."""
        return True

    def isatty(self) -> bool:
        """Whether the wrapped stream is a terminal."""
        return self._stream.isatty()

    def fileno(self) -> int:
        """File descriptor of the wrapped stream."""
        return self._stream.fileno()

    def write(self, text: str) -> int:
        """Write text, or drop it."""
        try:
            return self._stream.write(text)
        except (OSError, ValueError):
            return len(text)

    def writelines(self, lines: Iterable[str]) -> None:  # type: ignore[override] # str only
        """Write each of several texts."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Write what is buffered, or drop it."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            return


def make_printing_safe() -> None:
    """Replace stdout and stderr of this process by streams that never raise an error."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed before the start
            stream = Path(os.devnull).open("w")  # noqa: SIM115 - until the process ends
        setattr(sys, name, cast("TextIO", TolerantStream(stream)))


def hide_messages_of_libraries() -> None:
    """Do not print other libraries' warnings and log records, which may quote a scan's header."""
    logging.captureWarnings(True)
    logging.getLogger().addHandler(logging.NullHandler())


class LineHandler(logging.Handler):
    """Prints each record on a stream without delay, above the progress bar."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        from tqdm import tqdm

        with tqdm.external_write_mode(file=self._stream):
            print(self.format(record), file=self._stream, flush=True)


def configure_output(*, quiet: bool, verbose: bool) -> None:
    """Print totalfast's log records: nothing if ``quiet``, details too if ``verbose``."""
    logger = logging.getLogger("totalfast")
    # The stream of this moment: libraries redirect sys.stdout, also in other threads.
    logger.handlers = [LineHandler(sys.stdout)]
    logger.propagate = False
    logger.setLevel(logging.CRITICAL if quiet else logging.DEBUG if verbose else logging.INFO)


def print_only_cases(*, verbose: bool) -> None:
    """Print what the threads of a batch's cases log only if it is a warning, with the case's name.

    With ``verbose`` they print everything.
    """
    from totalfast.run.many import THREAD_NAME

    def chosen(record: logging.LogRecord) -> bool:
        thread, _, case = (record.threadName or "").partition(" ")
        if thread != THREAD_NAME:
            return True
        record.msg, record.args = f"[{case}] {record.getMessage().strip()}", None
        return verbose or record.levelno >= logging.WARNING

    for handler in logging.getLogger("totalfast").handlers:
        handler.addFilter(chosen)
