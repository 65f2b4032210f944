"""``totalfast shim``: writes TotalSegmentator's and nnU-Net's commands, which run totalfast."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from totalfast.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Iterable

MARK = "Written by 'totalfast shim'"
"""Text in the first lines of every shim. A file without it is never overwritten."""

TOTALSEGMENTATOR = "-m totalfast.shim"
NNUNET = "-m totalfast nnunet --trust-model"
COMMANDS = {
    "TotalSegmentator": TOTALSEGMENTATOR,
    "nnUNetv2_predict": NNUNET,
    "nnUNetv2_predict_from_modelfolder": NNUNET,
}
"""Name of a command, and Python's arguments that run it. nnU-Net trusts every model."""

POSIX = f"""\
#!/bin/sh
# {MARK}: {{name}}, run by totalfast.
'''exec' {{python}} "$0" "$@"
' '''
import runpy
import sys

_, module, *words = {{arguments!r}}.split()
sys.argv[1:1] = words
runpy.run_module(module, run_name="__main__")
"""
"""A shell script and a Python script in one, as pip writes them. 3D Slicer's extension runs the
file with its Python; other programs execute it. The path of Python may be long and have spaces."""

WINDOWS = f"""\
@rem {MARK}: {{name}}, run by totalfast.
@"{{python}}" {{arguments}} %*
"""


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the subcommand."""
    parser = argparse.ArgumentParser(
        prog="totalfast shim",
        description="Write the commands TotalSegmentator, nnUNetv2_predict and\n"
        "nnUNetv2_predict_from_modelfolder, which run totalfast, for programs that start them.\n"
        "Flags and files are the same. Of TotalSegmentator, printed lines and exit codes too.\n"
        "nnU-Net's commands trust a model: its files may contain code.",
        epilog="example:\n  totalfast shim ~/shim && export PATH=~/shim:$PATH",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "directory", type=Path, help="Folder for the commands. Put it first on PATH."
    )
    parser.add_argument(
        "--only", choices=COMMANDS, metavar="NAME", help="Write only the command of this name."
    )
    parser.add_argument("--debug", action="store_true", help="Show the traceback of an error.")
    return parser


def run(args: argparse.Namespace) -> int:
    """Write the commands and print how to use them."""
    paths = write_shims(args.directory, [args.only] if args.only else COMMANDS)
    names = ", ".join(path.name for path in paths)
    print(f"{names}: run totalfast. Put {paths[0].parent} first on PATH.")
    return 0


def write_shims(directory: Path, names: Iterable[str] = COMMANDS) -> list[Path]:
    """Write commands into a directory; return their absolute paths.

    Raises
    ------
    OutputError
        If one can't be written, or if another file has its name; then none is written.
    """
    from totalfast.system.pending_files import PendingFiles

    windows = os.name == "nt"
    python = sys.executable if windows else shlex.quote(sys.executable)
    paths = []
    with PendingFiles() as files:
        for name in names:
            path = directory.absolute() / (f"{name}.bat" if windows else name)
            if path.exists() and not _is_shim(path):
                raise OutputError(
                    f"{path} was not written by totalfast; move it away, give another directory, "
                    "or write only some of the commands (--only)."
                )
            text = (WINDOWS if windows else POSIX).format(
                name=name, python=python, arguments=COMMANDS[name]
            )

            def write(staged: Path, text: str = text) -> None:
                staged.write_text(text, encoding="utf-8")
                staged.chmod(0o755)

            files.write(path, write)
            paths.append(path)
        files.commit()
    return paths


def _is_shim(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return MARK.encode() in stream.read(200)
