"""One table of all statistics of a batch: a row for each case and structure.

Cases are read one after the other, so that a table of any length needs the memory of one part.
"""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import itertools
import json
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from totalfast.batch.results.whole_file import write_whole
from totalfast.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from contextlib import AbstractContextManager
    from pathlib import Path

    Opened = Callable[[Path, "Kinds"], AbstractContextManager[Callable[[list["Row"]], None]]]
    """Opens a file for rows of some columns, and gives the function that writes rows."""

logger = logging.getLogger(__name__)

Row = dict[str, Any]
"""Column to value: text, a number, or None."""

PARQUET = ".parquet"

ROWS_AT_A_TIME = 1 << 14
"""Rows that are kept in memory; in a Parquet file they are a row group."""

AXES = ("x", "y", "z")

PARTS = {
    "centroid_vox": tuple(f"centroid_vox_{axis}" for axis in AXES),
    "bbox_vox": tuple(f"bbox_vox_{axis}_{end}" for axis in AXES for end in ("min", "max")),
}
"""Statistic of several numbers to their columns; it is None for an empty structure."""

COLUMNS = (
    "case",
    "structure",
    "volume_mm3",
    "intensity",
    "n_voxels",
    "intensity_std",
    "intensity_min",
    "intensity_max",
    *itertools.chain.from_iterable(PARTS.values()),
)
"""Order of the columns that are known; others follow by their names."""

RENAMED = {"volume": "volume_mm3"}
"""Statistic to its column, where they differ."""

NOTHING, WHOLE, NUMBER, TEXT = range(4)
"""Kinds of a column's values; a column of a kind can hold all kinds before it."""

_KINDS: dict[type, int] = {type(None): NOTHING, int: WHOLE, float: NUMBER}

