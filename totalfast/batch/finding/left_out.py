"""What a search for cases leaves out: how many files or series for each reason, with examples."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from totalfast.batch.remote.place import Place

EXAMPLES = 3
"""Paths that are kept for each reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """Files, folders or series that are no cases, for one reason.

    Parameters
    ----------
    reason
        Without values of DICOM headers, for example "not DICOM" or "series with fewer than 4
        slices".
    count
        Number of them.
    examples
        Paths of the first ones. That of a member of a zip file starts with the zip file's.
    """

    reason: str
    count: int
    examples: tuple[Place, ...]

    def __str__(self) -> str:
        return f"{self.count} x {self.reason} (for example {self.examples[0]})"


class Counted:
    """Counts what is left out while cases are searched for."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._examples: dict[str, list[Place]] = defaultdict(list)

    def add(self, reason: str, path: Place) -> None:
        """Count a file, a folder or a series."""
        self._counts[reason] += 1
        if len(self._examples[reason]) < EXAMPLES:
            self._examples[reason].append(path)

    def result(self) -> tuple[LeftOut, ...]:
        """All reasons, the most frequent first."""
        return tuple(
            LeftOut(reason=reason, count=count, examples=tuple(self._examples[reason]))
            for reason, count in sorted(self._counts.items(), key=lambda item: (-item[1], item[0]))
        )
