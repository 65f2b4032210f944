"""Collect the scans of all inputs of a batch, each once, before they are named."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath
from typing import TYPE_CHECKING, Literal

from totalfast.batch.finding import lists
from totalfast.batch.finding.images import is_image, is_second_of_pair, stem_of
from totalfast.batch.finding.left_out import Counted
from totalfast.batch.finding.names import Wish
from totalfast.batch.finding.remote_search import scans_now, scans_of
from totalfast.batch.finding.search import files_below, matches_of
from totalfast.batch.finding.series_cases import find_series
from totalfast.batch.remote.place import Remote, place_of
from totalfast.errors import InputError, OptionError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from totalfast.batch.finding.filters import Wanted
    from totalfast.batch.finding.lists import Listed
    from totalfast.batch.finding.series_cases import FoundSeries
    from totalfast.batch.remote.place import Place

Naming = Literal["auto", "uid", "accession"]

STANDARD_INPUT = "-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A scan that becomes a case.

    Parameters
    ----------
    source, series, found, files, size
        Those of the case.
    wish
        Names that it could have.
    given, place
        The name that a list gives it, and the list's line, for messages.
    """

    source: Place
    series: str | None
    wish: Wish
    given: str | None = None
    place: str = ""
    found: str | None = None
    files: tuple[str, ...] | None = None
    size: int | None = None

    @property
    def key(self) -> tuple[str, str | None]:
        """What makes two candidates the same scan."""
        if isinstance(self.source, Remote):
            return self.source.url, self.series
        return os.path.abspath(self.source), self.series  # noqa: PTH100 - links are not followed


