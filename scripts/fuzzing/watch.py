"""What a case may not do: write elsewhere, start programs, connect, import, need memory or time.

Python's audit events tell each act before it happens (PEP 578); a forbidden one is stopped.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fuzzing.case import PATIENT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fuzzing.case import Place

CALLS = {
    *("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty"),
    *("subprocess.Popen", "socket.connect", "socket.bind", "socket.getaddrinfo"),
    *("socket.gethostbyname", "socket.sendto", "pickle.find_class"),
}
"""Events that no damaged input may cause."""

CHANGES = {
    *("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink"),
    *("os.truncate", "os.chmod", "os.chown", "os.utime"),
}
"""Events that change a path."""

DIRECTORY_ARGUMENT = {
    "os.mkdir": 2,
    "os.remove": 1,
    "os.rmdir": 1,
    "os.rename": 2,
    "os.chmod": 2,
    "os.chown": 3,
    "os.utime": 3,
    "os.link": 3,
    "os.symlink": 2,
}
"""Place of the open folder among an event's arguments, that its path is relative to."""

IMPORTS = (
    *("acvl_utils.", "batchgenerators.", "dynamic_network_architectures.", "nnunetv2."),
    *("nibabel.", "numba", "numpy.", "PIL.", "pydicom.", "scipy.", "skimage.", "torch."),
    *("_strptime", "encodings.", "stringprep", "totalfast.", "traceback", "unicodedata"),
)
"""Modules that may be imported while a damaged input is read: totalfast's own, nnU-Net's known
parts, and parts that libraries import late."""

WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class ForbiddenError(BaseException):
    """Stops a forbidden act; no code under test catches it."""


class TooLateError(BaseException):
    """Ends a case that takes too long."""


class Watch:
    """Observes the process while a case is read, and collects what it must not do.

    Parameters
    ----------
    place
        Folders that may be changed.
    seconds
        Time that a case may take.
    """

    def __init__(self, place: Place, seconds: float) -> None:
        self.findings: list[str] = []
        self.seconds = seconds
        self._place = place
        self._inside = f"{os.path.realpath(place.inside)}{os.sep}"
        self._is_on = False
        self._log = _Lines()
        logger = logging.getLogger("totalfast")
        logger.addHandler(self._log)
        logger.propagate = False
        logger.setLevel(logging.INFO)
        signal.signal(signal.SIGALRM, _end)
        sys.addaudithook(self._on_event)

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """Observe the context."""
        self._log.lines.clear()
        signal.setitimer(signal.ITIMER_REAL, self.seconds)
        self._is_on = True
        try:
            yield
        finally:
            self._is_on = False
            signal.setitimer(signal.ITIMER_REAL, 0)

    def check_files(self) -> None:
        """Find files beside the folders, and temporary files that were left."""
        for folder, expected in (
            (self._place.root, {"inside"}),
            (self._place.inside, {"work", "temporary"}),
            (self._place.temporary, set()),
        ):
            if more := {path.name for path in folder.iterdir()} - expected:
                self.findings.append(f"left {sorted(more)} in {folder.name or folder}")

    def check_messages(self, error: str | None) -> None:
        """Find errors of several lines, and messages that hold the patient's name."""
        if error is not None and (len(error.splitlines()) != 1 or not error.strip()):
            self.findings.append(f"an error of {len(error.splitlines())} lines: {error!r}")
        for text in [error or "", *self._log.lines]:
            if any(part in text.upper() for part in PATIENT):
                self.findings.append(f"the patient's name in a message: {text!r}")

    def _on_event(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._is_on:
            return
        reason = None
        if event == "open":
            path, mode, flags = arguments
            writes = (flags or 0) & WRITE_FLAGS or set(mode or "") & set("wax+")
            if writes and self._is_outside(path):
                reason = f"opened {path} for writing"
        elif event == "import":
            if not str(arguments[0]).startswith(IMPORTS):
                reason = f"imported {arguments[0]}"
        elif event in CALLS or (event in CHANGES and self._is_outside(*_place(event, arguments))):
            reason = f"{event} {arguments!r:.200}"
        if reason is not None:
            self.findings.append(reason)
            raise ForbiddenError(reason)

    def _is_outside(self, path: Any, folder: int = -1) -> bool:
        """Whether a path, which may be relative to an open folder, is outside of the place.

        Python and numba keep compiled code in folders ``__pycache__``; those are left out.
        """
        if isinstance(path, int):
            return False
        base = Path(f"/proc/self/fd/{folder}").readlink() if folder >= 0 else Path.cwd()
        target = base / os.fsdecode(path)
        whole = str(target.parent.resolve() / target.name)
        if whole == os.devnull or "__pycache__" in whole:
            return False
        return not whole.startswith(self._inside)


def _place(event: str, arguments: tuple[Any, ...]) -> tuple[Any, int]:
    """The path that an event changes, and the open folder that it is relative to, or -1."""
    path = arguments[1] if event in ("os.link", "os.symlink") else arguments[0]
    at = DIRECTORY_ARGUMENT.get(event)
    return path, arguments[at] if at is not None else -1


class _Lines(logging.Handler):
    """Keeps the lines of the log."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _end(*_: object) -> None:
    raise TooLateError


def reset_peak() -> int:
    """Start a new measurement of the peak memory; return the memory now, in bytes."""
    with open("/proc/self/clear_refs", "w") as file:  # noqa: PTH123 - three times faster
        file.write("5")
    return _status_bytes("VmRSS:")


def peak() -> int:
    """Peak memory since ``reset_peak``, in bytes."""
    return _status_bytes("VmHWM:")


def _status_bytes(name: str) -> int:
    with open("/proc/self/status") as file:  # noqa: PTH123 - three times faster
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(name))
