"""Which cases wait for an actor, and how often each was tried. It does not know Ray."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from totalfast.batch.finding.cases import Case


@dataclass(frozen=True, slots=True, kw_only=True)
class Try:
    """One attempt of a case.

    Parameters
    ----------
    case
        The case.
    attempt
        Its number, from 1.
    is_alone
        Its process works on no other case, because the one before ended without a result. If this
        one ends, too, no other case is blamed.
    """

    case: Case
    attempt: int = 1
    is_alone: bool = False


class WaitingCases:
    """The cases of a batch that are not in work.

    Parameters
    ----------
    cases
        Each case once.
    retries
        How often a case is tried again.
    """

    def __init__(self, cases: Iterable[Case], retries: int) -> None:
        self._together = deque(Try(case=case) for case in cases)
        self._alone: deque[Try] = deque()
        self._retries = retries

    def __len__(self) -> int:
        return len(self._together) + len(self._alone)

    def take(self, in_work: Collection[Try]) -> Try | None:
        """Take the next case for a process; those whose process ended come last.

        Parameters
        ----------
        in_work
            What the process works on.
        """
        if any(other.is_alone for other in in_work):
            return None
        if self._together:
            return self._together.popleft()
        return self._alone.popleft() if self._alone and not in_work else None

    def failed(self, attempt: Try) -> bool:
        """Put a case back that failed; False if that was its last attempt."""
        if attempt.attempt > self._retries:
            return False
        self._together.append(Try(case=attempt.case, attempt=attempt.attempt + 1))
        return True

    def lost(self, attempt: Try) -> bool:
        """Put a case back whose process ended; False if that was its last attempt."""
        if attempt.attempt > self._retries:
            return False
        self._alone.append(Try(case=attempt.case, attempt=attempt.attempt + 1, is_alone=True))
        return True

    def drain(self) -> list[Try]:
        """Take all that is left."""
        left = [*self._together, *self._alone]
        self._together.clear()
        self._alone.clear()
        return left
