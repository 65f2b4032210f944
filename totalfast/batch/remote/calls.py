"""Calls of fsspec: repeated after errors that may pass, ended by silence, errors in plain words.

Which files are meant, and what they are for, is not known here.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import logging
import threading
import time
from typing import TYPE_CHECKING, Any, TypeVar

from totalfast.batch.remote.place import WEB, Remote
from totalfast.errors import InputError, OptionError, OutputError, TotalfastError
from totalfast.system.disk import is_disk_full

if TYPE_CHECKING:
    from collections.abc import Callable

    Check = Callable[[], object]
    """Called often; may raise to end what is going on."""

Value = TypeVar("Value")

logger = logging.getLogger(__name__)

WAITS_S = (1.0, 4.0, 16.0)
"""Pauses before further tries. The libraries of some protocols try again by themselves, too."""

STALL_S = 60.0
"""A call without any progress for this time is ended."""

CONNECT_S = 15.0
POLL_S = 0.2

NOT_FOUND, REFUSED, PASSING = (404, 410), (401, 403), (408, 425, 429)
"""HTTP status of files that do not exist, of refused access, and of errors that may pass."""

CLIENT_ERRORS = range(400, 500)

NO_BUCKET = "there is no such bucket or folder"

ONE_AT_A_TIME = threading.Lock()
"""For protocols whose libraries may not work in several threads."""

BUCKETS = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl")
"""Protocols without folders: keys with slashes, which are listed all at once. One connection serves
all buckets."""


class TransferError(TotalfastError):
    """A file elsewhere can't be read now; another attempt may succeed."""


def no_check() -> None:
    """End nothing."""


def file_system(remote: Remote) -> Any:  # noqa: ANN401 - fsspec has no types
    """Return fsspec's file system for an address; the same one in all threads.

    Raises
    ------
    OptionError
        If the protocol is not known, or its package is missing.
    """
    shared = remote.scheme in (*WEB, *BUCKETS)
    host = "" if shared else remote.url.partition("://")[2].partition("/")[0]
    return _file_system(remote.scheme, host)


@functools.lru_cache(maxsize=64)
def _file_system(scheme: str, host: str) -> Any:  # noqa: ANN401
    import fsspec
    from fsspec.config import conf

    options: dict[str, Any] = {}
    try:
        kind = fsspec.get_filesystem_class(scheme)
        if scheme in WEB:
            options["client_kwargs"] = _web_settings() | conf.get(scheme, {}).get(
                "client_kwargs", {}
            )
        elif scheme in ("s3", "s3a"):
            options["max_concurrency"] = 1  # parts of 50 MB are in memory
        options |= kind._get_kwargs_from_urls(f"{scheme}://{host}/") if host else {}
        return kind(skip_instance_cache=True, use_listings_cache=False, **options)
    except ImportError as error:
        has_extra = scheme in (*WEB, "s3", "s3a")
        advice = "pip install 'totalfast[remote]'" if has_extra else str(error).rstrip(".")
        raise OptionError(f"{scheme}:// needs a package that is missing: {advice}.") from error
    except ValueError as error:
        raise OptionError(f"{scheme}:// is not known to fsspec: {error}.") from error
    except Exception as error:  # noqa: BLE001 - some protocols connect here
        place = Remote(f"{scheme}://{host}")
        shown = None if place.has_secrets else error
        raise TransferError(f"{place} can't be reached: {_reason(error)}.") from shown


def _web_settings() -> dict[str, Any]:
    """No limit of the whole time, which depends on the size; proxies as in the environment."""
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=STALL_S)
    return {"timeout": timeout, "trust_env": True}


def path_in(files: Any, remote: Remote) -> str:  # noqa: ANN401
    """Return the name that a file system has for an address."""
    return str(files._strip_protocol(remote.url))


