"""Converted networks on disk: found by content, written completely or not at all, and checked.

An entry is a folder. Its name is a hash of everything that determines its content. It holds a
description, its weights, and checksums of both; none of it is code. Does not import OpenVINO.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import platformdirs

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import nn

logger = logging.getLogger(__name__)

FOLDER_VARIABLE = "TOTALFAST_CACHE_DIR"
"""Environment variable with a folder to use instead of the user's cache."""

CHECKSUMS = "checksums.json"
CHUNK = 1 << 24
"""Number of bytes that are read at a time."""


def cache_folder() -> Path:
    """Return the folder for files that can be created again."""
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder:
        return Path(folder).absolute()
    return platformdirs.user_cache_path("totalfast", appauthor=False)


def content_key(network: nn.Module, settings: Mapping[str, object]) -> str:
    """Hash a network's layers and weights, and everything else that determines an entry.

    Parameters
    ----------
    network
        On the CPU.
    settings
        Names and values, such as versions and the shape of a tile; the ``repr`` of each counts.

    Returns
    -------
        Hexadecimal SHA-256.
    """
    import torch

    digest = hashlib.sha256()
    digest.update(repr((network, sorted(settings.items()))).encode())
    for name, tensor in network.state_dict().items():
        digest.update(repr((name, tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def cached_folder(key: str, write: Callable[[Path], None]) -> Path | None:
    """Return the folder of an entry; a missing or damaged entry is written again.

    Parameters
    ----------
    key
        The entry's name.
    write
        Writes the entry's files into the folder that it receives; called if there is no intact
        entry.

    Returns
    -------
        The folder, or None if the cache can't be written to. Do not change the folder: other
        processes may read it.
    """
    folder = cache_folder() / key
    if _is_intact(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".new-") as temporary:
            new = Path(temporary) / "entry"
            new.mkdir()
            write(new)
            checksums = {path.name: _checksum(path) for path in new.iterdir()}
            (new / CHECKSUMS).write_text(json.dumps(checksums))
            if folder.exists() and not _is_intact(folder):
                shutil.rmtree(folder)
            if not folder.exists():
                new.rename(folder)
    except OSError as error:
        # Another process may have written the entry meanwhile.
        if not _is_intact(folder):
            logger.info("Converted models can't be kept in %s: %s", folder.parent, error)
            return None
    return folder


def _is_intact(folder: Path) -> bool:
    """Whether an entry exists and its files have their checksums."""
    try:
        checksums: dict[str, int] = json.loads((folder / CHECKSUMS).read_text())
        return all(_checksum(folder / name) == value for name, value in checksums.items())
    except (OSError, ValueError, AttributeError):
        return False


def _checksum(path: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            value = zlib.crc32(chunk, value)
    return value
