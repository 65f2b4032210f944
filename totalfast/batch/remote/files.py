"""Look at, list, read, download, write and remove files elsewhere."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from totalfast.batch.remote.calls import (
    BUCKETS,
    STALL_S,
    call,
    file_system,
    no_check,
    path_in,
    repeated,
)
from totalfast.batch.remote.place import Remote

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

    from totalfast.batch.remote.calls import Check

VERSIONS = (
    "ETag",
    "etag",
    "md5Hash",
    "content_md5",
    "Content-MD5",
    "Digest",
    "checksum",
    "crc32c",
    "generation",
    "Last-Modified",
    "LastModified",
    "last_modified",
    "updated",
    "mtime",
    "modified",
    "created",
)
"""Facts of fsspec that change with a file's content; the best ones first."""

SLOWEST_UPLOAD = 100_000
"""Bytes per second; an upload shows no progress, so it may take this long and the stall time."""

AT_A_TIME = 8
"""Small requests that wait for the server at the same time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteFile:
    """What is known of a file or folder.

    Parameters
    ----------
    remote
        Its address.
    size
        In bytes; None if it is not known.
    version
        Changes with its content; empty if nothing is known.
    is_folder
        Whether it is a folder or a prefix.
    """

    remote: Remote
    size: int | None
    version: str
    is_folder: bool = False

    @classmethod
    def of(cls, remote: Remote, info: Mapping[str, Any]) -> RemoteFile:
        """Take what fsspec knows."""
        facts = (info.get(name) for name in VERSIONS)
        size = info.get("size")
        return cls(
            remote=remote,
            size=None if size is None else int(size),
            version=str(next((fact for fact in facts if fact), "")).strip('"'),
            is_folder=info.get("type") == "directory",
        )


def look_at(remote: Remote) -> RemoteFile:
    """Return what is known of a file or folder.

    Raises
    ------
    InputError
        If it does not exist or can't be read.
    TransferError
        If it can't be read now.
    """
    path = path_in(file_system(remote), remote)
    info = repeated(remote, lambda: call(remote, "info", path))
    return RemoteFile.of(remote, info)


def exists(remote: Remote) -> bool:
    """Whether a file exists; errors are those of ``look_at``."""
    path = path_in(file_system(remote), remote)

    def look() -> bool:
        try:
            call(remote, "info", path)
        except FileNotFoundError:
            return False
        return True

    return repeated(remote, look)


def files_in(folder: Remote) -> list[RemoteFile]:
    """List files and folders directly in a folder; none if it does not exist."""
    path = path_in(file_system(folder), folder)

    def look() -> list[RemoteFile]:
        try:
            return _children(folder, path, call(folder, "ls", path, detail=True, limit_s=None))
        except FileNotFoundError:
            return []

    return repeated(folder, look)


def files_below(folder: Remote) -> Iterator[RemoteFile]:
    """List all files below a folder."""
    if folder.scheme in BUCKETS:
        path = path_in(file_system(folder), folder)
        found = repeated(folder, lambda: call(folder, "find", path, detail=True, limit_s=None))
        yield from (each for each in _children(folder, path, found.values()) if not each.is_folder)
        return
    for each in files_in(folder):
        if each.is_folder:
            yield from files_below(each.remote)
        else:
            yield each


def _children(folder: Remote, path: str, infos: Iterable[Mapping[str, Any]]) -> list[RemoteFile]:
    """Give the files of a list their addresses.

    Left out are links that sort a web page's list, and empty objects that stand for folders.
    """
    start = path.rstrip("/")
    children = []
    for info in infos:
        name = str(info["name"])[len(start) :].strip("/")
        is_folder = info.get("type") == "directory"
        stands_for_folder = not is_folder and str(info.get("Key", info["name"])).endswith("/")
        if name and not name.startswith("?") and not stands_for_folder:
            children.append(RemoteFile.of(folder / name, info))
    return sorted(children, key=lambda each: each.remote.url)


def read(remote: Remote, end: int | None = None) -> bytes:
    """Read a small file, or its first bytes."""
    path = path_in(file_system(remote), remote)

    def try_it() -> bytes:
        if end is None:
            return bytes(call(remote, "cat_file", path))
        return bytes(call(remote, "cat_file", path, start=0, end=end))[:end]

    return repeated(remote, try_it)


def write(remote: Remote, data: bytes) -> None:
    """Write a small file, which appears whole if the protocol is that of an object store.

    Raises
    ------
    OutputError
        If it can't be written.
    """
    path = path_in(file_system(remote), remote)
    _make_folder(remote)
    limit_s = STALL_S + len(data) / SLOWEST_UPLOAD
    repeated(remote, lambda: call(remote, "pipe_file", path, data, limit_s=limit_s), writes=True)


def remove(remote: Remote) -> None:
    """Remove a file, if it exists.

    Raises
    ------
    OutputError
        If it can't be removed.
    """
    path = path_in(file_system(remote), remote)

    def try_it() -> None:
        try:
            call(remote, "rm_file", path)
        except FileNotFoundError:
            return

    repeated(remote, try_it, writes=True)


def download(file: RemoteFile, target: Path, check: Check = no_check) -> None:
    """Download a file, and compare its size.

    Raises
    ------
    InputError
        If it does not exist or can't be read.
    TransferError
        If the connection breaks off each time.
    """
    from fsspec.callbacks import Callback

    remote = file.remote
    path = path_in(file_system(remote), remote)

    def try_it() -> None:
        shown = Callback()
        call(
            remote,
            "get_file",
            path,
            str(target),
            callback=shown,
            progress=lambda: (shown.value, _size(target)),
            check=check,
        )
        if file.size is not None and _size(target) != file.size:
            raise ConnectionError(None, f"{_size(target)} of {file.size} bytes arrived")

    repeated(remote, try_it, check=check)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def upload(source: Path, remote: Remote, check: Check = no_check) -> None:
    """Upload a file.

    Raises
    ------
    OutputError
        If it can't be written.
    """
    path = path_in(file_system(remote), remote)
    limit_s = STALL_S + _size(source) / SLOWEST_UPLOAD
    _make_folder(remote)

    def try_it() -> None:
        call(remote, "put_file", str(source), path, limit_s=limit_s, check=check)

    repeated(remote, try_it, writes=True, check=check)


def _make_folder(remote: Remote) -> None:
    """Create the folder of a file, if the protocol has folders."""
    if remote.scheme in BUCKETS:
        return
    path = path_in(file_system(remote), remote.parent)
    repeated(remote, lambda: call(remote, "makedirs", path, exist_ok=True), writes=True)


def for_each(actions: Iterable[Callable[[], object]]) -> None:
    """Do things in a few threads; after an error the rest is left."""
    with ThreadPoolExecutor(AT_A_TIME, thread_name_prefix="totalfast-transfer") as pool:
        futures = [pool.submit(action) for action in actions]
        try:
            for future in futures:
                future.result()
        finally:
            for future in futures:
                future.cancel()
