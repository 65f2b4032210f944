"""Programs that call TotalSegmentator's Python API in their own process, run on totalfast.

Knows the names that modules have for upstream's function; knows nothing of what it does.
``python -m totalfast.patch script.py`` runs a whole program that way.
"""

from __future__ import annotations

import argparse
import functools
import logging
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from totalfast.errors import UnsupportedError
from totalfast.upstream import python_api

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

logger = logging.getLogger(__name__)

_installed: list[Callable[..., Any]] = []
"""The replacement, while it is in place; in a list, where ``_exchange`` does not look for it."""


def patch_totalsegmentator() -> None:
    """Let every caller of ``totalsegmentator.python_api.totalsegmentator`` call totalfast.

    Replaces the function there and wherever a module that is already imported has a name for it;
    modules that are imported later find the replacement. What totalfast does not support is handed
    on to TotalSegmentator, and the reason is logged, once.

    Notes
    -----
    Names in modules are replaced; a function that sits in a class, a closure or a container stays.
    Processes that the program starts are not patched.
    """
    if _installed:
        return
    original = python_api().totalsegmentator
    replacement = _on_totalfast(original)
    _installed.append(replacement)
    _exchange(original, replacement)


def unpatch_totalsegmentator() -> None:
    """Undo ``patch_totalsegmentator``, also in modules that were imported since."""
    if not _installed:
        return
    replacement: Any = _installed.pop()
    _exchange(replacement, replacement.__wrapped__)


def _on_totalfast(original: Callable[..., Any]) -> Callable[..., Any]:
    """Make the function that tries totalfast first; its name and signature are the original's."""
    told: set[str] = set()

    @functools.wraps(original)
    def totalsegmentator(*arguments: Any, **keywords: Any) -> Any:  # noqa: ANN401
        from totalfast.api import segment

        try:
            return segment(*arguments, **keywords)
        except UnsupportedError as error:
            reason = str(error)
        if reason not in told:
            told.add(reason)
            logger.warning("TotalSegmentator runs instead of totalfast: %s", reason)
        return original(*arguments, **keywords)

    return totalsegmentator


def _exchange(old: object, new: object) -> None:
    """Let every name in every module that means ``old`` mean ``new``."""
    for module in list(sys.modules.values()):
        if not isinstance(module, ModuleType):
            continue
        # Asked for like this, a module that is imported lazily is not imported now.
        names = object.__getattribute__(module, "__dict__")
        for name, value in list(names.items()):
            if value is old:
                names[name] = new


def main(words: Sequence[str]) -> None:
    """Run a script or a module as Python would, patched; its exit code is the process's."""
    parser = argparse.ArgumentParser(
        prog="python -m totalfast.patch",
        usage="%(prog)s [-h] (-m module | script.py) ...",
        description="Run a program that calls TotalSegmentator's Python API on totalfast.",
    )
    parser.add_argument("-m", dest="module", nargs=argparse.REMAINDER, help="module, its arguments")
    parser.add_argument("script", nargs=argparse.REMAINDER, help="script, its arguments")
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
