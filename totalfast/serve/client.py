"""Hand one run to a server: connect, send it, and receive what happens.

Imports neither numpy nor torch, so that a run is handed over without delay.
"""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from totalfast.errors import OptionError, TotalfastError
from totalfast.serve.conditions import conditions
from totalfast.serve.frames import FrameError, FrameSocket
from totalfast.serve.peers import is_other_user
from totalfast.serve.places import LOOPBACK, Place, place_of, read_token

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from types import TracebackType

    from totalfast.serve.frames import Frame

ANSWER_S = 10.0
"""Seconds within which a server answers a request, before the run's turn comes."""

CANCEL_S = 10.0
"""Seconds to wait for the end of a run that is cancelled."""

OWN_TO_A_PROCESS = ("/dev/", "/proc/")
"""Beginnings of paths that mean something else in each process, such as /dev/fd/63."""


class NotServed(TotalfastError):
    """The server did not begin the run, and why not; the client can run it."""


class ServerLost(TotalfastError):
    """The server ended while it ran the run."""


class ServedRun:
    """A run that a server has accepted; a context manager that closes the connection.

    The server cancels the run when the connection is closed.
    """

    def __init__(self, frames: FrameSocket) -> None:
        self._frames = frames
        self.begun = False

    def __enter__(self) -> ServedRun:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._frames.__exit__()

    def events(self) -> Iterator[Frame]:
        """Yield what happens, until the run has ended: the last one is "ended".

        Raises
        ------
        NotServed
            If the server refuses the run or ends before the run began.
        ServerLost
            If the server ends while the run runs.
        """
        while True:
            try:
                event = self._frames.receive()
            except FrameError:
                event = None
            if event is None:
                raise self._lost()
            kind = event.get("event")
            if kind == "refused":
                raise NotServed(str(event.get("reason")))
            self.begun = self.begun or kind == "begun"
            yield event
            if kind == "ended":
                return

    def cancel(self) -> Frame | None:
        """Cancel the run; return its "ended" event, or None if that does not come in time."""
        self._frames.set_timeout(CANCEL_S)
        try:
            self._frames.send({"event": "cancel"})
            return [event for event in self.events() if event.get("event") == "ended"][-1]
        except (OSError, TotalfastError):
            return None

    def _lost(self) -> TotalfastError:
        if not self.begun:
            return NotServed("the server ended")
        return ServerLost(
            "the server ended while it ran this command, so the result is not known. If the files "
            "are missing, run the command again; nothing is half-written after that."
        )


def open_run(where: str, words: Sequence[str], paths: Mapping[str, str]) -> ServedRun:
    """Hand a run to a server.

    Parameters
    ----------
    where
        Value of ``TOTALFAST_SERVER``.
    words
        The command line, without the program's name.
    paths
        Argument to absolute path, of those arguments that are paths.

    Raises
    ------
    NotServed
        If the server can't be reached or does not accept the run.
    """
    for path in paths.values():
        if path.startswith(OWN_TO_A_PROCESS):
            raise NotServed(f"{path} can't be handed over")
    request = {"conditions": conditions(), "words": list(words), "paths": dict(paths)}
    try:
        place = place_of(where)
    except OptionError as error:
        raise NotServed(str(error).rstrip(".")) from error
    try:
        if place.token_file is not None:
            request["token"] = read_token(place.token_file)
        frames = FrameSocket(_connect(place))
    except (FileNotFoundError, ConnectionError) as error:
        raise NotServed(f"no server answers at {place}") from error
    except (OSError, TotalfastError) as error:
        raise NotServed(str(error).rstrip(".")) from error
    return _accepted(frames, request)


def _accepted(frames: FrameSocket, request: Frame) -> ServedRun:
    """Send a request and wait until it is accepted."""
    with contextlib.ExitStack() as opened:
        run = opened.enter_context(ServedRun(frames))
        try:
            frames.set_timeout(ANSWER_S)
            frames.send(request)
            next(run.events())
            frames.set_timeout(None)
        except OSError as error:
            raise NotServed(f"the server does not answer: {error}") from error
        opened.pop_all()
    return run


def _connect(place: Place) -> socket.socket:
    if place.port is not None:
        return socket.create_connection((LOOPBACK, place.port), timeout=ANSWER_S)
    with contextlib.ExitStack() as opened:
        connection = opened.enter_context(socket.socket(socket.AF_UNIX))
        connection.settimeout(ANSWER_S)
        connection.connect(str(place.socket))
        if is_other_user(connection):
            raise NotServed(f"the server at {place} belongs to another user")
        opened.pop_all()
    return connection


def absolute_paths(arguments: Mapping[str, object]) -> dict[str, str]:
    """Return the arguments that are paths of files, as absolute paths.

    ``statistics`` is the only one that is not a ``Path`` after parsing.
    """
    statistics = arguments.get("statistics")
    found = {name: value for name, value in arguments.items() if isinstance(value, Path)}
    if isinstance(statistics, str):
        found["statistics"] = Path(statistics)
    return {name: str(path.absolute()) for name, path in found.items()}
