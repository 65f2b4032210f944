"""The decorator of loops that numba compiles, and where their compiled code is kept.

It is kept in the installation if this user can write there, else in totalfast's cache folder. If
that can't be used either, each process compiles anew. A cache that can't be read or written never
ends a run. ``NUMBA_CACHE_DIR`` has precedence, as everywhere in numba.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numba
from numba.core.caching import CompileResultCacheImpl, FunctionCache

from totalfast.system.cache_folder import FOLDER_VARIABLE, subfolder

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger(__name__)

FOLDER = "compiled-loops"
"""Name of the folder in the cache."""

SECONDS = 20
"""About how long it takes to compile the loops of one run, on one core."""

_NumbasVariable: Any
_Installation: Any
_NumbasVariable, _Installation = CompileResultCacheImpl._locator_classes[:2]
"""numba's first two places. Its third, the user's cache, is not used: nobody checks its owner, and
without a home folder it is a folder named "~" in the current one."""

DAMAGED = (
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    OSError,
    pickle.UnpicklingError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""Errors of pickle and of numba when a file is damaged or can't be read."""


class _CacheFolder(_NumbasVariable):  # type: ignore[misc] # numba has no types
    """The place in totalfast's cache."""

    @classmethod
    def from_function(cls, function: Callable[..., Any], file: str) -> _CacheFolder | None:
        cache = subfolder(FOLDER)
        if cache is None:
            return None
        locator = cls(function, file)
        locator._cache_path = str(cache / cls.get_suitable_cache_subpath(file))
        try:
            locator.ensure_cache_path()
        except OSError:
            return None
        return locator


class _Places(CompileResultCacheImpl):  # type: ignore[misc]
    """The places in the order in which they are tried."""

    _locator_classes = (_NumbasVariable, _Installation, _CacheFolder)


class _LenientCache(FunctionCache):  # type: ignore[misc]
    """A cache whose damaged files, and full or write-protected disks, cost only time."""

    _impl_class = _Places

    def _index_key(self, sig: object, codegen: object) -> tuple[object, ...]:
        return (*super()._index_key(sig, codegen), _state_of_the_package())

    def load_overload(self, sig: object, target_context: object) -> object:
        try:
            return super().load_overload(sig, target_context)
        except DAMAGED as error:
            logger.debug("compiled loops in %s can't be read: %s", self.cache_path, error)
            with contextlib.suppress(OSError):
                self.flush()
            return None

    def save_overload(self, sig: object, data: object) -> None:
        try:
            super().save_overload(sig, data)
        except OSError as error:
            _warn(f"{self.cache_path}: {error.strerror}")


@functools.cache
def _state_of_the_package() -> str:
    """Sizes and times of all files of the package.

    Loops contain the code and the constants of other modules; numba only looks at the file of the
    loop itself, and would run old code after a change of another one.
    """
    package = Path(__file__).parents[1]
    files = ((path, path.stat()) for path in sorted(package.rglob("*.py")))
    states = [f"{path} {state.st_size} {state.st_mtime_ns}" for path, state in files]
    return hashlib.sha256("\n".join(states).encode()).hexdigest()


def jit(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:  # noqa: ANN401
    """Compile a function at its first call; threads that run it do not wait for each other.

    Parameters
    ----------
    function
        The function, in the part of Python that numba compiles.
    options
        Further options of ``numba.njit``.
    """
    if numba.config.DISABLE_JIT:
        return function
    compiled: Any = numba.njit(nogil=True, error_model="numpy", **options)(function)
    try:
        compiled._cache = _LenientCache(function)
    except RuntimeError:  # numba has found no place
        _warn("there is no folder that this user can write to")
    kept: Callable[..., Any] = compiled
    return kept


@functools.cache
def _warn(reason: str) -> None:
    """Log, once per process and reason, that compiled loops are not kept."""
    logger.warning(
        "Compiled loops can't be kept (%s), so each run compiles them anew, which takes up to "
        "%d seconds. %s sets a folder for them.",
        reason,
        SECONDS,
        FOLDER_VARIABLE,
    )
