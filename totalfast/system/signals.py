"""Signals that end a process: which they are, and how to hold them back for a moment."""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

ENDING_SIGNALS = tuple(
    signal.Signals[name]
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
    if name in signal.Signals.__members__
)
"""Ctrl-C, the end of a job, a closed terminal, and on Windows Ctrl-Break."""


@contextmanager
def signals_held() -> Iterator[None]:
    """Hold back the signals that end a process until the context ends, then deliver the first one.

    Notes
    -----
    Python runs signal handlers in the main thread only. In other threads the context does nothing,
    because no handler can interrupt them. Ignored signals stay ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    handlers = {number: signal.getsignal(number) for number in ENDING_SIGNALS}
    held = {
        number: handler
        for number, handler in handlers.items()
        if handler not in (None, signal.SIG_IGN)
    }
    try:
        for number in held:
            signal.signal(number, note)
        yield
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)
        if received:
            signal.raise_signal(received[0])
