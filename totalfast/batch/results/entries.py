"""Entries of a batch's manifest: attempts of cases as lines of JSON, and which of them count.

This module reads files of lines. It does not know which options or cases a batch has.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from totalfast.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

logger = logging.getLogger(__name__)

DONE, FAILED = "done", "failed"
"""States of a finished attempt."""

FORMAT = 1
"""Version of the lines; a larger one may mean something else."""

FILE_NAME = re.compile(r"manifest(-\d+-of-\d+)?\.jsonl")
"""Names of the files of a manifest, one for each part of a batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One finished attempt of a case."""

    name: str
    """Name of the case."""
    state: str
    """``DONE`` or ``FAILED``."""
    options: str = ""
    """Hash of the batch's options."""
    fingerprint: str = ""
    """What the input was: ``Case.fingerprint()``."""
    source: str = ""
    """Path of the input."""
    series: str | None = None
    """SeriesInstanceUID of the input, if it is DICOM."""
    attempt: int = 1
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Stage to its time in seconds."""
    total_s: float = 0.0
    peak_bytes: int | None = None
    """Most memory that the process had until then; None if it is not known."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Program to its version."""
    error: str | None = None
    """Why it failed, in one line."""
    warnings: Sequence[str] = ()
    files: Sequence[str] = ()
    """What was written, or only the completion markers that list it: paths relative to the batch's
    folder, with "/" between the parts."""
    finished: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat())
    """Time of its end, ISO 8601."""
    host: str = ""
    part: tuple[int, int] = (0, 1)
    """Number of the part, from 0, and number of all parts."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Fields of newer versions."""

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Entry:
        """Take an entry from a JSON object.

        Raises
        ------
        ValueError
            If a field is missing.
        TypeError
            If a field has another type.
        """
        values = {name: content[name] for name in _FIELDS if name in content}
        for name, value in values.items():
            if not isinstance(value, _FIELDS[name]) or isinstance(value, bool):
                raise TypeError(f"{name} is {value!r}.")
        for name in ("warnings", "files", "part"):
            if name in values:
                values[name] = tuple(values[name])
        if not {"name", "state"} <= values.keys() or len(values.get("part", (0, 1))) != 2:
            raise ValueError("an entry needs a name, a state, and a part of two numbers.")
        extra = {name: value for name, value in content.items() if name not in _FIELDS}
        return cls(**values, extra=extra)

    def to_json(self) -> dict[str, Any]:
        """Return the entry as a JSON object."""
        return {**{name: getattr(self, name) for name in _FIELDS}, **self.extra}

    @property
    def finished_s(self) -> float:
        """Time of its end, in seconds since the epoch; 0 if it can't be read."""
        try:
            time = datetime.fromisoformat(self.finished.replace("Z", "+00:00"))
        except ValueError:
            return 0.0
        return (time if time.tzinfo else time.replace(tzinfo=timezone.utc)).timestamp()


_TYPES: dict[str, type | tuple[type, ...]] = {
    "series": (str, type(None)),
    "attempt": int,
    "seconds": dict,
    "total_s": (int, float),
    "peak_bytes": (int, type(None)),
    "versions": dict,
    "error": (str, type(None)),
    "warnings": list,
    "files": list,
    "part": list,
}
_FIELDS = {
    field.name: _TYPES.get(field.name, str)
    for field in dataclasses.fields(Entry)
    if field.name != "extra"
}
"""Field to the types of its JSON value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """Content of one file of a manifest."""

    options: tuple[dict[str, Any], ...]
    """The options in its headers: one, or none if the header was cut off."""
    entries: tuple[Entry, ...]
    """In the order of the file."""


def manifest_files(folder: Path) -> list[Path]:
    """List the files of a folder's manifest, in the order of their names."""
    try:
        paths = [path for path in folder.iterdir() if FILE_NAME.fullmatch(path.name)]
    except FileNotFoundError:
        return []
    return sorted(paths)


def read_content(file: Path) -> Content:
    """Read one file of a manifest; a missing file is empty.

    A line that is no whole JSON object is ignored: its process was killed, or the disk was full.

    Raises
    ------
    OutputError
        If the file can't be read, or a newer version wrote it in another format.
    """
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        data = b""
    except OSError as error:
        raise OutputError(f"can't read {file}: {error.strerror or error}.") from error
    objects = [content for line in data.split(b"\n") if (content := _parse(line, file))]
    headers = [content for content in objects if "manifest" in content]
    found = [_entry(content, file) for content in objects if "manifest" not in content]
    return Content(
        options=tuple(_header_options(header, file) for header in headers),
        entries=tuple(entry for entry in found if entry is not None),
    )


def _parse(line: bytes, file: Path) -> dict[str, Any] | None:
    """Parse a line; None if it is empty or no whole JSON object."""
    try:
        content = json.loads(line.decode()) if line.strip() else None
    except (ValueError, RecursionError):
        logger.debug("%s: a damaged line of %d bytes is ignored", file, len(line))
        return None
    return content if isinstance(content, dict) else None


def _entry(content: dict[str, Any], file: Path) -> Entry | None:
    try:
        return Entry.from_json(content)
    except (ValueError, TypeError) as error:
        logger.debug("%s: an entry is ignored: %s", file, error)
        return None


def _header_options(header: dict[str, Any], file: Path) -> dict[str, Any]:
    version, options = header["manifest"], header.get("options")
    if version != FORMAT or not isinstance(options, dict):
        raise OutputError(
            f"{file} has format {version!r}, but this version of totalfast knows {FORMAT}; use the "
            "version that wrote it, or name another folder with -o."
        )
    return options


def last_entries(entries: Iterable[Entry]) -> dict[str, Entry]:
    """Choose each case's last entry by the time of its end; of two at one time, the done one.

    Returns
    -------
        Name of the case to its entry, in the order of the names.
    """
    last: dict[str, Entry] = {}
    for entry in entries:
        note_last(last, entry)
    return {name: last[name] for name in sorted(last)}


def note_last(last: dict[str, Entry], entry: Entry) -> None:
    """Put an entry into ``last``, unless the one of its case there is later."""
    other = last.get(entry.name)
    if other is None or _rank(entry) >= _rank(other):
        last[entry.name] = entry


def _rank(entry: Entry) -> tuple[float, bool]:
    return entry.finished_s, entry.state == DONE


def read_entries(folder: Path) -> dict[str, Entry]:
    """Read the last entry of each case, from all files of a folder's manifest.

    Parameters
    ----------
    folder
        The batch's folder of results. Processes may write to it.

    Raises
    ------
    OutputError
        If a file can't be read.
    """
    return last_entries(
        entry for file in manifest_files(folder) for entry in read_content(file).entries
    )
