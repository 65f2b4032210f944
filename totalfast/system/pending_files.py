"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from totalfast.errors import OutputError

if TYPE_CHECKING:
    from types import TracebackType


class PendingFiles:
    """Files that are written beside their targets and renamed together at the end.

    Used as a context manager: leaving it normally renames, leaving it by an exception removes.
    """

    def __init__(self) -> None:
        self._parts: list[tuple[Path, Path]] = []

    def path(self, target: Path, *, ending: str = "") -> Path:
        """Register a target, make its folder, and return the path to write to.

        It keeps the ``ending`` of the target, for writers that go by it.
        """
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f"{target.name.removesuffix(ending)}.part{ending}")
        self._parts.append((part, target))
        return part

    def __enter__(self) -> PendingFiles:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                for part, target in self._parts:
                    part.replace(target)
        finally:
            for part, _ in self._parts:
                with contextlib.suppress(OSError):
                    part.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OutputError(f"can't write {error.filename or 'the result'}: {error}") from error
