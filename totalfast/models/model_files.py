"""Values of a model's JSON files that know their place, so that an error can name it."""

from __future__ import annotations

import json
import math
import os.path
import reprlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from totalfast import upstream
from totalfast.errors import MissingModelError, WeightsError

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path


MAX_BYTES = 100_000_000
"""Largest JSON file that is read. nnU-Net's plans have some 10 kB; dataset.json may list all
training images."""

MAX_DEPTH = 32
"""Deepest nesting of lists and objects. nnU-Net's plans have 6 levels, and Python's functions that
copy and write JSON fail at some 300."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A value of a JSON file.

    Parameters
    ----------
    path
        The file.
    place
        Keys that lead to the value, joined by dots; empty for the whole file.
    value
        What ``json`` returned.
    """

    path: Path
    place: str
    value: Any

    def error(self, expected: str) -> WeightsError:
        """Return an error that names the file, the place, the value and what was expected."""
        place = f"{self.place} is " if self.place else "the content is "
        return damaged(self.path, f"{place}{shortened(self.value)}, but must be {expected}")

    def __contains__(self, key: str) -> bool:
        return key in self.mapping()

    def item(self, key: str) -> Entry:
        """Return the value of a key of this object."""
        if key not in self.mapping():
            raise damaged(self.path, f"{self._child(key)} is missing")
        return Entry(self.path, self._child(key), self.value[key])

    def mapping(self) -> dict[str, Any]:
        """Return the value, which must be an object."""
        if not isinstance(self.value, dict):
            raise self.error("an object with keys")
        return self.value

    def entries(self) -> dict[str, Entry]:
        """Return the values of an object as entries."""
        return {key: self.item(key) for key in self.mapping()}

    def items(self, lengths: Collection[int]) -> list[Entry]:
        """Return the values of a list that has one of these lengths."""
        if not isinstance(self.value, list) or len(self.value) not in lengths:
            longest, shortest = max(lengths), min(lengths)
            count = str(longest) if longest == shortest else f"{shortest} to {longest}"
            raise self.error(f"a list of {count} values")
        return [Entry(self.path, f"{self.place}[{n}]", value) for n, value in enumerate(self.value)]

    def text(self) -> str:
        """Return the value, which must be a string."""
        if not isinstance(self.value, str):
            raise self.error("a text")
        return self.value

    def flag(self) -> bool:
        """Return the value, which must be true or false."""
        if not isinstance(self.value, bool):
            raise self.error("true or false")
        return self.value

    def whole(self, low: int, high: int) -> int:
        """Return the value, which must be a whole number from ``low`` to ``high``."""
        if not _is_whole(self.value) or not low <= self.value <= high:
            raise self.error(f"a whole number from {low} to {high}")
        return int(self.value)

    def number(self, low: float, high: float) -> float:
        """Return the value, which must be a finite number from ``low`` to ``high``."""
        is_number = _is_whole(self.value) or isinstance(self.value, float)
        if not is_number or not low <= self.value <= high or not math.isfinite(self.value):
            raise self.error(f"a number from {low:g} to {high:g}")
        return float(self.value)

    def one_of(self, values: Collection[Any]) -> None:
        """Check that the value is one of these."""
        if self.value not in values:
            raise self.error(" or ".join(map(repr, values)))

    def _child(self, key: str) -> str:
        return f"{self.place}.{key}" if self.place else key


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def shortened(value: object) -> str:
    """Return a value in at most some 60 characters."""
    short = reprlib.Repr()
    short.maxlist = short.maxdict = 4
    short.maxstring = short.maxother = short.maxlong = 60
    return short.repr(value)


def damaged(path: Path, found: str) -> WeightsError:
    """Return an error about one of a model's files, with advice that fits the model's place.

    Parameters
    ----------
    path
        The file.
    found
        What is wrong with it, as a clause without a full stop.
    """
    return WeightsError(f"{path}: {found}. {advice(path)}")


def advice(path: Path) -> str:
    """Return what to do about a damaged or incomplete model."""
    if path.resolve().is_relative_to(upstream.weights_home().resolve()):
        return "Run 'totalfast weights verify' to find out which models are damaged."
    return "Copy the model again from the place where it was trained."


def read_json(path: Path) -> Entry:
    """Read one of a model's JSON files.

    Raises
    ------
    MissingModelError
        If there is no such file.
    WeightsError
        If it is unreadable, no JSON, too large, or nested too deeply.
    """
    if not os.path.isfile(path):  # noqa: PTH113 - False also for names that the system refuses
        raise MissingModelError(f"{path}: there is no such file. {advice(path)}")
    try:
        if path.stat().st_size > MAX_BYTES:
            raise damaged(path, f"it has more than {MAX_BYTES // 1_000_000} MB")
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, f"it can't be read: {error}") from error
    if _depth_exceeds(content, MAX_DEPTH):
        raise damaged(path, f"it is nested more than {MAX_DEPTH} levels deep")
    return Entry(path, "", content)


def _depth_exceeds(content: object, limit: int) -> bool:
    level = [content]
    for _ in range(limit + 1):
        containers = [value for value in level if isinstance(value, dict | list)]
        level = [
            child
            for value in containers
            for child in (value.values() if isinstance(value, dict) else value)
        ]
        if not level:
            return False
    return True
