"""The ``totalfast`` command: runs a subcommand or the main command.

Importing it imports neither torch, numpy nor nibabel, so that ``--help`` and ``--version`` answer
without delay.
"""

from __future__ import annotations

import atexit
import importlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from totalfast.cli.console import hide_messages_of_libraries, make_printing_safe
from totalfast.cli.exit_codes import run_to_exit_code
from totalfast.cli.parser import build_parser
from totalfast.cli.segment import run_main_command
from totalfast.system.cores import limit_libraries
from totalfast.system.process_memory import prepare_process

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

SUBCOMMANDS = {
    "batch": "totalfast.cli.batch",
    "cache": "totalfast.cli.cache",
    "demo": "totalfast.cli.demo",
    "nnunet": "totalfast.cli.nnunet",
    "preview": "totalfast.cli.preview",
    "serve": "totalfast.cli.serve",
    "shim": "totalfast.cli.shim",
    "weights": "totalfast.cli.weights",
}
"""First word to the module of the subcommand, which has ``build_parser()`` and ``run(args)``."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    Parameters
    ----------
    argv
        The command line without the program's name; None for the process's own.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    if words and words[0] in SUBCOMMANDS:
        module = importlib.import_module(SUBCOMMANDS[words[0]])
        args = module.build_parser().parse_args(words[1:])
        args.words = words[1:]
        return run_to_exit_code(module.run, args)
    return run_main_command(build_parser(), words)


def command(run: Callable[[], int] = main) -> None:
    """Run a command and end the process: the console script.

    Shutting down the interpreter takes half a second with torch in it. Only functions that
    libraries registered to run at exit are called.
    """
    if not _has_current_folder():
        print("ERROR: the current folder was deleted; change to another one.", file=sys.stderr)
        os._exit(1)
    prepare_process()
    limit_libraries()
    make_printing_safe()
    if "--debug" not in sys.argv:
        hide_messages_of_libraries()
    code = run()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _has_current_folder() -> bool:
    """Whether the current folder exists; numeric libraries end the process without one."""
    try:
        Path.cwd()
    except FileNotFoundError:
        return False
    return True