Kinds = dict[str, int]
"""Column to the kind of its values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StatisticsRows:
    """Rows of the statistics of many cases, which are read while they are iterated over.

    Parameters
    ----------
    files
        Name of a case to its file of statistics. Cases come in the order of their names, and
        structures in the order of the file, which is the task's. A file that can't be read is left
        out with a warning.
    """

    files: Mapping[str, Path]

    def __iter__(self) -> Iterator[Row]:
        """Yield the rows; can be called again."""
        for case in sorted(self.files):
            for structure, values in _read(self.files[case]).items():
                row: Row = {"case": case, "structure": structure}
                for name, value in values.items():
                    row.update(_cells(name, value))
                yield row


def count_structures(file: Path) -> int | None:
    """Count the structures that a file of statistics has a volume of; None if it can't be read.

    Structures at the border of the scan count only if they are not excluded from the statistics.
    """
    statistics = _read(file)
    if not statistics:
        return None
    return sum(1 for values in statistics.values() if values.get("volume", 0) > 0)


def check_table(path: Path) -> None:
    """Check at the start that a table can be written in the format of its ending.

    Raises
    ------
    OptionError
        If a Parquet file is wanted, and pyarrow is not installed.
    """
    if path.suffix == PARQUET and importlib.util.find_spec("pyarrow") is None:
        raise OptionError(
            f"{path.name} needs pyarrow: pip install pyarrow. A table that ends in .csv needs "
            "nothing."
        )


def write_table(path: Path, rows: Iterable[Row]) -> None:
    """Write a table as Parquet if its path ends in ``.parquet``, otherwise as CSV.

    Parameters
    ----------
    path
        The file; it appears whole, in place of an older one.
    rows
        The rows in their order, such as ``StatisticsRows``; not an iterator, because rows with
        columns that the first ones lack make a second pass necessary.

    Raises
    ------
    OptionError
        If pyarrow is missing.
    OutputError
        If the file can't be written.

    Notes
    -----
    CSV is UTF-8 with commas and line feeds. Numbers have all their digits, None is an empty field.
    """
    check_table(path)
    if iter(rows) is rows:
        raise TypeError("rows must be iterable twice, so an iterator can't be taken")
    opened: Opened = _parquet if path.suffix == PARQUET else _csv

    def write(staged: Path) -> None:
        first = {"case": TEXT, "structure": TEXT}
        kinds = _kinds(first, itertools.islice(rows, ROWS_AT_A_TIME))
        complete = _write(staged, rows, kinds, opened)
        if complete != kinds:
            _write(staged, rows, complete, opened)

    write_whole(path, write)


def _write(path: Path, rows: Iterable[Row], kinds: Kinds, opened: Opened) -> Kinds:
    """Write rows until one does not fit the columns; return the columns that fit all rows."""
    complete, names = kinds, _in_order(kinds)
    iterator = iter(rows)
    with opened(path, {name: kinds[name] for name in names}) as write:
        while part := list(itertools.islice(iterator, ROWS_AT_A_TIME)):
            complete = _kinds(complete, part)
            if complete == kinds:
                write(part)
    return complete


@contextlib.contextmanager
def _csv(path: Path, kinds: Kinds) -> Iterator[Callable[[list[Row]], None]]:
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(kinds)
        yield lambda part: writer.writerows([row.get(name) for name in kinds] for row in part)


@contextlib.contextmanager
def _parquet(path: Path, kinds: Kinds) -> Iterator[Callable[[list[Row]], None]]:
    import pyarrow
    import pyarrow.parquet

    types = {WHOLE: pyarrow.int64(), TEXT: pyarrow.string()}
    schema = pyarrow.schema(
        [(name, types.get(kind, pyarrow.float64())) for name, kind in kinds.items()]
    )
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:

        def write(part: list[Row]) -> None:
            columns = {
                name: [_as_text(row.get(name)) if kind == TEXT else row.get(name) for row in part]
                for name, kind in kinds.items()
            }
            writer.write_table(pyarrow.Table.from_pydict(columns, schema=schema))

        yield write


def _as_text(value: object) -> str | None:
    """Text that UTF-8 can hold: parts of file names that are not UTF-8 are written as in CSV."""
    return None if value is None else str(value).encode(errors="backslashreplace").decode()


def _kinds(kinds: Kinds, rows: Iterable[Row]) -> Kinds:
    """Add columns, and widen their kinds, until the rows fit."""
    seen: set[tuple[str, type]] = set()
    for row in rows:
        seen.update(zip(row, map(type, row.values()), strict=True))
    wider = dict(kinds)
    for name, of_value in sorted(seen, key=lambda pair: pair[0]):
        wider[name] = max(wider.get(name, NOTHING), _KINDS.get(of_value, TEXT))
    return wider


def _in_order(names: Iterable[str]) -> list[str]:
    known = {name: place for place, name in enumerate(COLUMNS)}
    return sorted(names, key=lambda name: (known.get(name, len(known)), name))


def _read(file: Path) -> dict[str, dict[str, Any]]:
    """Read statistics; none if the file is missing or damaged."""
    try:
        content = json.loads(file.read_bytes())
        return {str(name): dict(values) for name, values in content.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        logger.warning("WARNING: statistics are missing in the table: %s: %s", file, error)
        return {}


def _cells(name: str, value: object) -> Iterator[tuple[str, Any]]:
    """Name the columns of a statistic, and give their values; nested ones get joined names."""
    if name in PARTS:
        numbers = itertools.repeat(None) if value is None else _numbers(value)
        yield from zip(PARTS[name], numbers, strict=False)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _cells(f"{name}_{key}", item)
    elif isinstance(value, list):
        for place, item in enumerate(value):
            yield from _cells(f"{name}_{place}", item)
    else:
        yield RENAMED.get(name, name), value


def _numbers(value: object) -> Iterator[object]:
    """Numbers of a list of lists, in order."""
    if isinstance(value, list):
        for item in value:
            yield from _numbers(item)
    else:
        yield value
