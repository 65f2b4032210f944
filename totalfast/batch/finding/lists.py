"""Lists of cases: CSV and TSV files, and lines of text. The paths in them are not looked at."""

from __future__ import annotations

import codecs
import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from totalfast.batch.remote.files import read
from totalfast.batch.remote.place import SCHEME, Remote, place_of
from totalfast.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from totalfast.batch.remote.place import Place

ENDINGS = (".csv", ".tsv")

NAME_COLUMNS = ("case", "name")
PATH_COLUMNS = ("path", "image", "file")
SERIES_COLUMNS = ("series",)
"""Words in the first line; the case of letters does not matter, and other columns are allowed."""

DELIMITERS = ",;\t"


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """A case in a list.

    Parameters
    ----------
    path
        An image file, or a folder, zip file or file of DICOM; it may be missing.
    name
        None if the list has none.
    series
        SeriesInstanceUID or SeriesNumber; None if the list has none.
    place
        Where it is listed, for messages.
    """

    path: Place
    name: str | None
    series: str | None
    place: str


def read_list(path: Place) -> list[Listed]:
    """Read a CSV or TSV file, whose first line names the columns.

    The delimiter of a CSV file is a comma, a semicolon or a tab. Relative paths are relative to the
    file's folder; addresses such as ``s3://bucket/ct.nii.gz`` are allowed, too.

    Raises
    ------
    InputError
        If the file can't be read, has no column of paths, or a line has no path.
    """
    try:
        data = read(path) if isinstance(path, Remote) else path.read_bytes()
        text = data.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise InputError(f"{path} can't be read as a list of cases: {reason}.") from error
    try:
        return list(_rows(path, text))
    except csv.Error as error:
        raise InputError(f"{path} can't be read as a list of cases: {error}.") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class _Columns:
    """Numbers of the columns of a list."""

    count: int
    path: int
    name: int | None
    series: int | None

    @classmethod
    def of(cls, file: Place, words: Sequence[str]) -> _Columns:
        path = _column(file, words, PATH_COLUMNS)
        if path is None:
            raise InputError(
                f"{file} has the columns {', '.join(map(repr, words))}; the first line of a list "
                f"of cases needs a column {_words(PATH_COLUMNS)}, and may have "
                f"{_words(NAME_COLUMNS)}, and 'series'."
            )
        return cls(
            count=len(words),
            path=path,
            name=_column(file, words, NAME_COLUMNS),
            series=_column(file, words, SERIES_COLUMNS),
        )


def _rows(path: Place, text: str) -> Iterator[Listed]:
    first = next((line for line in text.splitlines() if line.strip()), "")
    delimiter = "\t" if path.suffix.lower() == ".tsv" else max(DELIMITERS, key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    columns = None
    for values in reader:
        row = [value.strip() for value in values]
        if not any(row):
            continue
        if columns is None:
            columns = _Columns.of(path, row)
            continue
        yield _listed(row, columns, f"line {reader.line_num} of {path}", path.parent)
    if columns is None:
        raise InputError(f"{path} is empty; a list of cases has one per line, below a first line.")


def _listed(row: Sequence[str], columns: _Columns, place: str, folder: Place) -> Listed:
    if len(row) > columns.count:
        raise InputError(
            f"{place} has {len(row)} values, but there are {columns.count} columns; put values "
            "that contain the delimiter in double quotes."
        )
    full = [*row, *[""] * (columns.count - len(row))]
    if not full[columns.path]:
        raise InputError(f"{place} has no path; each line needs one.")
    return Listed(
        path=_joined(folder, full[columns.path]),
        name=None if columns.name is None else full[columns.name] or None,
        series=None if columns.series is None else full[columns.series] or None,
        place=place,
    )


def _joined(folder: Place, text: str) -> Place:
    """Return the place that a line names; a folder elsewhere has no place on this disk."""
    if SCHEME.match(text) or (isinstance(folder, Remote) and Path(text).is_absolute()):
        return place_of(text)
    return folder / text


def _column(path: Place, columns: Sequence[str], words: Sequence[str]) -> int | None:
    """Number of the column with one of these words; None if there is none."""
    found = [number for number, word in enumerate(columns) if word.lower() in words]
    if len(found) > 1:
        raise InputError(
            f"{path} has {len(found)} columns for the same values: "
            f"{', '.join(repr(columns[number]) for number in found)}; it may have one of them."
        )
    return found[0] if found else None


def _words(words: Sequence[str]) -> str:
    *most, last = map(repr, words)
    return f"{', '.join(most)} or {last}" if most else last


def read_lines(content: bytes) -> list[Listed]:
    """Read a path from each line, or a name, a tab and a path.

    If there is a null byte, null bytes end the lines, as those of ``find -print0``.

    Raises
    ------
    InputError
        If a line has a name but no path.
    """
    text = content.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape")
    if "\0" in text:
        lines = text.split("\0")
    else:
        lines = [line.removesuffix("\r") for line in text.split("\n")]
    return [_line(line, number) for number, line in enumerate(lines, 1) if line.strip()]


def _line(line: str, number: int) -> Listed:
    place = f"line {number} of the standard input"
    name, tab, path = line.partition("\t")
    if tab and not path.strip():
        raise InputError(f"{place} has no path behind its tab; it needs NAME, a tab, and PATH.")
    if not tab:
        return Listed(path=place_of(line), name=None, series=None, place=place)
    return Listed(path=place_of(path), name=name.strip() or None, series=None, place=place)
