"""Lets programs that call TotalSegmentator's Python API use totalfast.

``patch_totalsegmentator`` does so for the running process; ``python -m totalfast.patch script.py``
for a whole program.
"""

from __future__ import annotations

import argparse
import functools
import logging
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeAlias

from totalfast.errors import UnsupportedError
from totalfast.upstream import python_api

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Untyped: TypeAlias = Any
"""An argument or the result of upstream's function, which has no types."""

logger = logging.getLogger(__name__)

_installed: list[Callable[..., Any]] = []
"""The replacement while it is installed. ``_rebind`` skips it because it is inside a list."""


def patch_totalsegmentator() -> None:
    """Let every caller of ``totalsegmentator.python_api.totalsegmentator`` call totalfast.

    Replaces the function there and in all modules that have already imported it; modules that are
    imported later import the replacement. A call that totalfast does not support runs on
    TotalSegmentator, and each reason is logged once.

    Notes
    -----
    Only names in modules are replaced. References in classes, closures and containers remain, and
    processes that the program starts are not patched.
    """
    if _installed:
        return
    original = python_api().totalsegmentator
    replacement = _with_totalfast_first(original)
    _installed.append(replacement)
    _rebind(original, replacement)


def unpatch_totalsegmentator() -> None:
    """Undo ``patch_totalsegmentator``, also in modules that were imported after it."""
    if not _installed:
        return
    replacement: Any = _installed.pop()
    _rebind(replacement, replacement.__wrapped__)


def _with_totalfast_first(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that tries totalfast first, with the name and signature of the original."""
    logged_reasons: set[str] = set()

    @functools.wraps(original)
    def totalsegmentator(*arguments: Untyped, **keywords: Untyped) -> Untyped:
        from totalfast.api import segment

        try:
            return segment(*arguments, **keywords)
        except UnsupportedError as error:
            reason = str(error)
        if reason not in logged_reasons:
            logged_reasons.add(reason)
            logger.warning("TotalSegmentator runs instead of totalfast: %s", reason)
        return original(*arguments, **keywords)

    return totalsegmentator


def _rebind(old: object, new: object) -> None:
    """In every imported module, bind each name that refers to ``old`` to ``new``."""
    for module in list(sys.modules.values()):
        if not isinstance(module, ModuleType):
            continue
        # Plain attribute access would import modules that are loaded lazily.
        names = object.__getattribute__(module, "__dict__")
        for name, value in list(names.items()):
            if value is old:
                names[name] = new


def main(words: Sequence[str]) -> None:
    """Run a script or a module as Python does, after the patch.

    Parameters
    ----------
    words
        The command line without the program's name: ``-m module`` or a script, and its arguments.
    """
    parser = argparse.ArgumentParser(
        prog="python -m totalfast.patch",
        usage="%(prog)s [-h] (-m module | script.py) ...",
        description="Run a Python program; its calls of TotalSegmentator's Python API use "
        "totalfast.",
    )
    parser.add_argument(
        "-m", dest="module", nargs=argparse.REMAINDER, help="Module to run, and its arguments."
    )
    parser.add_argument(
        "script", nargs=argparse.REMAINDER, help="Script to run, and its arguments."
    )
    args = parser.parse_args(words)
    program: list[str] = args.module or args.script
    if not program:
        parser.error("give a script, or -m and a module")
    patch_totalsegmentator()
    sys.argv = program
    if args.module:
        runpy.run_module(program[0], run_name="__main__", alter_sys=True)
        return
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = str(Path(program[0]).resolve().parent)
    runpy.run_path(program[0], run_name="__main__")
