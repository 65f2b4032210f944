"""What runs of several threads share: turns, one after the other, and the memory of the machine."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

WAIT_S = 0.5
"""How long a thread waits before it looks whether it still should."""


class Turns:
    """A lock whose waiting threads get it in the order in which they asked for it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[object] = deque()
        """The first one has the lock."""

    @contextlib.contextmanager
    def turn(self, on_wait: Callable[[], object] = lambda: None) -> Iterator[None]:
        """Wait for the lock and hold it.

        ``on_wait`` is called while a thread waits, at least every half second; its error ends the
        waiting.
        """
        ticket = object()
        with self._changed:
            self._waiting.append(ticket)
        try:
            _wait_for(self._changed, lambda: self._waiting[0] is ticket, on_wait)
            yield
        finally:
            with self._changed:
                self._waiting.remove(ticket)
                self._changed.notify_all()

    @property
    def taken(self) -> bool:
        """Whether a thread has the lock."""
        return bool(self._waiting)

    def take_if_free(self) -> bool:
        """Take the lock and return True, if no thread has it; ``give_back`` it then."""
        with self._changed:
            is_free = not self._waiting
            if is_free:
                self._waiting.append(object())
        return is_free

    def give_back(self) -> None:
        """Give the lock to the next thread."""
        with self._changed:
            self._waiting.popleft()
            self._changed.notify_all()


class MemoryGate:
    """Lets runs begin, in order, whose memory fits beside that of the runs that have begun.

    A run that would not fit alone either begins alone, so that nothing waits for ever.
    """

    def __init__(self) -> None:
        self._door = Turns()
        """So that a large run is not overtaken by small ones again and again."""
        self._changed = threading.Condition()
        self._running: dict[object, float] = {}
        self._free = 0.0
        """Free bytes before the first of the runs began that run now."""

    @contextlib.contextmanager
    def passed(
        self, need: float, *, free: float, on_wait: Callable[[], object] = lambda: None
    ) -> Iterator[float]:
        """Wait until a run of ``need`` bytes fits; yield the bytes that it may take.

        ``on_wait`` is as in ``Turns.turn``. ``free`` is the machine's free memory now. It counts if
        no other run has begun; else the other runs' estimates are subtracted from what was free
        before them, because they have not taken all of it yet.
        """
        ticket = object()
        with self._door.turn(on_wait):
            _wait_for(self._changed, lambda: self._fits(need), on_wait)
            with self._changed:
                if not self._running:
                    self._free = free
                others = sum(self._running.values())
                self._running[ticket] = need
        try:
            yield self._free - others
        finally:
            with self._changed:
                del self._running[ticket]
                self._changed.notify_all()

    def _fits(self, need: float) -> bool:
        return not self._running or need + sum(self._running.values()) <= self._free


def _wait_for(
    changed: threading.Condition, is_so: Callable[[], bool], on_wait: Callable[[], object]
) -> None:
    """Wait until a condition holds, and call ``on_wait`` meanwhile."""
    while True:
        with changed:
            if changed.wait_for(is_so, WAIT_S):
                return
        on_wait()
