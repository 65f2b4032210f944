"""Resident memory of the mapped files of this process, from Linux's smaps."""

from __future__ import annotations

from pathlib import Path


def resident_kb(folder: Path) -> int:
    """Return the resident kilobytes of files below a folder that are mapped read-only."""
    total, counted = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *words = line.split(maxsplit=5)
        if not name.endswith(":"):  # addresses, permissions, three other fields, file
            counted = words[0].startswith("r-") and words[-1].startswith(f"{folder}/")
        elif name == "Rss:" and counted:
            total += int(words[0])
    return total
