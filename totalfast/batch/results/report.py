"""The report of a batch: an HTML file with counts, times, failures, warnings and pictures."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np

from totalfast.about import version
from totalfast.batch.results.entries import DONE
from totalfast.batch.results.manifest import written_files
from totalfast.batch.results.page import facts, figures, heading, note, page, table
from totalfast.batch.results.table import count_structures
from totalfast.batch.results.whole_file import write_whole

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from totalfast.batch.remote.place import Place
    from totalfast.batch.results.entries import Entry

FIRST, WORST, SLOWEST = 3, 6, 10
"""How many pictures of the first and of the worst cases are shown, and how many slow cases."""

WARNINGS = 50
"""How many different warnings are listed, most frequent ones first."""

UNITS_S = (("d", 86400), ("h", 3600), ("min", 60))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Picture:
    """A done case with a preview."""

    entry: Entry
    file: Path
    structures: int | None
    """Number of structures found; None without statistics."""

    @property
    def caption(self) -> str:
        parts = [self.entry.name]
        if self.structures is not None:
            parts.append(_plural(self.structures, "structure"))
        if self.entry.warnings:
            parts.append(_plural(len(self.entry.warnings), "warning"))
        return ", ".join(parts)

    @property
    def is_rated(self) -> bool:
        """Whether anything is known about how good the result is."""
        return bool(self.entry.warnings) or self.structures is not None

    @property
    def badness(self) -> tuple[int, float]:
        """Larger for worse cases: more warnings, then fewer structures."""
        found = math.inf if self.structures is None else self.structures
        return len(self.entry.warnings), -found


def write_report(
    path: Path,
    entries: Mapping[str, Entry],
    folder: Path,
    *,
    skipped: int | None = None,
    place: Place | None = None,
    bring: Callable[[Iterable[Path]], None] | None = None,
) -> None:
    """Write the report of a batch.

    Parameters
    ----------
    path
        The HTML file; it appears whole, in place of an older one.
    entries
        Last entry of each case, in the order of the cases.
    folder
        The batch's folder of results. Pictures are the previews among the entries' files (or
        those that their completion markers list); the numbers of structures come from the
        statistics among them.
    skipped
        Number of cases that were done before this run; None if it is not known.
    place
        Where the results are, if ``folder`` has copies of them.
    bring
        Makes files of ``folder`` readable, if ``folder`` has copies.

    Raises
    ------
    OutputError
        If the file can't be written.
    """
    cases = tuple(entries.values())
    place = folder if place is None else place
    parts = [
        note(f"totalfast {version()}, {place}"),
        *_counts(cases, skipped),
        *_failures(cases),
        *_times(cases),
        *_warnings(cases),
        *_pictures(cases, folder, bring or list),
    ]
    text = page(f"Batch {place.resolve().name if isinstance(place, Path) else place.name}", parts)
    data = text.encode("utf-8", "backslashreplace")
    write_whole(path, lambda staged: staged.write_bytes(data))


def _counts(cases: Sequence[Entry], skipped: int | None) -> Iterator[str]:
    done = [case for case in cases if case.state == DONE]
    failed = len(cases) - len(done)
    pairs = [
        ("Done", str(len(done)), "good"),
        ("Failed", str(failed), "bad" if failed else ""),
    ]
    if skipped is not None:
        pairs.append(("Skipped, done before", str(skipped), ""))
    if done:
        seconds, busy_s = [case.total_s for case in done], busy_time_s(cases)
        pairs += [
            ("Median time of a case", _duration(float(np.median(seconds))), ""),
            ("95 % take at most", _duration(float(np.percentile(seconds, 95))), ""),
            ("Time with cases in work", _duration(busy_s), ""),
        ]
        if busy_s > 0:
            pairs.append(("Throughput", f"{len(done) / busy_s * 3600:.1f} cases per hour", ""))
    yield facts(pairs)


def busy_time_s(cases: Iterable[Entry]) -> float:
    """Time in seconds in which at least one case was in work, on any machine.

    Pauses between an ended batch and the next one do not count. Only last attempts are known.
    """
    spans = sorted((case.finished_s - case.total_s, case.finished_s) for case in cases)
    busy_s, until = 0.0, -math.inf
    for start, end in spans:
        busy_s += max(end - max(start, until), 0.0)
        until = max(until, end)
    return busy_s


def _failures(cases: Sequence[Entry]) -> Iterator[str]:
    failed = [case for case in cases if case.state != DONE]
    if failed:
        yield heading("Failed cases")
        rows = [(case.name, case.error or "", case.attempt, case.source) for case in failed]
        yield table(("Case", "Reason", "Attempts", "Input"), rows)


def _times(cases: Sequence[Entry]) -> Iterator[str]:
    done = [case for case in cases if case.state == DONE]
    stages = dict.fromkeys(stage for case in done for stage in case.seconds)
    total_s = sum(sum(case.seconds.values()) for case in done)
    if stages and total_s > 0:
        yield heading("Time by stage")
        yield table(
            ("Stage", "Median (s)", "95th percentile (s)", "Share (%)"),
            [_stage_row(stage, done, total_s) for stage in stages],
        )
    if done:
        yield heading("Slowest cases")
        slowest = sorted(done, key=lambda case: -case.total_s)[:SLOWEST]
        rows = [(case.name, case.total_s, _longest_stage(case), case.host) for case in slowest]
        yield table(("Case", "Time (s)", "Longest stage", "Machine"), rows)


def _stage_row(stage: str, done: Sequence[Entry], total_s: float) -> tuple[str | float, ...]:
    """Times of a stage, of the cases that have it."""
    seconds = [case.seconds[stage] for case in done if stage in case.seconds]
    median, high = np.percentile(seconds, [50, 95])
    return stage, float(median), float(high), 100 * sum(seconds) / total_s


def _longest_stage(case: Entry) -> str:
    if not case.seconds:
        return ""
    stage = max(case.seconds, key=lambda name: case.seconds[name])
    return f"{stage}, {case.seconds[stage]:.1f} s"


def _warnings(cases: Sequence[Entry]) -> Iterator[str]:
    counts = Counter(text for case in cases for text in set(case.warnings))
    if not counts:
        return
    yield heading("Warnings")
    yield table(("Cases", "Warning"), [(n, text) for text, n in counts.most_common(WARNINGS)])
    if len(counts) > WARNINGS:
        yield note(f"{len(counts) - WARNINGS} other warnings are in the manifest.")


def _pictures(
    cases: Sequence[Entry], folder: Path, bring: Callable[[Iterable[Path]], object]
) -> Iterator[str]:
    done = [case for case in cases if case.state == DONE]
    bring(
        folder / name for case in done for name in case.files if _matches(name, "*statistics.json")
    )
    pictures = [picture for case in done if (picture := _picture(case, folder)) is not None]
    if not pictures:
        yield heading("Pictures")
        yield note("There are none; run the batch with --preview to have one of each case.")
        return
    rated = [picture for picture in pictures[FIRST:] if picture.is_rated]
    worst = sorted(rated, key=lambda picture: picture.badness, reverse=True)[:WORST]
    bring(picture.file for picture in (*pictures[:FIRST], *worst))
    yield heading("First cases")
    yield figures((picture.file, picture.caption) for picture in pictures[:FIRST])
    if worst:
        yield heading("Worst of the other cases")
        yield note("Those with most warnings, then those with the fewest structures.")
        yield figures((picture.file, picture.caption) for picture in worst)


def _picture(case: Entry, folder: Path) -> _Picture | None:
    files = sorted(written_files(case, folder))
    previews = [name for name in files if _matches(name, "preview_*.png")]
    if not previews:
        return None
    tables = [name for name in files if _matches(name, "*statistics.json")]
    structures = count_structures(folder / tables[0]) if tables else None
    return _Picture(entry=case, file=folder / previews[0], structures=structures)


def _matches(name: str, pattern: str) -> bool:
    return PurePosixPath(PurePosixPath(name).name).match(pattern)


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _duration(seconds: float) -> str:
    """Write a time in its largest unit."""
    for unit, size in UNITS_S:
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"
