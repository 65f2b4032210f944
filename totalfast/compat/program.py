"""``python -m totalfast.patch``: run a program, and the processes that it starts, on totalfast."""

from __future__ import annotations

import argparse
import importlib.metadata
import logging
import os
import runpy
import shutil
import sys
import zipfile
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
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
    parser.add_argument("program", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    if not words or words[0] in ("-h", "--help"):
        parser.parse_args(words)
        parser.error("give a script, a command, or -m and a module")
    patch_when_imported()
    # An empty entry of this variable means the current folder.
    others = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = CHILD if others is None else os.pathsep.join([CHILD, others])
    if words[0].startswith("-m"):
        # As in Python: "-m module" or "-mmodule"; all other words are the program's.
        name, *rest = [words[0][2:], *words[1:]] if words[0] != "-m" else words[1:] or [""]
        if not name:
            parser.error("-m needs a module")
        sys.argv = [name, *rest]
        runpy.run_module(name, run_name="__main__", alter_sys=True)
        return
    sys.argv = list(words)
    path = Path(words[0])
    if path.is_file():
        _run_script(path)
    elif path.is_dir() and (path / "__main__.py").is_file():
        runpy.run_path(words[0], run_name="__main__")
    else:
        _run_command(words[0], parser)


def _run_script(path: Path) -> None:
    """Run a script as the program's main module, which threads and exit functions need."""
    path = path.absolute()
    if zipfile.is_zipfile(path):
        runpy.run_path(str(path), run_name="__main__")
        return
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = str(path.resolve().parent)
    module = ModuleType("__main__")
    module.__file__ = str(path)
    module.__loader__ = SourceFileLoader("__main__", str(path))
    sys.modules["__main__"] = module
    code = compile(path.read_bytes(), str(path), "exec")
    exec(code, vars(module))  # noqa: S102 - what this command is for


def _run_command(name: str, parser: argparse.ArgumentParser) -> None:
    """Run a command that a package has installed for this Python; exit with its code."""
    for command in importlib.metadata.entry_points(group="console_scripts", name=name):
        if not getattr(sys.flags, "safe_path", False):
            sys.path[0] = str(Path(shutil.which(name) or sys.executable).parent)
        sys.exit(command.load()())
    parser.error(f"there is no script {name}, and no package of this Python has such a command")
