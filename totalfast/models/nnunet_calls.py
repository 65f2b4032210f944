"""Call nnU-Net's functions without their printed messages.

nnU-Net prints for its own command line. Redirecting ``sys.stdout`` would swallow what other threads
print meanwhile, and ``warnings.catch_warnings`` is not safe in threads either. So the function is
called with a ``print`` and ``warnings`` of its own.
"""

from __future__ import annotations

import logging
import warnings
from types import FunctionType, MethodType, SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeAlias

    Untyped: TypeAlias = Any
    """nnU-Net's functions and their arguments, which have no types."""

logger = logging.getLogger(__name__)


def call_quietly(function: Callable[..., Any], *arguments: Untyped, **keywords: Untyped) -> Untyped:
    """Call a function or method of nnU-Net; what it prints becomes debug lines of the log.

    Parameters
    ----------
    function
        As for ``with_print``.
    arguments, keywords
        Its arguments.
    """
    return with_print(function, _log)(*arguments, **keywords)


def with_print(function: Callable[..., Any], say: Callable[..., None]) -> Callable[..., Any]:
    """Return a copy of a function or method that calls ``say`` instead of ``print``.

    This holds for the function itself, not for the functions that it calls. Functions that are not
    nnU-Net's are returned unchanged.

    Parameters
    ----------
    function
        A function or bound method.
    say
        Called with the arguments of ``print`` and of ``warnings.warn``.
    """
    plain = function.__func__ if isinstance(function, MethodType) else function
    if not isinstance(plain, FunctionType) or not _is_nnunets(plain):
        return function
    own = {"print": say, "warnings": SimpleNamespace(**vars(warnings) | {"warn": say})}
    changed = FunctionType(
        plain.__code__,
        plain.__globals__ | own,
        plain.__name__,
        plain.__defaults__,
        plain.__closure__,
    )
    changed.__kwdefaults__ = plain.__kwdefaults__
    return MethodType(changed, function.__self__) if isinstance(function, MethodType) else changed


def _is_nnunets(function: FunctionType) -> bool:
    return str(function.__globals__.get("__name__")).startswith("nnunetv2.")


def _log(*values: object, **_: object) -> None:
    text = " ".join(map(str, values)).strip()
    if text:
        logger.debug("nnU-Net: %s", text)
