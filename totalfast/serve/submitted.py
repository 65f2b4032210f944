"""A run that was submitted by HTTP: its state, and its events for those who watch it."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from totalfast.serve.frames import Frame
    from totalfast.serve.runs import Run

KEPT_EVENTS = 10_000
"""Maximum number of events of a run that are kept for late watchers; later ones are dropped."""

LAST_EVENTS = ("ended", "refused")

STATES = ("waiting", "fetching", "running", "pushing", "done", "failed", "cancelled")

BEGINNINGS = {
    "waiting": "waiting",
    "fetching": "fetching",
    "begun": "running",
    "pushing": "pushing",
}
"""Event to the state that it begins."""


@dataclass(slots=True, kw_only=True, eq=False)
class Submitted:
    """A submitted run.

    Parameters
    ----------
    id
        Random name.
    folder
        Private folder of an uploaded or fetched scan and its results; None for paths.
    has_result
        Whether the results are written; they can be fetched even if they could not be stored.
    is_late
        Whether it is ended because it took too much time.
    series, stored
        SeriesInstanceUID of a fetched scan; what was stored at which DICOMweb server.
    """

    id: str
    folder: Path | None
    run: Run
    state: str = "waiting"
    stage: str = ""
    code: int | None = None
    error: str = ""
    has_result: bool = False
    is_late: bool = False
    series: str | None = None
    stored: dict[str, Any] | None = None
    ended: float | None = None
    total: float = 1.0
    work: float = 0.0
    events: list[Frame] = field(default_factory=list)
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def note(self, event: Frame) -> None:
        """Note what happened, and wake up watchers; for the event loop's thread."""
        kind = event["event"]
        self.state = BEGINNINGS.get(kind, self.state)
        if kind == "begun":
            self.begun.set()
        elif kind == "fetching":
            of = "" if event["of"] is None else f" of {event['of']}"
            self.stage = f"{event['instances']}{of} instances"
        elif kind == "stage":
            self.stage = event["name"]
        elif kind == "bar" and event["shown"]:
            self.total, self.work = 1.0, 0.0
        elif kind == "expect":
            self.total = event["total"] or 1.0
        elif kind == "advance":
            self.work += event["work"]
        elif kind in LAST_EVENTS:
            self._end(event)
        if len(self.events) < KEPT_EVENTS or kind in LAST_EVENTS:
            self.events.append(event)
        self.changed.set()
        self.changed = asyncio.Event()

    def _end(self, event: Frame) -> None:
        self.code = event.get("code", 1)
        self.error = event.get("error") or event.get("reason", "")
        failed = "cancelled" if self.run.cancelled.is_set() else "failed"
        self.state = "done" if self.code == 0 else failed
        self.ended = time.monotonic()

    def as_json(self) -> dict[str, Any]:
        """Return the state for clients."""
        return {
            "id": self.id,
            "state": self.state,
            "stage": self.stage,
            "fraction": 1.0 if self.state == "done" else min(self.work / self.total, 1.0),
            "exit_code": self.code,
            "error": self.error,
            "has_result": self.has_result,
            "series": self.series,
            "stored": self.stored,
            "log": [event["text"] for event in self.events if _is_shown(event)],
        }

    async def watch(self) -> AsyncIterator[Frame]:
        """Yield all events, from the first to the last."""
        number = 0
        while True:
            changed = self.changed
            for event in self.events[number:]:
                yield event
                number += 1
                if event["event"] in LAST_EVENTS:
                    return
            await changed.wait()


def _is_shown(event: Frame) -> bool:
    return bool(event["event"] == "log" and event["level"] >= logging.INFO)
