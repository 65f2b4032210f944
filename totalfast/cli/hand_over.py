"""Hand the main command's run to a server, and print what happens as if it ran here."""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING

from totalfast.errors import InterruptedAfterSaving
from totalfast.serve.client import NotServed, absolute_paths, open_run
from totalfast.serve.places import SERVER_VARIABLE
from totalfast.system.progress import Progress

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from totalfast.serve.client import ServedRun
    from totalfast.serve.frames import Frame

logger = logging.getLogger("totalfast")


def hand_over(words: Sequence[str], args: argparse.Namespace) -> int | None:
    """Let the server of ``TOTALFAST_SERVER`` do a run.

    Parameters
    ----------
    words
        The command line, without the program's name.
    args
        The same, parsed.

    Returns
    -------
        The exit code; None if the server did not begin the run, which a warning says.

    Raises
    ------
    ServerLost
        If the server ended while it ran the run.
    """
    try:
        with (
            open_run(os.environ[SERVER_VARIABLE], words, absolute_paths(vars(args))) as run,
            _Console(quiet=args.quiet) as console,
        ):
            return _follow(run, console)
    except NotServed as reason:
        logger.warning("WARNING: This run is not handed to the server: %s.", reason)
        return None


def _follow(run: ServedRun, console: _Console) -> int:
    """Show a run's events, and return its exit code; an interruption cancels it."""
    code = 1
    try:
        for event in run.events():
            console.show(event)
            code = int(event.get("code", code))
    except KeyboardInterrupt:
        ended = run.cancel()
        if ended is not None and ended.get("code") == 0:
            raise InterruptedAfterSaving from None
        raise
    return code


class _Console:
    """Shows a run's events: its log, its progress bar, its error. A context manager."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._bar: Progress | None = None

    def __enter__(self) -> _Console:
        return self

    def __exit__(self, *_: object) -> None:
        self._close_bar()

    def show(self, event: Frame) -> None:
        """Show an event; unknown ones are ignored."""
        kind = event.get("event")
        if kind == "log":
            logger.log(int(event["level"]), "%s", event["text"])
        elif kind == "queued" and event.get("ahead"):
            logger.debug("waiting for a server with %d other runs", event["ahead"])
        elif kind == "bar" and event["shown"]:
            self._bar = Progress(disable=self._quiet)
        elif kind == "bar":
            self._close_bar()
        elif kind == "ended" and event.get("error"):
            print(event["error"], file=sys.stderr)
        elif self._bar is not None:
            self._show_progress(self._bar, event)

    def _show_progress(self, bar: Progress, event: Frame) -> None:
        kind = event.get("event")
        if kind == "stage":
            bar.stage(str(event["name"]))
        elif kind == "expect":
            bar.expect(float(event["total"]))
        elif kind == "advance":
            bar.advance(float(event["work"]))

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
        self._bar = None
