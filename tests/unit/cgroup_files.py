"""Files like those in which Linux describes a process's cgroups."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def write_cgroups(folder: Path, line: str, files: Mapping[str, str]) -> None:
    """Write ``folder/cgroup``, the process's membership, and the files below ``folder/sys``."""
    for name, content in files.items():
        path = folder / "sys" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
    (folder / "cgroup").write_text(line + "\n")
