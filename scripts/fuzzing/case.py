"""What a kind of input offers to the loop: damaged inputs, and how they are read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import random

PATIENT = ("NOBODY", "NEMO")
"""Parts of the patient's name in all inputs; no message may hold them."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A damaged input.

    Parameters
    ----------
    source
        What is read: a path, an open file, or anything else that the kind's ``read`` takes.
    note
        The damage in a few words.
    expected
        What ``read`` must return if it returns at all; None if that is not known.
    must_read
        Whether the damage has no effect, so that the input must not be refused.
    """

    source: Any
    note: str
    expected: Any = None
    must_read: bool = False


@dataclass(frozen=True, kw_only=True)
class Place:
    """Folders of one process of the fuzzer.

    Parameters
    ----------
    root
        Holds only ``inside``; anything else in it was written by a damaged input.
    inside
        Holds ``work`` and ``temporary``.
    work
        The damaged inputs, and the results.
    temporary
        ``tempfile``'s folder; must be empty after each case.
    """

    root: Path
    inside: Path
    work: Path
    temporary: Path

    @classmethod
    def below(cls, root: Path) -> Place:
        """Create the folders."""
        inside = root / "inside"
        place = cls(root=root, inside=inside, work=inside / "work", temporary=inside / "temporary")
        for folder in (place.work, place.temporary):
            folder.mkdir(parents=True)
        return place


class WrongResultError(Exception):
    """An input was read, but what was read contradicts itself or the undamaged input."""


class Kind(Protocol):
    """A kind of input.

    Attributes
    ----------
    slack_mb
        Memory that a case may need at most, beside what the process has before it. The inputs have
        some kilobytes, and their headers can promise at most a thousand times as much.
    """

    slack_mb: int

    def __init__(self, place: Place) -> None: ...

    def damage(self, chance: random.Random) -> Case:
        """Write a damaged input."""

    def read(self, case: Case) -> Any:
        """Read it with totalfast, and raise ``WrongResultError`` if the result can't be right."""

    def equal(self, result: Any, expected: Any) -> bool:
        """Compare a result with the expected one."""
