"""``totalfast shim``: write the ``TotalSegmentator`` command that runs totalfast."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

from totalfast.errors import OutputError

MARK = "Written by 'totalfast shim'"
"""In the first lines of every shim, so that no other file is overwritten."""

POSIX = f"""\
#!/bin/sh
# {MARK}: TotalSegmentator's command, run by totalfast.
'''exec' {{python}} "$0" "$@"
' '''
import runpy

runpy.run_module("totalfast.shim", run_name="__main__")
"""
"""A shell's script and a Python script in one, as pip writes them: 3D Slicer's extension gives the
file to its Python, others execute it, and the path of Python may have any length and spaces."""

WINDOWS = f"""\
@rem {MARK}: TotalSegmentator's command, run by totalfast.
@"{{python}}" -m totalfast.shim %*
"""


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the subcommand."""
    parser = argparse.ArgumentParser(
        prog="totalfast shim",
        description="Write a TotalSegmentator command that runs totalfast, for programs that start "
        "TotalSegmentator: same flags, files, lines and exit codes.",
        epilog="example:\n  totalfast shim ~/shim && export PATH=~/shim:$PATH",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", type=Path, help="Where to write it; put it first on PATH.")
    parser.add_argument("--debug", action="store_true", help="Show the traceback of an error.")
    return parser


def run(args: argparse.Namespace) -> int:
    """Write the command."""
    path = write_shim(args.directory)
    print(f"{path} runs totalfast. Put {path.parent} first on PATH.")
    return 0


def write_shim(directory: Path) -> Path:
    """Write the command into a directory; return its absolute path.

    Raises
    ------
    OutputError
        If it can't be written, or another file has its name.
    """
    from totalfast.system.pending_files import PendingFiles

    windows = os.name == "nt"
    path = directory.absolute() / ("TotalSegmentator.bat" if windows else "TotalSegmentator")
    if path.exists() and not _is_shim(path):
        raise OutputError(
            f"{path} is no shim of totalfast's; move it away or give another directory."
        )
    python = sys.executable if windows else shlex.quote(sys.executable)
    text = (WINDOWS if windows else POSIX).format(python=python)
    with PendingFiles() as files:
        part = files.path(path)
        part.write_text(text, encoding="utf-8")
        part.chmod(0o755)
    return path


def _is_shim(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return MARK.encode() in stream.read(200)
