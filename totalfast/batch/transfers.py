"""A case whose input or results are elsewhere: download the scan, upload the results."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from totalfast.batch.finding.remote_search import scan_at
from totalfast.batch.remote.files import download, files_below, for_each, remove, upload, write
from totalfast.batch.remote.place import Remote
from totalfast.batch.work_folders import work_folder
from totalfast.errors import InputError, OutputError, TotalfastError
from totalfast.system.rescue import new_rescue_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

    from totalfast.batch.remote.calls import Check
    from totalfast.batch.remote.files import RemoteFile
    from totalfast.batch.remote.place import Place

logger = logging.getLogger(__name__)

STAMP = "batch"
"""Field of a completion marker elsewhere: the entry of the case, so that a batch that was killed
before it noted the case knows that it is done."""


@contextlib.contextmanager
def on_this_disk(source: Place, check: Check) -> Iterator[Path]:
    """Give the path of a scan; one that is elsewhere is downloaded, and removed at the end.

    Errors of the context name the scan by its address.

    Raises
    ------
    InputError
        If it does not exist or can't be read.
    TransferError
        If it can't be read now.
    """
    if isinstance(source, Path):
        yield source
        return
    scan = scan_at(source)
    with work_folder() as folder:
        name = _local_name(source.name)
        is_folder = source not in [file.remote for file in scan.files]
        place = folder / name if is_folder else folder
        place.mkdir(exist_ok=True)
        for_each(
            functools.partial(download, file, place / _local_name(file.remote.name), check)
            for file in scan.files
        )
        with named_elsewhere({folder / name: source}):
            yield folder / name


def _local_name(name: str) -> str:
    safe = "".join("_" if letter in '/\\:*?"<>|' else letter for letter in name)
    if safe in ("", ".", ".."):
        raise InputError(f"{name!r} is no name of a file.")
    return safe


@contextlib.contextmanager
def named_elsewhere(places: Mapping[Path, Place]) -> Iterator[None]:
    """In the messages of errors, replace paths of temporary files by what they are copies of."""
    try:
        yield
    except TotalfastError as error:
        text = str(error)
        for path, place in places.items():
            text = text.replace(str(path), str(place))
        error.args = (text,)
        raise


def publish(
    results: Path,
    target: Remote,
    *,
    markers: Collection[Path],
    stamp: Callable[[tuple[str, ...]], Mapping[str, Any]],
    check: Check,
) -> tuple[str, ...]:
    """Upload the results of a case; its completion markers come last.

    Parameters
    ----------
    results
        Folder of the results.
    target
        Where they go. Markers of older results are removed first.
    markers
        Paths of the completion markers in ``results``.
    stamp
        What is added to the markers, given the names of all files.
    check
        Called often; may raise to end this.

    Returns
    -------
        Names of the files, relative to ``results``, with "/" between the parts.

    Raises
    ------
    OutputError
        If a file can't be uploaded.
    """
    files = {
        path.relative_to(results).as_posix(): path
        for path in sorted(results.rglob("*"))
        if path.is_file()
    }
    last = {marker.relative_to(results).as_posix() for marker in markers}
    with _as_output_error(target):
        older = _sizes(target)
    for name in sorted(last & older.keys()):
        remove(target / name)
    for_each(
        functools.partial(upload, path, target / name, check)
        for name, path in files.items()
        if name not in last
    )
    with _as_output_error(target):
        sizes = _sizes(target)
    for name in files.keys() - last:
        if sizes.get(name) not in (None, files[name].stat().st_size):
            raise OutputError(f"{target / name} has another size than what was uploaded.")
        if name not in sizes:
            raise OutputError(f"{target / name} is missing after it was uploaded.")
    names = tuple(files)
    for name in sorted(last):
        content = json.loads(files[name].read_bytes())
        stamped = {**content, STAMP: stamp(names)}
        write(target / name, json.dumps(stamped, indent=2).encode())
    return names


def _sizes(folder: Remote) -> dict[str, int | None]:
    """Sizes of all files below a folder, by their names relative to it."""
    return {name_in(folder, file): file.size for file in files_below(folder)}


def name_in(folder: Remote, file: RemoteFile) -> str:
    """Return the name of a file relative to a folder above it, with "/" between the parts."""
    return file.remote.url[len(folder.url.rstrip("/")) + 1 :]


@contextlib.contextmanager
def _as_output_error(target: Remote) -> Iterator[None]:
    """Turn an error of reading into one of writing: the case's results are what is at stake."""
    try:
        yield
    except OutputError:
        raise
    except TotalfastError as error:
        raise OutputError(f"can't write {target}: {error}") from error


def unmark(target: Remote, names: Collection[str]) -> None:
    """Remove completion markers of older results, as far as that is possible now."""
    with contextlib.suppress(TotalfastError):
        older = _sizes(target)
        for name in names:
            if name in older:
                logger.warning("WARNING: %s keeps older results.", target)
                remove(target / name)


def rescue(results: Path) -> Path:
    """Move results that can't be uploaded to a folder that stays.

    Raises
    ------
    OSError
        If there is no room for them.
    """
    folder = new_rescue_folder()
    shutil.copytree(results, folder / results.name)
    return folder / results.name


@contextlib.contextmanager
def local_copy(place: Place) -> Iterator[Path]:
    """Give a path for a file that is then written; one that belongs elsewhere is uploaded.

    Raises
    ------
    OutputError
        If it can't be uploaded.
    """
    if isinstance(place, Path):
        yield place
        return
    with work_folder() as folder:
        path = folder / _local_name(place.name)
        yield path
        if path.exists():
            upload(path, place)