class Collector:
    """Collects the scans of all inputs."""

    def __init__(
        self,
        *,
        wanted: Wanted,
        names: Naming,
        skip: Place | None,
        on_file: Callable[[Path], None] | None,
    ) -> None:
        self.left_out = Counted()
        self._wanted = wanted
        self._names = names
        self._skip = skip if isinstance(skip, Path) else None
        self._skip_elsewhere = skip if isinstance(skip, Remote) else None
        self._on_file = on_file
        self._candidates: list[Candidate] = []
        self._groups: list[tuple[Path, list[Path]]] = []
        """Folder that was searched, and its files that may be DICOM."""

    def add(self, each: str | Place) -> None:
        """Search one input.

        Raises
        ------
        InputError
            If it is missing or can't be read, or a list is not valid.
        TransferError
            If it is elsewhere and can't be read now.
        OptionError
            If it is elsewhere, and headers must be read to choose or name its scans.
        """
        if each == STANDARD_INPUT:
            self._add_listed(lists.read_lines(sys.stdin.buffer.read()))
            return
        path = each if isinstance(each, Remote) else place_of(each)
        if isinstance(path, Remote):
            self._add_elsewhere(path)
        elif path.is_dir():
            self._add_files(path, files_below(path, self.left_out, skip=self._skip))
        elif path.suffix.lower() in lists.ENDINGS and path.is_file():
            self._add_listed(lists.read_list(path))
        elif path.is_file():
            self._add_files(path.parent, [path])
        elif any(letter in str(each) for letter in "*?["):
            self._add_matches(str(each))
        else:
            raise InputError(f"{each} does not exist.")

    def candidates(self) -> list[Candidate]:
        """All scans, each once.

        Raises
        ------
        InputError
            If a folder can't be read.
        """
        for series in find_series(self._groups, self.left_out, on_file=self._on_file):
            refusal = self._wanted.refusal_of_series(series)
            if refusal is not None:
                self.left_out.add(refusal, series.source)
            else:
                self._candidates.append(self._of_series(series))
        with_names = {each.key for each in self._candidates if each.given is not None}
        kept: dict[tuple[str, str | None, str | None], Candidate] = {}
        for each in self._candidates:
            if each.given is not None or each.key not in with_names:
                kept.setdefault((*each.key, each.given), each)
        return list(kept.values())

    def _add_elsewhere(self, place: Remote) -> None:
        if place.suffix.lower() in lists.ENDINGS and not place.has_magic:
            self._add_listed(lists.read_list(place))
            return
        self._refuse_headers(place)
        for scan in scans_of(place, self.left_out, skip=self._skip_elsewhere):
            self._candidates.append(
                Candidate(
                    source=scan.source,
                    series=None,
                    wish=_wish_of_path(scan.source),
                    found=scan.fingerprint(None),
                    size=scan.size,
                )
            )

    def _refuse_headers(self, place: Remote) -> None:
        if not self._wanted.is_everything or self._names != "auto":
            raise OptionError(
                f"{place} is searched by the names of files only, so scans there can't be chosen "
                "by modality, series description or number of slices, nor be named by UID or "
                "accession number; leave these options out, or name the wanted scans in a list."
            )

    def _add_matches(self, pattern: str) -> None:
        matches = matches_of(pattern, self.left_out, skip=self._skip)
        if not matches:
            self.left_out.add("pattern without a match", Path(pattern))
        files: dict[Path, list[Path]] = {}
        for path in matches:
            if path.is_dir():
                self._add_files(path, files_below(path, self.left_out, skip=self._skip))
            else:
                files.setdefault(path.parent, []).append(path)
        for folder, some in files.items():
            self._add_files(folder, some)

    def _add_files(self, folder: Path, files: Iterable[Path]) -> None:
        others: list[Path] = []
        for path in files:
            if is_second_of_pair(path):
                continue
            if not is_image(path):
                others.append(path)
                continue
            if self._on_file is not None:
                self._on_file(path)
            refusal = self._wanted.refusal_of_image(path)
            if refusal is not None:
                self.left_out.add(refusal, path)
            else:
                self._candidates.append(
                    Candidate(source=path, series=None, wish=_wish_of_path(path))
                )
        self._groups.append((folder, others))

    def _of_series(self, series: FoundSeries) -> Candidate:
        return Candidate(
            source=series.source,
            series=series.uid,
            wish=_wish_of_series(series, self._names),
            found=series.fingerprint,
            files=series.files,
        )

    def _add_listed(self, listed: Sequence[Listed]) -> None:
        elsewhere = scans_now(each.path for each in listed if isinstance(each.path, Remote))
        for each in listed:
            if isinstance(each.path, Remote):
                self._refuse_headers(each.path)
                scan = elsewhere[each.path]
                found, size = scan.fingerprint(each.series), scan.size
            else:
                found, size = None, None
            candidate = Candidate(
                source=each.path,
                series=each.series,
                wish=_wish_of_path(each.path),
                given=each.name,
                place=each.place,
                found=found,
                size=size,
            )
            if isinstance(each.path, Remote):
                refusal = None
            elif each.path.is_file() and is_image(each.path):
                refusal = self._wanted.refusal_of_image(each.path)
            elif each.path.exists() and self._needs_headers(each):
                candidate, refusal = self._look_into(each, each.path, candidate)
            else:
                refusal = None
            if refusal is not None:
                self.left_out.add(refusal, each.path)
            else:
                self._candidates.append(candidate)

    def _needs_headers(self, listed: Listed) -> bool:
        """Whether the DICOM files in a list must be read to filter or to name them."""
        return not self._wanted.is_everything or (listed.name is None and self._names != "auto")

    def _look_into(
        self, listed: Listed, path: Path, candidate: Candidate
    ) -> tuple[Candidate, str | None]:
        """Choose the wanted series of a listed source, if there is one; or why it is left out."""
        files = list(files_below(path, Counted())) if path.is_dir() else [path]
        all_series = find_series([(path, files)], Counted(), on_file=self._on_file)
        found = [
            series
            for series in all_series
            if listed.series in (None, series.uid, series.header.number)
        ]
        refusals = [self._wanted.refusal_of_series(series) for series in found]
        kept = [each for each, refusal in zip(found, refusals, strict=True) if refusal is None]
        if found and not kept:
            return candidate, refusals[0]
        if len(kept) != 1:
            return candidate, None  # reading it tells why there is no series, or several
        (series,) = kept
        chosen = Candidate(
            source=path,
            series=series.uid,
            wish=candidate.wish if self._names == "auto" else _wish_of_series(series, self._names),
            given=listed.name,
            place=listed.place,
            found=series.fingerprint,
            files=series.files,
        )
        return chosen, None


def _wish_of_path(path: Place) -> Wish:
    """Name a scan by its file or folder, and by the folders above it where that is needed."""
    if isinstance(path, Remote):
        whole = PurePath(PurePosixPath("/", path.path))
    else:
        whole = Path(os.path.abspath(path))  # noqa: PTH100 - links are not followed
    stem = stem_of(whole.name)
    ending = whole.name[len(stem) :].replace(".", "")
    folders = [part for part in whole.parent.parts if part != whole.anchor]
    longer = ["_".join([*folders[-count:], stem]) for count in range(1, len(folders) + 1)]
    if longer and ending:
        longer.insert(1, f"{longer[0]}_{ending}")
    return Wish(candidates=(stem, *longer), order=str(path if isinstance(path, Remote) else whole))


def _wish_of_series(series: FoundSeries, names: Naming) -> Wish:
    header = series.header
    if series.uid is None and not (names == "accession" and header.accession):
        return _wish_of_path(series.source)
    uid = series.uid or ""
    candidates = [uid]
    if names == "accession" and header.accession:
        candidates = [header.accession, f"{header.accession}_{header.number}"]
        candidates.append(f"{candidates[-1]}_{uid}")
    return Wish(candidates=tuple(candidates), order=f"{series.source}\0{uid}")
