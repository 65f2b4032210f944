"""Add output files to a project in the viewer Nora."""

from __future__ import annotations

import logging
import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

logger = logging.getLogger(__name__)

NORA = "/opt/nora/src/node/nora"
"""Nora's program, at the path that TotalSegmentator 2.18.0 uses too."""

ATLAS, MASK = "atlas", "mask"
"""Nora's tags for a label map and for a mask."""


def add_to_nora(paths: Sequence[Path], *, tag: str, kind: str) -> None:
    """Add files to one of Nora's projects, one by one.

    Parameters
    ----------
    paths
        Existing files.
    tag
        Name of the project.
    kind
        ``ATLAS`` or ``MASK``.

    Notes
    -----
    If Nora is missing or fails, only a warning is logged, because the files are already written.
    Upstream starts Nora through a shell, which would run code in a tag or a path. Here no shell is
    used.
    """
    for path in paths:
        command = [NORA, "-p", tag, "--add", str(path), "--addtag", kind]
        try:
            code = subprocess.run(command, check=False).returncode  # noqa: S603 - no shell
        except OSError as error:
            logger.warning("WARNING: Nora can't be started, so no file was added: %s", error)
            return
        if code:
            logger.warning("WARNING: Nora returned %d for %s.", code, path)
