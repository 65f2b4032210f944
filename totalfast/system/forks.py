"""Refuses to work in a process that was forked from one whose networks had run.

A fork copies a process's memory but only one of its threads. The threads of OpenMP, oneDNN,
OpenVINO and CUDA are missing in the new process, and locks that other threads held stay locked: it
would wait forever. No function here takes a lock, for the same reason.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from totalfast.errors import ForkError

if TYPE_CHECKING:
    from collections.abc import Iterator


class _Use:
    """What totalfast has done in one process."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self.has_threads = False
        self.working: set[object] = set()
        """One object per piece of work in progress."""


_use = _Use()


def check_process() -> None:
    """Check that networks can run in this process.

    Raises
    ------
    ForkError
        If the process was forked after a network had run, or while totalfast worked.
    """
    global _use
    if _use.process == os.getpid():
        return
    if _use.has_threads or _use.working:
        raise ForkError(
            "this process was forked from one in which totalfast had run a network or was at work; "
            "the threads of torch do not survive a fork. Start processes with "
            'multiprocessing.get_context("spawn"), or fork before the first segmentation.'
        )
    _use = _Use()


def threads_started() -> None:
    """Note that the process has threads of torch, OpenVINO or CUDA from now on."""
    check_process()
    _use.has_threads = True


@contextlib.contextmanager
def working() -> Iterator[None]:
    """Note that other threads may find locks of totalfast taken, as long as the context lasts.

    Raises
    ------
    ForkError
        As ``check_process``.
    """
    check_process()
    use, work = _use, object()
    use.working.add(work)
    try:
        yield
    finally:
        use.working.discard(work)
