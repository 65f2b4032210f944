"""DICOM series among many files: one pass over the headers, a source for each series.

The source of a series is the smallest folder that holds all of its files, so that reading it does
not read the headers of the whole tree. Several series can lie in one folder; then the files of each
are listed, and the UID selects one.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import logging
import os
import stat
from collections import Counter, defaultdict, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from totalfast.batch.finding.fingerprints import fingerprint_of, mark_of
from totalfast.batch.finding.search import HIDDEN, MAC_ARCHIVE
from totalfast.errors import InputError
from totalfast.files.dicom.find import DicomFile, open_source, values_unchecked
from totalfast.files.dicom.series import FEWEST_SLICES
from totalfast.files.dicom.survey import Glance, Survey, glance

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from totalfast.batch.finding.left_out import Counted
    from totalfast.files.dicom.survey import SeriesHeader

logger = logging.getLogger(__name__)

THREADS = 8
"""Threads that read headers. A disk on the network answers several requests at a time; parsing
takes turns (GIL)."""

CHUNK = 128
"""Files that a thread reads in a row."""

MANY_HEADERS = 100_000
"""Headers that the cases of one folder read; more take minutes."""

SAME_PLACE_DIGITS = 2
"""Digits of positions in mm that are compared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundSeries:
    """A series that has enough slices for a volume.

    Parameters
    ----------
    source
        The smallest folder with all of its files, its only file, or its zip file.
    uid
        SeriesInstanceUID; None if the source is to be read as one series, because its files have
        no UID or each has another one.
    header
        What its slices have in common; that of the first slice, if ``uid`` is None.
    slices
        Number of different positions.
    fingerprint
        Of the files of the series, as they were found.
    files
        Names of its files in ``source``, a folder that has files of several series; None if all
        headers there are to be read.
    """

    source: Path
    uid: str | None
    header: SeriesHeader
    slices: int
    fingerprint: str
    files: tuple[str, ...] | None = None


@dataclass(slots=True, kw_only=True)
class _Part:
    """The slices of one series in one folder or zip file, while they are collected."""

    header: SeriesHeader
    place: Path
    first: Path
    files: int = 0
    images: int = 0
    marks: int = 0
    names: list[str] | None = None
    """Names of the files; None if they are not needed or not known."""
    positions: set[tuple[float, ...]] = field(default_factory=set)
    has_original: bool = False
    is_reformatted: bool = True

    def add(self, header: SeriesHeader, positions: Iterable[tuple[float, ...]], mark: int) -> None:
        self.files += 1
        self.marks += mark
        self.has_original |= header.is_original
        self.is_reformatted &= header.is_reformatted
        for position in positions:
            self.images += 1
            self.positions.add(tuple(round(mm, SAME_PLACE_DIGITS) for mm in position))

    def join(self, other: _Part) -> None:
        """Add the slices of the same series in another folder."""
        self.place = Path(os.path.commonpath((self.place, other.place)))
        self.names = None
        self.files += other.files
        self.images += other.images
        self.marks += other.marks
        self.positions |= other.positions
        self.has_original |= other.has_original
        self.is_reformatted &= other.is_reformatted


def find_series(
    groups: Iterable[tuple[Path, Sequence[Path]]],
    left_out: Counted,
    *,
    on_file: Callable[[Path], None] | None = None,
) -> list[FoundSeries]:
    """Find all series that can be volumes.

    Localizers, reports, segmentations and other files that are no slices are left out, series with
    too few slices, and reformatted series of a study that has an original one.

    Parameters
    ----------
    groups
        Folder that was searched, and its files: of DICOM, zip files of them, or of any other kind.
        A series can be spread over several folders below one that was searched.
    left_out
        Counts what is left out.
    on_file
        Called with the path of each file when its header was read, in this thread.
    """
    parts: list[_Part] = []
    with values_unchecked():
        for _, files in groups:
            plain = [file for file in files if not _is_zip(file)]
            survey = _Collection(left_out, on_file)
            survey.collect(plain)
            parts += _joined(survey.parts())
            for archive in filter(_is_zip, files):
                parts += _in_zip(archive, left_out, on_file)
    return _volumes(parts, left_out)


