"""Tell the viewer Nora of files that were written.

Knows file names and tags; knows nothing of what is in the files.
"""

from __future__ import annotations

import logging
import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

logger = logging.getLogger(__name__)

NORA = "/opt/nora/src/node/nora"
"""Nora's program, where TotalSegmentator 2.18.0 looks for it too."""

ATLAS, MASK = "atlas", "mask"
"""Nora's words for a label map and for a mask."""


def add_to_nora(paths: Sequence[Path], *, tag: str, kind: str) -> None:
    """Add files to a project of Nora's, one by one.

    Parameters
    ----------
    paths
        Files, which exist already.
    tag
        The project.
    kind
        ``ATLAS`` or ``MASK``.

    Notes
    -----
    A Nora that is missing or fails costs a warning only, as the files are there all the same.
    Upstream starts it through a shell, which reads a tag or a path as code; here none is.
    """
    for path in paths:
        command = [NORA, "-p", tag, "--add", str(path), "--addtag", kind]
        try:
            code = subprocess.run(command, check=False).returncode  # noqa: S603 - no shell
        except OSError as error:
            logger.warning("WARNING: Nora can't be started, files are not added to it: %s", error)
            return
        if code:
            logger.warning("WARNING: Nora returned %d for %s.", code, path)
