"""From the inputs of a batch to its cases: what they are, which of them are wanted, their names.

Only file names and headers are read. Whether a scan can be segmented shows when its case runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from totalfast.batch.finding.collect import STANDARD_INPUT, Collector
from totalfast.batch.finding.filters import Wanted
from totalfast.batch.finding.fingerprints import fingerprint_now
from totalfast.batch.finding.left_out import LeftOut
from totalfast.batch.finding.names import folded_name, safe_name, unique_names
from totalfast.batch.finding.remote_search import scans_now
from totalfast.batch.remote.place import Remote, place_of
from totalfast.errors import InputError, OptionError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from totalfast.batch.finding.collect import Candidate, Naming
    from totalfast.batch.remote.place import Place

NAMES = ("auto", "uid", "accession")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A scan of a batch.

    Parameters
    ----------
    name
        Different from those of the other cases, also where letter case is ignored; a file name
        without an ending that Linux, macOS and Windows allow.
    source
        Image file, or folder, zip file or file of DICOM, on a disk or elsewhere; it may be missing
        if a list names it.
    series
        SeriesInstanceUID if the source is DICOM; None for image files, and if the source has one
        series only.
    found
        Fingerprint of the files of a series, which may be some of its folder's; None if the files
        were not looked at.
    files
        Names of the files of the series, if the source is a folder with many others; None reads the
        headers of all files there.
    size
        Bytes of all files, if the source is elsewhere.
    """

    name: str
    source: Place
    series: str | None
    found: str | None = None
    files: tuple[str, ...] | None = None
    size: int | None = None

    def fingerprint(self) -> str:
        """What the input is: changes with the names, sizes and times of its files, and the series.

        No file is opened. That of a DICOM series is from the time when it was found.
        """
        if self.found is not None:
            return self.found
        if isinstance(self.source, Remote):
            return scans_now([self.source])[self.source].fingerprint(self.series)
        return fingerprint_now(self.source, self.series)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The cases of a batch, sorted by their names, and what is none."""

    cases: tuple[Case, ...]
    left_out: tuple[LeftOut, ...]


def find_cases(
    inputs: str | Place | Iterable[str | Place],
    *,
    modality: str | None = None,
    series_description: str | None = None,
    min_slices: int | None = None,
    names: Naming = "auto",
    skip: Place | None = None,
    earlier: Mapping[tuple[str, str | None], str] | None = None,
    on_file: Callable[[Path], None] | None = None,
) -> Found:
    """Find the scans of a batch, and name them.

    Parameters
    ----------
    inputs
        One or several of: a folder, searched with its subfolders for image files and DICOM series;
        a pattern such as ``scans/**/*.nii.gz``; an image file, or a zip file or multi-frame file of
        DICOM; a list of cases (``.csv``, ``.tsv``); "-" for lines of the standard input. A path in
        a list is one case, also if it is missing, and a DICOM folder in it holds one series. All of
        them may be elsewhere, such as ``s3://bucket/scans``; then a folder that directly holds
        DICOM files is one case.
    modality
        Keep DICOM series of this modality only, for example "CT". Image files are kept.
    series_description
        Keep DICOM series only whose description contains a match of this regular expression, in
        upper or lower case. Image files are kept.
    min_slices
        Keep series with at least as many slices, and image files whose third axis is as long.
    names
        "uid" names DICOM series by their SeriesInstanceUID; "accession" by their AccessionNumber,
        with the SeriesNumber where it is needed; "auto" is "uid". Image files are named by their
        file, and by the folders above it where it is needed. Names in lists are always used.
    skip
        A folder that is not searched, such as that of the results.
    earlier
        (source as text, series) to the name that the case had in an earlier run, and keeps.
    on_file
        Called with each file that was searched, in this thread.

    Returns
    -------
        At least one case.

    Raises
    ------
    InputError
        If an input is missing or can't be read, a list is not valid, or nothing is left.
    OptionError
        If an option is not valid.

    Notes
    -----
    Names do not depend on the order of the inputs. A further scan can change the name of another
    one only if both had the same name; with ``earlier``, old cases keep theirs.
    """
    given = [inputs] if isinstance(inputs, str | Path | Remote) else list(inputs)
    if names not in NAMES:
        raise OptionError(f"names is {names!r}, but must be one of {', '.join(map(repr, NAMES))}.")
    search = Collector(
        wanted=Wanted.of(modality, series_description, min_slices),
        names=names,
        skip=skip,
        on_file=on_file,
    )
    for each in given:
        search.add(each)
    candidates = search.candidates()
    left_out = search.left_out.result()
    if not candidates:
        raise InputError(_nothing_found(given, left_out))
    cases = _named(candidates, earlier or {})
    return Found(cases=tuple(sorted(cases, key=lambda case: case.name)), left_out=left_out)


def part_of(cases: Iterable[Case], number: int, parts: int) -> tuple[Case, ...]:
    """Return the cases of one part of a batch, of which other processes segment the other parts.

    Every ``parts``-th case belongs to a part, in the order of the sources and not of the names,
    because a case can get another name while parts start.
    """
    ordered = sorted(cases, key=lambda case: (str(case.source), case.series or "", case.name))
    return tuple(ordered[number::parts])


def _nothing_found(inputs: Sequence[str | Place], left_out: Sequence[LeftOut]) -> str:
    places = ", ".join(
        "the standard input"
        if each == STANDARD_INPUT
        else str(each if isinstance(each, Remote) else place_of(each))
        for each in inputs
    )
    reasons = "; ".join(map(str, left_out)) or "there are no files"
    return (
        f"No scans were found in {places or 'an empty list of inputs'}. totalfast looked for "
        f"NIfTI, NRRD and MetaImage files, and for DICOM series in folders and zip files. Left "
        f"out: {reasons}."
    )


def _named(
    candidates: Sequence[Candidate], earlier: Mapping[tuple[str, str | None], str]
) -> Iterator[Case]:
    """Name all cases; those that have a name already keep it."""
    fixed: dict[int, str] = {}
    used: dict[str, Candidate] = {}
    for index, each in enumerate(candidates):
        if each.given is None:
            continue
        fixed[index] = safe_name(each.given)
        other = used.setdefault(folded_name(fixed[index]), each)
        if other is not each:
            raise InputError(
                f"{each.place} has the name {each.given!r}, which as a file name is that of "
                f"{other.place}; each case needs a name of its own."
            )
    for index, each in enumerate(candidates):
        old = earlier.get((str(each.source), each.series))
        if index not in fixed and old is not None and folded_name(old) not in used:
            fixed[index] = old
            used[folded_name(old)] = each
    rest = [index for index in range(len(candidates)) if index not in fixed]
    chosen = unique_names([candidates[index].wish for index in rest], taken=fixed.values())
    all_names = fixed | dict(zip(rest, chosen, strict=True))
    for index, each in enumerate(candidates):
        yield Case(
            name=all_names[index],
            source=each.source,
            series=each.series,
            found=each.found,
            files=each.files,
            size=each.size,
        )
