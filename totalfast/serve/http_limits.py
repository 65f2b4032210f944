"""What clients of the HTTP side may do: which paths they may name, sizes, times."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from totalfast.errors import TotalfastError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping


class OutsideError(TotalfastError):
    """A path lies outside of the folders that the server may use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpLimits:
    """What clients may do.

    Parameters
    ----------
    roots
        Folders in which clients may name inputs and outputs; none allows uploads only.
    upload_bytes
        Maximum size of an upload, or of a series that is fetched.
    stored_bytes
        Maximum size of all uploads, fetched series and results together.
    free_bytes
        Bytes of the disk that stay free.
    run_s
        Maximum seconds of a run, its waiting and its transfers included; None for no limit.
    keep_s
        Seconds for which a run that has ended, and its uploaded and written files, are kept; None
        keeps them as long as the server lives.
    """

    roots: tuple[Path, ...] = ()
    upload_bytes: int = 4 << 30
    stored_bytes: int = 50 << 30
    free_bytes: int = 1 << 30
    run_s: float | None = 3600.0
    keep_s: float | None = 3600.0

    def check(self, path: Path) -> Path:
        """Check that a path lies in one of the roots; return it without symbolic links.

        Raises
        ------
        OutsideError
            If it does not.
        """
        place = path.resolve()
        if not any(place.is_relative_to(root.resolve()) for root in self.roots):
            raise OutsideError(f"{path} is outside of the folders that this server may use.")
        return place

    def check_again(self, paths: Mapping[str, str], own: Collection[str]) -> dict[str, str]:
        """Check the paths of a run that begins: links may have changed since it was submitted.

        Parameters
        ----------
        paths
            Argument to path.
        own
            Arguments whose paths are in the run's private folder.

        Returns
        -------
            The paths without symbolic links.

        Raises
        ------
        OutsideError
            If a path, or a link within the input's folder, leads out of the roots.
        """
        resolved = dict(paths)
        for name in paths.keys() - own:
            resolved[name] = str(self.check(Path(paths[name])))
        if "input" not in own:
            for folder, folders, files in os.walk(resolved["input"]):
                for name in (*folders, *files):
                    if (path := Path(folder, name)).is_symlink():
                        self.check(path)
        return resolved
