"""Search folders and patterns for files, without hidden files and results of totalfast.

Files are sorted out by their names alone; what they hold is not looked at.
"""

from __future__ import annotations

import functools
import glob
import os
from pathlib import Path
from typing import TYPE_CHECKING

from totalfast.batch.finding.images import is_slicer_segmentation, stem_of
from totalfast.batch.remote.files import read
from totalfast.batch.remote.place import Remote
from totalfast.errors import InputError
from totalfast.files.itk import ENDINGS as ITK_ENDINGS
from totalfast.files.read import NIFTI_ENDINGS
from totalfast.files.targets import FILE_MARKER_ENDING, FOLDER_MARKER

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from totalfast.batch.finding.left_out import Counted
    from totalfast.batch.remote.place import Place

MAC_ARCHIVE = "__MACOSX"
"""Folder that macOS adds to zip files."""

MANIFEST_START = b'{"manifest":'
"""First bytes of a batch's manifest."""

FEWEST_MASKS = 3
"""Images of one folder that are all named like classes of TotalSegmentator are taken for masks."""

HIDDEN, RESULTS = "hidden", "result of totalfast"
MASKS = "folder of masks, named like TotalSegmentator's classes"
UNREADABLE_FOLDER = "folder that can't be read"


def files_below(folder: Path, left_out: Counted, *, skip: Path | None = None) -> Iterator[Path]:
    """All files below a folder that can be a part of a case, in the order of their paths.

    Linked folders are searched, each folder once.

    Parameters
    ----------
    folder
        Searched with its subfolders.
    left_out
        Counts what is left out.
    skip
        A folder, such as that of the results, that is not searched.

    Raises
    ------
    InputError
        If the folder itself can't be read.
    """

    def refused(error: OSError) -> None:
        if Path(error.filename) == folder:
            raise InputError(f"{folder} can't be searched: {error.strerror}.") from error
        left_out.add(UNREADABLE_FOLDER, Path(error.filename))

    skipped = None if skip is None else os.path.realpath(skip)
    seen = set()
    for place, folders, names in os.walk(folder, followlinks=True, onerror=refused):
        real, here = os.path.realpath(place), Path(place)
        if real in seen or real == skipped:
            folders.clear()
            continue
        seen.add(real)
        kept = kept_names(here, names, left_out)
        if kept is None:
            folders.clear()
            continue
        for name in [each for each in folders if is_hidden(each)]:
            folders.remove(name)
            left_out.add(HIDDEN, here / name)
        folders.sort()
        yield from (here / name for name in kept)


def kept_names(folder: Place, names: Collection[str], left_out: Counted) -> list[str] | None:
    """Sort out the files of one folder; None if the folder and its subfolders hold results."""
    if _holds_results(folder, names):
        left_out.add(RESULTS, folder)
        return None
    kept = []
    for name in sorted(names):
        if is_hidden(name):
            left_out.add(HIDDEN, folder / name)
        elif name.endswith(FILE_MARKER_ENDING) or name + FILE_MARKER_ENDING in names:
            left_out.add(RESULTS, folder / name)
        elif is_slicer_segmentation(Path(name)):
            left_out.add("segmentation of 3D Slicer", folder / name)
        else:
            kept.append(name)
    images = [name for name in kept if name.lower().endswith((*NIFTI_ENDINGS, *ITK_ENDINGS))]
    if len(images) >= FEWEST_MASKS and all(stem_of(name) in _class_names() for name in images):
        left_out.add(MASKS, folder)
        kept = [name for name in kept if name not in images]
    return kept


def matches_of(pattern: str, left_out: Counted, *, skip: Path | None = None) -> list[Path]:
    """Files and folders that match a pattern, without those in another one of the folders.

    Parameters
    ----------
    pattern
        ``*``, ``?``, ``[...]``, and ``**`` for any number of folders.
    left_out, skip
        As in ``files_below``.
    """
    found = sorted(map(Path, glob.glob(os.path.expanduser(pattern), recursive=True)))  # noqa: PTH111, PTH207 - pathlib's differs
    folders = {path for path in found if path.is_dir()}
    skipped = None if skip is None else Path(os.path.realpath(skip))
    listing = _Listing(left_out)
    outermost = []
    for path in found:
        real = Path(os.path.realpath(path))
        inside = skipped is not None and skipped in (real, *real.parents)
        if inside or any(parent in folders for parent in path.parents):
            continue
        if path in folders or not listing.is_below_results(path.parent) and listing.has(path):
            outermost.append(path)
    return outermost


class _Listing:
    """What is kept of folders of which only some files match a pattern."""

    def __init__(self, left_out: Counted) -> None:
        self._left_out = left_out
        self._kept: dict[Path, Collection[str]] = {}
        self._results: dict[Path, bool] = {}

    def has(self, path: Path) -> bool:
        """Whether a file is kept, beside the other files of its folder."""
        folder = path.parent
        if folder not in self._kept:
            self._kept[folder] = kept_names(folder, _names_in(folder), self._left_out) or ()
        return path.name in self._kept[folder]

    def is_below_results(self, folder: Path) -> bool:
        """Whether a folder above this one, as far as the path names it, holds results."""
        return any(self._has_results(parent) for parent in folder.parents)

    def _has_results(self, folder: Path) -> bool:
        if folder not in self._results:
            self._results[folder] = _holds_results(folder, _names_in(folder))
            if self._results[folder]:
                self._left_out.add(RESULTS, folder)
        return self._results[folder]


def _names_in(folder: Path) -> list[str]:
    """Names in a folder; none if it can't be read."""
    try:
        return [path.name for path in folder.iterdir()]
    except OSError:
        return []


def _holds_results(folder: Place, names: Collection[str]) -> bool:
    return FOLDER_MARKER in names or any(_is_manifest(folder / name) for name in names)


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden, or is macOS's own."""
    return name.startswith(".") or name == MAC_ARCHIVE


def _is_manifest(path: Place) -> bool:
    if not path.name.startswith("manifest") or path.suffix != ".jsonl":
        return False
    if isinstance(path, Remote):
        return read(path, len(MANIFEST_START)) == MANIFEST_START
    try:
        with path.open("rb") as file:
            return file.read(len(MANIFEST_START)) == MANIFEST_START
    except OSError:
        return False


@functools.cache
def _class_names() -> frozenset[str]:
    from totalfast.upstream import CLASS_MAPS

    return frozenset(name for classes in CLASS_MAPS.values() for name in classes.values())
