"""What mapped files take of this process's memory, as Linux says."""

from __future__ import annotations

from pathlib import Path


def resident_kb(folder: Path) -> int:
    """Kilobytes of files below a folder, mapped for reading only, that are in memory."""
    total, counted = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *words = line.split(maxsplit=5)
        if not name.endswith(":"):  # a mapping: addresses, rights, three more, file
            counted = words[0].startswith("r-") and words[-1].startswith(f"{folder}/")
        elif name == "Rss:" and counted:
            total += int(words[0])
    return total
