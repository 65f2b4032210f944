"""``totalfast shim``: writes a ``TotalSegmentator`` command that runs totalfast."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

from totalfast.errors import OutputError

MARK = "Written by 'totalfast shim'"
"""Text in the first lines of every shim. A file without it is never overwritten."""

POSIX = f"""\
#!/bin/sh
# {MARK}: TotalSegmentator's command, run by totalfast.
'''exec' {{python}} "$0" "$@"
' '''
import runpy

runpy.run_module("totalfast.shim", run_name="__main__")
"""
"""A shell script and a Python script in one, as pip writes them. 3D Slicer's extension runs the
file with its Python; other programs execute it. The path of Python may be long and have spaces."""

WINDOWS = f"""\
@rem {MARK}: TotalSegmentator's command, run by totalfast.
@"{{python}}" -m totalfast.shim %*
"""


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the subcommand."""
    parser = argparse.ArgumentParser(
        prog="totalfast shim",
        description="Write a TotalSegmentator command that runs totalfast, for programs that\n"
        "start TotalSegmentator. Flags, files, printed lines and exit codes are the same.",
        epilog="example:\n  totalfast shim ~/shim && export PATH=~/shim:$PATH",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "directory", type=Path, help="Folder for the command. Put it first on PATH."
    )
    parser.add_argument("--debug", action="store_true", help="Show the traceback of an error.")
    return parser


def run(args: argparse.Namespace) -> int:
    """Write the command and print how to use it."""
    path = write_shim(args.directory)
    print(f"{path} runs totalfast. Put {path.parent} first on PATH.")
    return 0


def write_shim(directory: Path) -> Path:
    """Write the command into a directory; return its absolute path.

    Raises
    ------
    OutputError
        If it can't be written, or if another file has its name.
    """
    from totalfast.system.pending_files import PendingFiles

    windows = os.name == "nt"
    path = directory.absolute() / ("TotalSegmentator.bat" if windows else "TotalSegmentator")
    if path.exists() and not _is_shim(path):
        raise OutputError(
            f"{path} was not written by totalfast; move it away or give another directory."
        )
    python = sys.executable if windows else shlex.quote(sys.executable)
    text = (WINDOWS if windows else POSIX).format(python=python)

    def write(staged: Path) -> None:
        staged.write_text(text, encoding="utf-8")
        staged.chmod(0o755)

    with PendingFiles() as files:
        files.write(path, write)
        files.commit()
    return path


def _is_shim(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return MARK.encode() in stream.read(200)
