"""Errors and signals become a message on stderr and an exit code."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import threading
from typing import TYPE_CHECKING

from totalfast.errors import OptionError, TotalfastError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator
    from types import FrameType

WRONG_OPTION = 2
"""Exit code for options that make no sense; argparse uses it too."""

INTERRUPTED = 130
"""Exit code after Ctrl-C; shells use it too."""


def run_to_exit_code(run: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Run a command; turn errors into a line on stderr and an exit code.

    Parameters
    ----------
    run
        Function of the parsed arguments that returns an exit code.
    args
        With ``args.debug``, errors are raised instead.
    """
    try:
        with _termination_as_interruption():
            return run(args)
    except TotalfastError as error:
        if args.debug:
            raise
        print(f"ERROR: {error}", file=sys.stderr)
        return WRONG_OPTION if isinstance(error, OptionError) else 1
    except MemoryError:
        if args.debug:
            raise
        print("ERROR: out of memory. Try --fast or --force_split.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted; no file is half-written.", file=sys.stderr)
        return INTERRUPTED


def _raise_interrupt(signal_number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@contextlib.contextmanager
def _termination_as_interruption() -> Iterator[None]:
    """Turn SIGTERM into KeyboardInterrupt within the context, so that partial files are removed.

    Processes that a library forks within the context keep the default action of SIGTERM, because
    their pools end them with it: a Python handler can miss a signal that arrives just after the
    fork or before a lock, and then the pool waits forever.
    """
    previous = signal.signal(signal.SIGTERM, _raise_interrupt)
    if hasattr(os, "register_at_fork"):
        _reset_handler_in_forked_processes()
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous or signal.SIG_DFL)


@functools.cache
def _reset_handler_in_forked_processes() -> None:
    """Block SIGTERM during each fork, until the new process has dropped our handler."""
    before = threading.local()

    def block() -> None:
        before.mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def restore() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, before.mask)

    def reset() -> None:
        if signal.getsignal(signal.SIGTERM) is _raise_interrupt:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        restore()

    os.register_at_fork(before=block, after_in_parent=restore, after_in_child=reset)