def _is_zip(path: Path) -> bool:
    return path.suffix.lower() == ".zip"


def _in_zip(
    archive: Path, left_out: Counted, on_file: Callable[[Path], None] | None
) -> list[_Part]:
    try:
        with open_source(archive) as members:
            inside = _Collection(left_out, on_file)
            inside.collect(members)
            return inside.parts()
    except InputError:
        left_out.add("zip file that can't be unpacked", archive)
        return []


class _Collection:
    """Sorts files into parts of series."""

    def __init__(self, left_out: Counted, on_file: Callable[[Path], None] | None) -> None:
        self._left_out = left_out
        self._on_file = on_file
        self._survey = Survey()
        self._parts: dict[tuple[Path, str], _Part] = {}
        self._here: list[_Part] = []
        """The parts of the last folder; files of one folder follow each other."""

    def parts(self) -> list[_Part]:
        return list(self._parts.values())

    def collect(self, files: Iterable[Path | DicomFile]) -> None:
        for path, file, seen, version in _glances(files):
            if isinstance(seen, str):
                self._left_out.add(seen, path)
            elif file is not None:
                self._sort(path, file, seen, version)
            if self._on_file is not None:
                self._on_file(path)
        self._leave()

    def _leave(self) -> None:
        """Forget the names of the files of a folder with one series."""
        if len(self._here) == 1:
            self._here[0].names = None
        self._here = []

    def _sort(self, path: Path, file: DicomFile, seen: Glance, version: int) -> None:
        contents = self._survey.sort(file, seen)
        if contents.series is None:
            self._left_out.add(contents.reason, path)
            return
        place = path.parent if file.member is None else file.path
        key = (place, contents.series.uid)
        part = self._parts.get(key)
        if part is None:
            first = path if file.member is None else file.path
            part = _Part(header=contents.series, place=place, first=first)
            self._parts[key] = part
            if file.member is None:
                self._enter(part)
        if part.names is not None:
            part.names.append(file.name)
        part.add(contents.series, contents.positions, mark_of(file.name, file.size, version))

    def _enter(self, part: _Part) -> None:
        if self._here and self._here[0].place != part.place:
            self._leave()
        part.names = []
        self._here.append(part)


_Seen = tuple[Path, "DicomFile | None", "Glance | str", int]
"""Path, file, its attributes or why it is left out, and a number that changes with its content: the
time of the last change, or the checksum of a member of a zip file."""


def _glances(files: Iterable[Path | DicomFile]) -> Iterator[_Seen]:
    """Read attributes of all files in several threads; results are in the order of the files."""
    chunks = _chunks(iter(files))
    waiting: deque[concurrent.futures.Future[list[_Seen]]] = deque()
    with contextlib.ExitStack() as stack:
        pool = concurrent.futures.ThreadPoolExecutor(THREADS, "totalfast headers")
        stack.callback(pool.shutdown, cancel_futures=True)
        for chunk in chunks:
            waiting.append(pool.submit(_look_at, chunk))
            if len(waiting) > 2 * THREADS:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()


def _chunks(files: Iterator[Path | DicomFile]) -> Iterator[list[Path | DicomFile]]:
    while chunk := list(itertools.islice(files, CHUNK)):
        yield chunk


def _look_at(files: Sequence[Path | DicomFile]) -> list[_Seen]:
    return [_look(file) for file in files]


def _look(file: Path | DicomFile) -> _Seen:
    if isinstance(file, DicomFile) and file.member is not None:
        path = file.path / file.member.filename
        if file.name.startswith(".") or MAC_ARCHIVE in path.parts:
            return path, None, HIDDEN, 0
        return path, file, glance(file), file.member.CRC
    path = file.path if isinstance(file, DicomFile) else file
    try:
        state = path.stat()
    except OSError:
        return path, None, "link to a missing file", 0
    if not stat.S_ISREG(state.st_mode):
        return path, None, "no regular file", 0
    opened = DicomFile(name=path.name, path=path, size=state.st_size)
    return path, opened, glance(opened), state.st_mtime_ns


