"""Converted networks on disk: found by content, whole or not at all, never trusted blindly.

Knows files and hashes; knows nothing of OpenVINO. An entry is a folder that is named by a hash of
all that it was made from and holds a description, its weights, and the checksums of both. None of
it is code.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import nn

logger = logging.getLogger(__name__)

FOLDER_VARIABLE = "TOTALFAST_CACHE_DIR"
"""Environment variable with the folder to use instead of the user's cache."""

SUMS = "checksums.json"
CHUNK = 1 << 24
"""Bytes that are read at a time."""


def cache_folder() -> Path:
    """Where this user's programs keep what they can make again."""
    named = os.environ.get(FOLDER_VARIABLE)
    if named:
        return Path(named).absolute()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library/Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "totalfast"


def content_key(network: nn.Module, made_with: Mapping[str, object]) -> str:
    """Hash a network's layers and weights, and whatever else decides what is made from them.

    Parameters
    ----------
    network
        On the CPU.
    made_with
        Names and values, such as versions and the shape of a tile; their ``repr`` counts.

    Returns
    -------
        Hexadecimal SHA-256.
    """
    import torch

    digest = hashlib.sha256()
    digest.update(repr((network, sorted(made_with.items()))).encode())
    for name, tensor in network.state_dict().items():
        digest.update(repr((name, tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def entry(key: str, make: Callable[[Path], None]) -> Path | None:
    """Return the folder of an entry; what is missing or damaged is made anew.

    Parameters
    ----------
    key
        The entry's name.
    make
        Writes the entry's files into a folder that it is given; called if there is no sound entry.

    Returns
    -------
        The folder, or None if nothing can be written to the cache. It must be left as it is: other
        processes may read it.
    """
    place = cache_folder() / key
    if _is_sound(place):
        return place
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent, prefix=".new-") as folder:
            new = Path(folder) / "entry"
            new.mkdir()
            make(new)
            (new / SUMS).write_text(json.dumps({p.name: _sum(p) for p in new.iterdir()}))
            if place.exists() and not _is_sound(place):
                shutil.rmtree(place)
            if not place.exists():
                new.rename(place)
    except OSError as error:
        # Another process may have been faster.
        if not _is_sound(place):
            logger.info("Converted models can't be kept in %s: %s", place.parent, error)
            return None
    return place


def _is_sound(place: Path) -> bool:
    """Whether an entry is there and its files are what was written."""
    try:
        sums: dict[str, int] = json.loads((place / SUMS).read_text())
        return all(_sum(place / name) == value for name, value in sums.items())
    except (OSError, ValueError, AttributeError):
        return False


def _sum(path: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            value = zlib.crc32(chunk, value)
    return value
