"""Converted networks on disk: found by content, written completely or not at all, and checked.

An entry is a folder. Its name is a hash of everything that determines its content. It holds a
description, its weights, and checksums of both; none of it is code. Does not import OpenVINO.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import zlib
from typing import TYPE_CHECKING

from totalfast.system.cache_entries import (
    mark_used,
    prune,
    remove,
    remove_leftovers,
    unfinished_entry,
)
from totalfast.system.cache_folder import distrust, usable_cache

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping
    from pathlib import Path

    from torch import nn

logger = logging.getLogger(__name__)

PREFIX = "openvino-"
"""Start of the names of entries."""

CHECKSUMS = "checksums.json"
CHUNK = 1 << 24
"""Number of bytes that are read at a time."""


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


def cached_folder(key: str, files: Collection[str], write: Callable[[Path], None]) -> Path | None:
    """Return the folder of an entry; a missing, damaged or foreign entry is written again.

    Parameters
    ----------
    key
        The entry's name, which starts with ``PREFIX``.
    files
        Names of the entry's files.
    write
        Writes these files into the folder that it receives; called if there is no intact entry.

    Returns
    -------
        The folder, or None if the cache can't be used. Do not change the folder: other processes
        may read it, or remove it at any time.
    """
    cache = usable_cache()
    if cache is None:
        return None
    remove_leftovers(cache)
    folder = cache / key
    mark_used(folder)  # first, so that no other process prunes it meanwhile
    if _is_intact(folder, files):
        return folder
    try:
        with unfinished_entry(cache) as new:
            write(new)
            checksums = {name: _checksum(new / name) for name in files}
            (new / CHECKSUMS).write_text(json.dumps(checksums))
            if not _is_intact(folder, files):
                remove(folder)
            if not os.path.lexists(folder):
                new.rename(folder)
    except OSError as error:
        # Another process may have written the entry meanwhile.
        if not _is_intact(folder, files):
            logger.info("Converted models can't be kept in %s: %s", cache, error)
            return None
    prune(cache, PREFIX, keep=folder)
    return folder


def _is_intact(folder: Path, files: Collection[str]) -> bool:
    """Whether an entry exists, nobody else can have written it, and its files are complete."""
    try:
        if distrust(folder):
            return False
        checksums = json.loads((folder / CHECKSUMS).read_text())
        return isinstance(checksums, dict) and checksums == {
            name: _checksum(folder / name) for name in files
        }
    except (OSError, ValueError):
        return False


def _checksum(path: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            value = zlib.crc32(chunk, value)
    return value
