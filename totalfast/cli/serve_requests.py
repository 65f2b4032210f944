"""Command lines that come to a server: parsed without printing, and checked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from totalfast.cli.flags import keywords_of, tasks_of
from totalfast.cli.parser import build_parser
from totalfast.errors import OptionError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence
    from typing import NoReturn

    from totalfast.serve.http_runs import Command

NOT_BY_HTTP = ("trust_model", "license_number", "nora_tag", "list_tasks", "list_classes", "debug")
"""Arguments that run code of a model or another program, are stored, or quote files' content."""

NO_KEYWORDS = ("input", "output", "list_tasks", "list_classes")
"""Arguments that are no keywords of ``Session.segment``."""


def read_command(words: Sequence[str]) -> Command:
    """Tell what a command line means that came by HTTP.

    Raises
    ------
    OptionError
        If it is not valid, or has a flag that is not for HTTP.
    """
    from totalfast.files.targets import output_in
    from totalfast.options import Options
    from totalfast.serve.client import absolute_paths
    from totalfast.serve.http_runs import Command

    args = parse_quietly(words)
    parser = build_parser()
    for name in NOT_BY_HTTP:
        if getattr(args, name) != parser.get_default(name):
            raise OptionError(f"{name} can't be set by HTTP.")
    keywords, tasks = keywords_of(args, without=NO_KEYWORDS), tasks_of(args)
    options = [Options.from_keywords({**keywords, "task": task}) for task in tasks]
    output = output_in(Path("segmentations"), options[0])
    is_folder = len(tasks) > 1 or not options[0].multilabel
    return Command(
        paths=absolute_paths(vars(args)),
        output_name="segmentations" if is_folder else output.name,
        output_types=tuple(args.output_type or ()),
    )


def parse_quietly(words: Sequence[str]) -> argparse.Namespace:
    """Parse a command line of the main command without printing or exiting.

    Raises
    ------
    OptionError
        If it is not valid, or wants help or the version.
    """

    def refuse(message: str) -> NoReturn:
        raise OptionError(message)

    parser = build_parser()
    parser.error = refuse  # type: ignore[method-assign] # it would print and exit
    if any(word in ("-h", "--help", "--version") for word in words):
        raise OptionError("help and version are not for a server.")
    try:
        return parser.parse_args(words)
    except SystemExit as error:  # an abbreviation of these
        raise OptionError("the server only segments scans.") from error
