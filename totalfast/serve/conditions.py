"""What must be equal in client and server, so that a run is the same in both."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING

from totalfast import about, upstream
from totalfast.serve.places import SERVER_VARIABLE

if TYPE_CHECKING:
    from collections.abc import Mapping

PROTOCOL = 1
"""Version of the frames' meaning."""

PREFIXES = ("TOTALFAST_", "TOTALSEG_", "nnUNet_")
NAMES = ("HOME", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "USERPROFILE")
"""Environment variables that change what a run does or which models it finds."""

CREDENTIALS_PREFIX = "TOTALFAST_DICOMWEB_"
"""Of environment variables with passwords for ``--dicomweb``, which are never sent."""


def conditions() -> dict[str, str]:
    """Return what a run depends on beside its flags and its files: name to value.

    Versions, the Python environment, environment variables, the umask, and the view of the file
    system, which containers have of their own. Call it before threads are started, because reading
    the umask sets it for a moment.
    """
    found = {
        "the protocol": str(PROTOCOL),
        "the version of totalfast": about.version(),
        "the version of TotalSegmentator": upstream.version(),
        "the Python environment": sys.prefix,
        "the umask": f"{_umask():03o}",
    }
    with contextlib.suppress(OSError):
        found["the view of the file system"] = os.readlink("/proc/self/ns/mnt")  # noqa: PTH115
    return found | {
        name: value
        for name, value in os.environ.items()
        if (name.startswith(PREFIXES) or name in NAMES)
        and name != SERVER_VARIABLE
        and not name.startswith(CREDENTIALS_PREFIX)
    }


def differing(client: Mapping[str, str], server: Mapping[str, str]) -> list[str]:
    """Return the names of the conditions whose values differ, or that only one of the two has."""
    return sorted(name for name in {*client, *server} if client.get(name) != server.get(name))


def _umask() -> int:
    umask = os.umask(0o077)
    os.umask(umask)
    return umask
