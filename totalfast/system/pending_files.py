"""Files that appear completely or not at all."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from totalfast.errors import OutputError

if TYPE_CHECKING:
    from types import TracebackType


class PendingFiles:
    """Files that are written beside their targets and renamed together at the end.

    A context manager: it renames the files on a normal exit, and removes them after an exception.

    Raises
    ------
    OutputError
        If the operating system can't write a file.
    """

    def __init__(self) -> None:
        self._parts: list[tuple[Path, Path]] = []

    def path(self, target: Path, *, ending: str = "") -> Path:
        """Register a target, create its folder, and return the path to write to.

        The path keeps the target's ``ending``, for writers that depend on it.
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
