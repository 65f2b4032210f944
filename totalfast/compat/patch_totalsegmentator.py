"""Lets programs that call TotalSegmentator's Python API use totalfast."""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, Any, TypeAlias

from totalfast.compat.rebinding import rebind
from totalfast.errors import UnsupportedError
from totalfast.upstream import python_api

if TYPE_CHECKING:
    from collections.abc import Callable

Untyped: TypeAlias = Any
"""An argument or the result of upstream's function, which has no types."""

logger = logging.getLogger(__name__)

_installed: list[Callable[..., Any]] = []
"""The replacement while it is installed. ``rebind`` skips it because it is inside a list."""


def patch_totalsegmentator() -> None:
    """Let every caller of ``totalsegmentator.python_api.totalsegmentator`` call totalfast.

    Replaces the function there and in all modules that have already imported it; modules that are
    imported later import the replacement. A call that totalfast does not support runs on
    TotalSegmentator, and each reason is logged once.

    Notes
    -----
    Only names in modules are replaced. References in classes, closures and containers remain, and
    processes that the program starts are not patched; ``python -m totalfast.patch`` does that.
    """
    if _installed:
        return
    original = python_api().totalsegmentator
    replacement = _with_totalfast_first(original)
    _installed.append(replacement)
    rebind(original, replacement)


def unpatch_totalsegmentator() -> None:
    """Undo ``patch_totalsegmentator``, also in modules that were imported after it."""
    if not _installed:
        return
    replacement: Any = _installed.pop()
    rebind(replacement, replacement.__wrapped__)


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
