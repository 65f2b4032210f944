"""What to do about errors that are not totalfast's own, and the text of a bug report."""

from __future__ import annotations

import argparse
import platform
import re
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from totalfast.about import versions

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGES = ("totalfast", "TotalSegmentator", "nnunetv2", "torch", "openvino", "numpy", "nibabel")
"""Packages whose versions a bug report lists."""


class _Case(NamedTuple):
    """A kind of error, by its type's name or by its message, and what to do about it."""

    kind: str
    """Regular expression for the names of the error's classes."""
    message: str
    """Regular expression for its message."""
    advice: str


_CASES = (
    _Case(
        "MemoryError",
        "",
        "The computer has too little free memory. Close other programs, or use a smaller model or "
        "part of the scan (--fast, --force_split).",
    ),
    _Case(
        "OutOfMemoryError",
        "",
        "The GPU has too little free memory. Close other programs on the GPU, use a smaller model "
        "or part of the scan (--fast, --force_split), or use the CPU.",
    ),
    _Case(
        "",
        "no kernel image is available",
        "The installed torch was not built for this GPU. Install a build of torch that supports "
        "it, or use the CPU.",
    ),
    _Case(
        "",
        "driver version is insufficient|no NVIDIA driver|CUDA driver",
        "The NVIDIA driver and the installed torch do not fit together. Update the driver, install "
        "a build of torch for it, or use the CPU.",
    ),
    _Case(
        "",
        r"CUDA error|cuDNN|CUBLAS|device-side assert|\bNCCL\b",
        "The GPU or its driver failed. Run the command again, or use the CPU.",
    ),
    _Case(
        "",
        r"\bMPS\b",
        "The MPS device failed. Use the CPU.",
    ),
    _Case(
        "OSError",
        "No space left on device|Disk quota exceeded",
        "Free some space on this disk; TMPDIR sets another folder for temporary files.",
    ),
    _Case(
        "PermissionError",
        "",
        "Check the rights of this file and its folder.",
    ),
    _Case(
        "OSError",
        "Too many open files",
        "Raise the limit of open files, for example with 'ulimit -n 4096'.",
    ),
    _Case(
        "ImportError",
        "",
        "A package is missing or damaged; install totalfast again in a new environment.",
    ),
)
"""The first case that fits is used."""


def explain(error: Exception) -> str | None:
    """Return an error's type, the first line of its message and what to do; None if unknown."""
    advice = advice_for(error)
    if advice is None:
        return None
    first = str(error).strip().partition("\n")[0].rstrip(".")[:300]
    name = type(error).__name__
    return f"{name}: {first}. {advice}" if first else f"{name}. {advice}"


def advice_for(error: Exception) -> str | None:
    """Return a sentence about what to do; None if the error is not a known kind."""
    kinds = [kind.__name__ for kind in type(error).__mro__]
    for case in _CASES:
        fits = not case.kind or case.kind in kinds
        if fits and re.search(case.message, str(error), re.IGNORECASE):
            return case.advice
    return None


def report_of(error: Exception, args: argparse.Namespace) -> str:
    """Return a bug report: versions, device, flags, and where the error was raised.

    It has no patient data: no paths, no values of the user's own flags, and no message of the
    error, which may quote a file's content.
    """
    lines = [
        "totalfast stopped at an unexpected error. A bug report needs these lines:",
        f"  {', '.join(f'{name} {number}' for name, number in versions(*PACKAGES).items())}",
        f"  Python {platform.python_version()}, {platform.platform()}, {_device()}",
        f"  flags: {' '.join(_flags(args)) or 'none'}",
        f"  {type(error).__name__} at {' < '.join(_places(error))}",
    ]
    return "\n".join(lines)


def _device() -> str:
    # Not imported for this, because it takes seconds; a thread may be importing it.
    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    try:
        if cuda is not None and cuda.is_available():
            return str(cuda.get_device_name())
    except (AttributeError, RuntimeError):
        return "GPU not readable"
    return "no GPU"


def _flags(args: argparse.Namespace) -> Iterator[str]:
    """Flags that are on, and values that can't be names of patients."""
    for name, value in sorted(vars(args).items()):
        if name == "words":  # the command line
            continue
        if value is True or isinstance(value, Path | list):
            yield name
        elif name in ("task", "device", "backend", "export"):
            yield f"{name}={value}"


def _places(error: Exception) -> list[str]:
    """Functions and lines from the innermost call outwards; a few are enough."""
    frames = traceback.extract_tb(error.__traceback__)[::-1]
    inner = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames]
    return inner[:8]