def call(
    remote: Remote,
    method: str,
    *arguments: object,
    limit_s: float | None = STALL_S,
    progress: Callable[[], object] = no_check,
    check: Check = no_check,
    **keywords: object,
) -> Any:  # noqa: ANN401
    """Call a method of an address's file system once.

    Parameters
    ----------
    remote
        Which file system.
    method, arguments, keywords
        Name of the method without underscore, and what it is called with.
    limit_s
        The call ends with ``TimeoutError`` after this time without progress; None for no limit.
    progress
        A value that changes as long as data flows.
    check
        Called often in this thread.
    """
    files = file_system(remote)
    if not files.async_impl:
        with ONE_AT_A_TIME:
            return getattr(files, method)(*arguments, **keywords)
    future = asyncio.run_coroutine_threadsafe(
        getattr(files, f"_{method}")(*arguments, **keywords), files.loop
    )
    try:
        last, since_s = progress(), time.monotonic()
        while not concurrent.futures.wait([future], POLL_S).done:
            check()
            now = progress()
            if now != last:
                last, since_s = now, time.monotonic()
            elif limit_s is not None and time.monotonic() - since_s > limit_s:
                raise TimeoutError(f"no progress for {limit_s:.0f} s")
        return future.result()
    finally:
        future.cancel()


def repeated(
    remote: Remote,
    action: Callable[[], Value],
    *,
    writes: bool = False,
    check: Check = no_check,
) -> Value:
    """Do something with a file; after an error that may pass, do it again.

    Raises
    ------
    InputError
        If the file can't be read.
    TransferError
        If it can't be read now.
    OutputError
        If ``writes``, and the file can't be written.
    OSError
        If the disk of this machine is full.
    """
    for wait_s in (*WAITS_S, None):
        try:
            return action()
        except TotalfastError:
            raise
        except Exception as error:  # noqa: BLE001 - each protocol has errors of its own
            if is_disk_full(error):
                raise
            cause = _cause(error, remote)
            passes = _may_pass(cause)
            if not passes or wait_s is None:
                shown = None if remote.has_secrets else error  # its text may have the address
                raise _final(remote, cause, writes=writes, passes=passes) from shown
            logger.debug("%s: %s; again in %.0f s", remote, type(cause).__name__, wait_s)
        _sleep(wait_s, check)
    raise AssertionError("the last try returns or raises")


def _sleep(seconds: float, check: Check) -> None:
    until_s = time.monotonic() + seconds
    while (left_s := until_s - time.monotonic()) > 0:
        check()
        time.sleep(min(left_s, POLL_S))


def _final(remote: Remote, cause: BaseException, *, writes: bool, passes: bool) -> TotalfastError:
    if writes:
        reason = NO_BUCKET if isinstance(cause, FileNotFoundError) else _reason(cause)
        return OutputError(f"can't write {remote}: {reason}.")
    if passes:
        return TransferError(f"{remote} can't be read now: {_reason(cause)}.")
    return InputError(f"{remote} can't be read: {_reason(cause)}.")


def _cause(error: BaseException, remote: Remote) -> BaseException:
    """Return the error of the server; for web addresses fsspec turns all into one kind."""
    if remote.scheme in WEB and isinstance(error, FileNotFoundError) and error.__cause__:
        return error.__cause__
    return error


def _status(error: BaseException) -> int | None:
    status = getattr(error, "status", None)
    return status if isinstance(status, int) else None


def _may_pass(error: BaseException) -> bool:
    final = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
    if isinstance(error, (*final, NotImplementedError, ValueError, TypeError)):
        return False
    if "Credentials" in type(error).__name__:
        return False
    status = _status(error)
    return status not in CLIENT_ERRORS or status in PASSING


def _reason(error: BaseException) -> str:
    """Describe an error without its own text, which may hold an address with a signature."""
    status = _status(error)
    if isinstance(error, FileNotFoundError) or status in NOT_FOUND:
        return "it does not exist"
    if (
        isinstance(error, PermissionError)
        or status in REFUSED
        or "Credentials" in type(error).__name__
    ):
        return "access is refused; check the credentials in the environment"
    if status is not None:
        return f"the server answers with status {status}"
    if "Connect" in type(error).__name__:
        return "there is no connection to the server"
    if isinstance(error, TimeoutError):
        return "there was no progress for too long"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return type(error).__name__
