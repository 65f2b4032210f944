"""Names of cases: safe as file names on Linux, macOS and Windows, and each one different.

Names are texts here; which file or series a case is, is not known.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

LONGEST = 100
"""Letters of a name."""

LONGEST_BYTES = 180
"""Bytes of a name in UTF-8. File names have at most 255 on Linux, and endings are added."""

HASH_LETTERS = 8
"""Hexadecimal digits that replace the end of a longer name."""

WINDOWS_DEVICES = frozenset(
    {"con", "prn", "aux", "nul"}
    | {f"{port}{digit}" for port in ("com", "lpt") for digit in "0123456789\u00b9\u00b2\u00b3"}
)
"""Names that Windows gives to devices, also if an ending follows."""

OWN_STARTS = ("manifest.", "manifest-", "statistics.", "report.", "totalfast-")
"""Starts of the names of a batch's own files."""

LEFT_OVER = "case"
"""Start of a name from which nothing else is left, or that is reserved."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """Names that a case could have.

    Parameters
    ----------
    candidates
        The best name first; the others tell it apart from cases with the same name.
    order
        What sorts cases whose candidates are all the same; they get numbers.
    """

    candidates: tuple[str, ...]
    order: str


def safe_name(text: str) -> str:
    """Turn a text into a file name without folders.

    Letters and digits of all scripts, ``.``, ``-`` and ``_`` are kept. A name that is too long ends
    with a hash of the text.
    """
    composed = unicodedata.normalize("NFC", text)
    name = "".join(each if _is_kept(each) else "_" for each in composed)
    name = name.lstrip(".-").rstrip(".")
    if not name.strip("_"):
        name = f"{LEFT_OVER}{name}"
    folded = folded_name(name)
    if folded.split(".", 1)[0].rstrip("_") in WINDOWS_DEVICES or folded.startswith(OWN_STARTS):
        name = f"{LEFT_OVER}_{name}"
    if _fits(name):
        return name
    digest = hashlib.sha256(composed.encode("utf-8", "surrogatepass")).hexdigest()[:HASH_LETTERS]
    return _with_ending(name, f"_{digest}")


def folded_name(name: str) -> str:
    """Return a text that is the same for two names of one file on any file system."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def unique_names(wishes: Sequence[Wish], *, taken: Iterable[str] = ()) -> list[str]:
    """Choose a name for each case.

    Cases with the same name all get their next candidate, so that the names do not depend on the
    order of the cases. A further case changes the names of others only if it has one of them.

    Parameters
    ----------
    wishes
        One for each case.
    taken
        Names of other cases.

    Returns
    -------
        One name for each case.
    """
    reserved = {folded_name(name) for name in taken}
    candidates = [tuple(map(safe_name, wish.candidates)) for wish in wishes]
    level = [0] * len(wishes)
    while True:
        groups = _groups(candidates, level)
        settled = True
        for folded, members in groups.items():
            if len(members) == 1 and folded not in reserved:
                continue
            for index in members:
                if level[index] + 1 < len(candidates[index]):
                    level[index] += 1
                    settled = False
        if settled:
            break
    names = [each[chosen] for each, chosen in zip(candidates, level, strict=True)]
    for members in groups.values():
        if len(members) > 1:  # no candidate tells them apart; the shortest one is enough
            for index in members:
                names[index] = candidates[index][0]
    _number(names, groups, wishes, reserved)
    return names


def _groups(candidates: Sequence[tuple[str, ...]], level: Sequence[int]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = defaultdict(list)
    for index, each in enumerate(candidates):
        groups[folded_name(each[level[index]])].append(index)
    return groups


def _number(
    names: list[str],
    groups: Mapping[str, Sequence[int]],
    wishes: Sequence[Wish],
    reserved: set[str],
) -> None:
    """Add numbers, in place, to names that are still the same."""
    alone = {folded for folded, members in groups.items() if len(members) == 1} - reserved
    used = reserved | alone
    for folded in sorted(groups.keys() - alone):
        for index in sorted(groups[folded], key=lambda index: (wishes[index].order, names[index])):
            name, number = names[index], 1
            while folded_name(name) in used:
                number += 1
                name = _with_ending(names[index], f"_{number}")
            used.add(folded_name(name))
            names[index] = name


def _is_kept(letter: str) -> bool:
    return letter in ".-_" or unicodedata.category(letter)[0] in "LNM"


def _fits(name: str) -> bool:
    return len(name) <= LONGEST and len(name.encode()) <= LONGEST_BYTES


def _with_ending(name: str, ending: str) -> str:
    """Add an ending; a name that gets too long is cut off before it."""
    start = name
    while not _fits(start + ending):
        start = start[:-1]
    return start + ending
