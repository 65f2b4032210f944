"""Errors and signals become a message on stderr and an exit code."""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
import traceback
from typing import TYPE_CHECKING

from totalfast.cli.advice import explain, report_of
from totalfast.errors import InterruptedAfterSaving, OptionError, TotalfastError
from totalfast.system.signals import ENDING_SIGNALS

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable
    from types import FrameType

WRONG_OPTION = 2
"""Exit code for options that make no sense; argparse uses it too."""

SIGNALLED = 128
"""Exit code of a process that a signal ended, minus the signal's number; shells use it too: 130
after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP."""


def run_to_exit_code(run: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Run a command; turn errors and signals into a line on stderr and an exit code.

    Parameters
    ----------
    run
        Function of the parsed arguments that returns an exit code.
    args
        With ``args.debug``, the traceback of an error is printed, too.
    """
    with _Interruption() as interruption:
        try:
            return run(args)
        except KeyboardInterrupt as interrupted:
            if interruption.is_nested:
                raise
            print(_last_line(interrupted), file=sys.stderr)
            return interruption.exit_code
        except Exception as error:  # noqa: BLE001 - the last place where it can become a message
            cause = _interruption_before(error)
            if cause is not None and not interruption.is_nested:
                print(_last_line(cause), file=sys.stderr)
                return interruption.exit_code
            code, lines = failure(error, args)
            print(lines, file=sys.stderr)
            return code


def _interruption_before(error: BaseException | None) -> KeyboardInterrupt | None:
    """Return the interruption that was being handled when an error was raised, if one was."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error


def _last_line(interruption: KeyboardInterrupt) -> str:
    if isinstance(interruption, InterruptedAfterSaving):
        return "Interrupted; the results were already complete."
    return "Interrupted; no file is half-written."


def failure(error: Exception, args: argparse.Namespace) -> tuple[int, str]:
    """Return the exit code for an error, and its lines for stderr.

    The last line begins with ERROR. Above it are the lines of a bug report, if the error is
    unexpected, and with ``args.debug`` the traceback.
    """
    above = "".join(traceback.format_exception(error)) if args.debug else ""
    if isinstance(error, TotalfastError):
        code = WRONG_OPTION if isinstance(error, OptionError) else 1
        return code, f"{above}ERROR: {error}"
    explanation = explain(error)
    if explanation is not None:
        return 1, f"{above}ERROR: {explanation}"
    # Without the error's message, which may quote a scan's header.
    return 1, (
        f"{above}{report_of(error, args)}\n"
        f"ERROR: unexpected {type(error).__name__}. This is a bug; please report the lines above. "
        "--debug shows the error's message and a traceback."
    )


class _Interruption:
    """Turns the first signal that ends a process into KeyboardInterrupt; ignores further ones.

    A context manager. While files are cleaned up after the first signal, a second one must not
    interrupt the cleaning. Signals that are ignored, for example by nohup, stay ignored. Within
    another one, as when the demo runs a command, it leaves the signals to the outer one.
    """

    def __init__(self) -> None:
        self.is_nested = False
        self._number: int = signal.SIGINT
        self._previous: dict[int, object] = {}

    @property
    def exit_code(self) -> int:
        """Exit code for the signal that arrived."""
        return SIGNALLED + self._number

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        self._number = number
        for other in self._previous:
            signal.signal(other, signal.SIG_IGN)
        raise KeyboardInterrupt

    def __enter__(self) -> _Interruption:
        self.is_nested = isinstance(signal.getsignal(signal.SIGTERM), _Interruption)
        in_main_thread = threading.current_thread() is threading.main_thread()
        if self.is_nested or not in_main_thread:
            return self
        if hasattr(os, "register_at_fork"):
            _reset_handlers_in_forked_processes()
        for number in ENDING_SIGNALS:
            previous = signal.getsignal(number)
            if previous not in (None, signal.SIG_IGN):
                self._previous[number] = previous
                signal.signal(number, self)
        return self

    def __exit__(self, *_: object) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)  # type: ignore[arg-type] # as getsignal returned it


@functools.cache
def _reset_handlers_in_forked_processes() -> None:
    """Give processes that a library forks the default actions, from their first moment on.

    Their pools end them with SIGTERM. A Python handler can miss a signal that arrives just after
    the fork or before a lock, and then the pool waits for ever. So signals are blocked during each
    fork, until the new process has dropped our handler. The hooks can't be removed, but do nothing
    while no command runs.
    """
    before = threading.local()

    def block() -> None:
        before.mask = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING_SIGNALS)

    def restore() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, before.mask)

    def reset() -> None:
        for number in ENDING_SIGNALS:
            if isinstance(signal.getsignal(number), _Interruption):
                signal.signal(number, signal.SIG_DFL)
        restore()

    os.register_at_fork(before=block, after_in_parent=restore, after_in_child=reset)