def _joined(parts: Sequence[_Part]) -> list[_Part]:
    """Join the parts of series that are spread over several folders.

    Parts that have positions in common are copies, or different scans with one UID; each of them
    stays on its own.
    """
    by_uid: dict[tuple[str, str], list[_Part]] = defaultdict(list)
    for part in parts:
        by_uid[part.header.study, part.header.uid].append(part)
    joined = []
    for (_, uid), same in by_uid.items():
        together = set().union(*(part.positions for part in same))
        if uid and len(same) > 1 and len(together) == sum(len(part.positions) for part in same):
            first, *others = same
            for part in others:
                first.join(part)
            joined.append(first)
        else:
            joined.extend(same)
    return joined


def _volumes(parts: Sequence[_Part], left_out: Counted) -> list[FoundSeries]:
    """Leave out series that are no volumes of their own."""
    originals = {
        (part.header.study, part.header.modality)
        for part in parts
        if part.has_original and part.images >= FEWEST_SLICES and part.header.study
    }
    anonymous = _without_uids(parts)
    volumes = [_series(_source(group), None, group) for group in anonymous]
    in_groups = {id(part) for group in anonymous for part in group}
    for part in parts:
        if id(part) in in_groups:
            continue
        if part.images < FEWEST_SLICES:
            left_out.add(f"series with fewer than {FEWEST_SLICES} slices", part.first)
        elif part.is_reformatted and (part.header.study, part.header.modality) in originals:
            left_out.add("series that is computed from another one of its study", part.first)
        elif not part.header.uid:
            left_out.add("series without a SeriesInstanceUID, beside other series", part.first)
        else:
            volumes.append(_series(_source([part]), part.header.uid, [part]))
    _warn_of_shared_folders(volumes, parts)
    return sorted(volumes, key=lambda each: (str(each.source), each.uid or ""))


def _warn_of_shared_folders(volumes: Sequence[FoundSeries], parts: Sequence[_Part]) -> None:
    """Warn of folders with many series, because each case reads the headers of all of them."""
    below: Counter[Path] = Counter()
    for part in parts:
        for place in (part.place, *part.place.parents):
            below[place] += part.files
    unlisted = (each.source for each in volumes if each.files is None)
    for source, series in Counter(unlisted).items():
        if series > 1 and series * below[source] > MANY_HEADERS:
            logger.warning(
                "WARNING: %s holds %d series in %d files, and each case reads the headers of all "
                "of them. It is faster if each series has a folder of its own.",
                source,
                series,
                below[source],
            )


def _without_uids(parts: Sequence[_Part]) -> list[list[_Part]]:
    """Slices of one folder that are one series, though they have no UID, or each another one.

    There must be nothing else in the folder and its subfolders, because no UID can select them.
    """
    by_place: dict[Path, list[_Part]] = defaultdict(list)
    below: dict[Path, int] = defaultdict(int)
    for part in parts:
        by_place[part.place].append(part)
        for place in (part.place, *part.place.parents):
            below[place] += 1
    return [
        group
        for place, group in by_place.items()
        if len(group) == below[place]
        and all(not part.header.uid or part.images == 1 for part in group)
        and sum(part.images for part in group) >= FEWEST_SLICES
    ]


def _source(group: Sequence[_Part]) -> Path:
    alone = len(group) == 1 and group[0].files == 1
    return group[0].first if alone else group[0].place


def _series(source: Path, uid: str | None, parts: Sequence[_Part]) -> FoundSeries:
    return FoundSeries(
        source=source,
        uid=uid,
        header=parts[0].header,
        slices=len(set().union(*(part.positions for part in parts))),
        fingerprint=fingerprint_of((part.marks for part in parts), uid),
        files=tuple(parts[0].names) if len(parts) == 1 and parts[0].names else None,
    )
