"""The main command: segment one scan, or list tasks and classes.

Imports neither torch nor nibabel until a scan is segmented, so that lists and errors in the
options appear without delay.
"""

from __future__ import annotations

import functools
import logging
import os
from typing import TYPE_CHECKING, cast

from totalfast import upstream
from totalfast.cli.console import configure_output
from totalfast.cli.exit_codes import run_to_exit_code
from totalfast.cli.flags import keywords_of, tasks_of

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from totalfast.options import SegmentKeywords
    from totalfast.session import Session
    from totalfast.system.progress import Progress

CITATION = "If you use this tool please cite: https://pubs.rsna.org/doi/10.1148/ryai.230024"

SERVER_VARIABLE = "TOTALFAST_SERVER"
"""Environment variable with the place of the server that runs are handed to; see
``totalfast.serve.places``, which is imported only if the variable is set."""

logger = logging.getLogger("totalfast")


def run_main_command(parser: argparse.ArgumentParser, words: Sequence[str]) -> int:
    """Parse the flags, print a list or segment a scan, and return the exit code.

    Parameters
    ----------
    parser
        From ``totalfast.cli.parser.build_parser``.
    words
        The command line without the program's name.
    """
    args = parser.parse_args(words)
    if args.list_tasks:
        print(upstream.format_tasks_table())
        return 0
    if args.list_classes is not None:
        if args.list_classes not in upstream.TASKS:
            parser.error(
                f"unknown task '{args.list_classes}' for --list-classes. "
                "Run --list-tasks to see all options."
            )
        print(upstream.format_classes_table(args.list_classes))
        return 0
    missing = [flag for flag, value in (("-i", args.input), ("-o", args.output)) if value is None]
    if missing:
        parser.error(f"the following arguments are required for segmentation: {', '.join(missing)}")
    configure_output(quiet=args.quiet, verbose=args.verbose)
    return run_to_exit_code(functools.partial(_segment_or_hand_over, words), args)


def _segment_or_hand_over(words: Sequence[str], args: argparse.Namespace) -> int:
    """Let a server segment the scan if there is one that can, or do it in this process."""
    if os.environ.get(SERVER_VARIABLE):
        from totalfast.cli.hand_over import hand_over

        code = hand_over(words, args)
        if code is not None:
            return code
    return segment_scan(args)


def segment_scan(
    args: argparse.Namespace, session: Session | None = None, progress: Progress | None = None
) -> int:
    """Segment the scan; the parsed flags become the keywords of ``Session.segment``.

    Parameters
    ----------
    args
        The parsed flags.
    session
        Where models are kept; None for a session of this run.
    progress
        Where progress is shown; None shows a bar unless the flags are quiet.
    """
    from totalfast.session import Session

    logger.info("\n%s\n", CITATION)
    others = ("input", "output", "list_tasks", "list_classes")
    keywords = cast("SegmentKeywords", keywords_of(args, without=others))
    session = session or Session(keep_models=False, follow_modality=True)
    tasks = tasks_of(args)
    if len(tasks) > 1:
        session.tasks_shown(args.input, args.output, tasks, keywords, progress)
        return 0
    keywords["task"] = tasks[0]
    session.segment_shown(args.input, args.output, keywords, progress)
    return 0
