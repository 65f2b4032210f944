"""The process's cgroups, which limit memory and CPU time in containers and batch jobs (Linux)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

MEMBERSHIP = Path("/proc/self/cgroup")
MOUNTED = Path("/sys/fs/cgroup")


class Cgroup(NamedTuple):
    """One cgroup."""

    folder: Path
    """The folder of its files. It may not exist."""
    version: int
    """1 or 2: the two versions have different files."""


def own_cgroups(controller: str, membership: Path, mounted: Path) -> Iterator[Cgroup]:
    """Yield the process's cgroups of a controller, from its own to the root.

    Parameters
    ----------
    controller
        Name in version 1, for example "memory" or "cpu". Version 2 has one tree for all.
    membership
        File that lists the process's cgroups, normally ``MEMBERSHIP``. Without it nothing is
        yielded.
    mounted
        Folder of the cgroup file systems, normally ``MOUNTED``.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, version = mounted, 2
        elif controller in controllers.split(","):
            root, version = mounted / controller, 1
        else:
            continue
        # In a container the path is often the host's, and only the root folder is visible.
        own = root / path.lstrip("/")
        for folder in (own, *own.parents):
            yield Cgroup(folder, version)
            if folder == root:
                break


def read_words(path: Path) -> list[list[str]]:
    """Return the words of each line of a file that has any; nothing if it can't be read."""
    try:
        return [line.split() for line in path.read_text().splitlines() if line.strip()]
    except OSError:
        return []
