"""``python -m totalfast.patch``: run a program, and the processes that it starts, on totalfast."""

from __future__ import annotations

import argparse
import importlib.metadata
import logging
import os
import runpy
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from totalfast.compat.patch_nnunet import patch_nnunet
from totalfast.compat.patch_totalsegmentator import patch_totalsegmentator
from totalfast.compat.rebinding import when_imported

if TYPE_CHECKING:
    from collections.abc import Sequence

logger = logging.getLogger(__name__)

CHILD = str(Path(__file__).with_name("child"))
"""Folder of the ``sitecustomize.py`` that patches the processes that a program starts."""

EPILOG = """\
examples:
  python -m totalfast.patch predict.py --input scans
  python -m totalfast.patch -m my_package.predict scans
  python -m totalfast.patch mrsegmentator -i scans -o out
"""


def patch_when_imported() -> None:
    """Patch nnU-Net and TotalSegmentator as soon as this process imports them.

    Not earlier: programs set environment variables before they import them.
    """
    when_imported("nnunetv2.inference.predict_from_raw_data", _patch_nnunet)
    when_imported("totalsegmentator.python_api", patch_totalsegmentator)


def _patch_nnunet() -> None:
    try:
        patch_nnunet()
    except ImportError as error:  # another version of nnU-Net
        logger.warning("WARNING: nnU-Net is not patched: %s", error)


def main(words: Sequence[str]) -> None:
    """Run a script, a module or an installed command as Python does, on totalfast.

    Parameters
    ----------
    words
        The command line without the program's name: ``-m module``, a script or a command, and its
        arguments.
    """
    parser = argparse.ArgumentParser(
        prog="python -m totalfast.patch",
        usage="%(prog)s [-h] (-m module | script.py | command) ...",
        description="Run a Python program, and the Python processes that it starts.\n"
        "TotalSegmentator's Python API and nnU-Net's predictor are replaced by totalfast's,\n"
        "with the same results.\n"
        "Models are trusted as nnU-Net trusts them: their files may contain code.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "-m", dest="module", nargs=argparse.REMAINDER, help="Module to run, and its arguments."
    )
    parser.add_argument(
        "script", nargs=argparse.REMAINDER, help="Script or installed command, and its arguments."
    )
    args = parser.parse_args(words)
    program: list[str] = args.module or args.script
    if not program:
        parser.error("give a script, a command, or -m and a module")
    patch_when_imported()
    folders = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ["PYTHONPATH"] = os.pathsep.join([CHILD, *filter(None, folders)])
    sys.argv = program
    if args.module:
        runpy.run_module(program[0], run_name="__main__", alter_sys=True)
        return
    if not Path(program[0]).exists():
        _run_command(program[0], parser)
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = str(Path(program[0]).resolve().parent)
    runpy.run_path(program[0], run_name="__main__")


def _run_command(name: str, parser: argparse.ArgumentParser) -> None:
    """Run a command that a package has installed for this Python; exit with its code."""
    for command in importlib.metadata.entry_points(group="console_scripts", name=name):
        sys.exit(command.load()())
    parser.error(f"there is no script {name}, and no package of this Python has such a command")
