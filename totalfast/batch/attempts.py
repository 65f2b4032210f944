"""One attempt of a case of a batch: segment it, and tell how that ended."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from totalfast.about import versions
from totalfast.batch.entries import DONE, FAILED, Entry
from totalfast.errors import TotalfastError
from totalfast.files.targets import marker_file, output_in
from totalfast.options import Options
from totalfast.run.many import THREAD_NAME
from totalfast.session import task_outputs
from totalfast.system.disk import kept_if_used
from totalfast.system.memory import peak_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from totalfast.batch.cases import Case
    from totalfast.files.dicom.read import SeriesSource
    from totalfast.options import SegmentKeywords
    from totalfast.run.many import Outcome, StageClock
    from totalfast.session import Session

logger = logging.getLogger(__name__)

PACKAGES = ("totalfast", "TotalSegmentator", "nnunetv2", "torch")
"""What the labels depend on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempts:
    """Segments cases.

    Parameters
    ----------
    session
        Runs them.
    folder
        Has a folder for each case.
    keywords
        Of ``Session.segment``; a completion marker is always written.
    tasks
        Names of tasks. The results of several are in a folder for each task.
    options
        Hash of the options, for entries.
    part
        Number of this part of the batch, from 0, and number of all parts, for entries.
    """

    session: Session
    folder: Path
    keywords: Mapping[str, Any]
    tasks: Sequence[str]
    options: str
    part: tuple[int, int] = (0, 1)

    def outputs_of(self, case: Case) -> dict[str, Path]:
        """Return the output of each task: a folder of masks, or a label map."""
        folder = self.folder / case.name
        if len(self.tasks) > 1:
            return task_outputs(folder, self.tasks, self.keywords)
        (task,) = self.tasks
        return {task: output_in(folder, Options.from_keywords(self.keywords))}

    def segment(self, case: Case, clock: StageClock) -> None:
        """Segment a case; its results are written together at the end."""
        threading.current_thread().name = f"{THREAD_NAME} {case.name}"
        folder, clock.tasks = self.folder / case.name, len(self.tasks)
        keywords = cast("SegmentKeywords", {**self.keywords, "series": case.series})
        source = case.source if case.files is None else _series(case)
        with kept_if_used(folder):
            if len(self.tasks) > 1:
                self.session.tasks_shown(source, folder, self.tasks, keywords, clock)
                return
            ((task, output),) = self.outputs_of(case).items()
            keywords["task"] = task
            self.session.segment_shown(source, output, keywords, clock)

    def entry(self, outcome: Outcome[Case, None], attempt: int) -> Entry:
        """Describe how an attempt ended. After an error, older results lose their markers."""
        case = outcome.key
        if outcome.error is not None:
            self._unmark(case)
        return Entry(
            name=case.name,
            source=str(case.source),
            series=case.series,
            fingerprint=case.fingerprint(),
            options=self.options,
            state=DONE if outcome.error is None else FAILED,
            attempt=attempt,
            seconds={stage: round(s, 3) for stage, s in outcome.seconds.items()},
            total_s=round(outcome.total_s, 3),
            peak_bytes=peak_bytes(),
            versions=versions(*PACKAGES),
            error=None if outcome.error is None else one_line(outcome.error),
            warnings=outcome.warnings,
            files=self._files(case) if outcome.error is None else (),
            host=socket.gethostname(),
            part=self.part,
        )

    def _files(self, case: Case) -> tuple[str, ...]:
        """The completion markers, which list all other files."""
        return tuple(marker.relative_to(self.folder).as_posix() for marker in self._markers(case))

    def _markers(self, case: Case) -> list[Path]:
        options = Options.from_keywords(self.keywords)
        return [marker_file(output, options) for output in self.outputs_of(case).values()]

    def _unmark(self, case: Case) -> None:
        """Remove the markers of older results, which are of another input or other options."""
        for marker in self._markers(case):
            if marker.exists():
                logger.warning("WARNING: %s keeps older results.", marker.parent)
                with contextlib.suppress(OSError):
                    marker.unlink()


def _series(case: Case) -> SeriesSource:
    from totalfast.files.dicom.read import SeriesSource

    return SeriesSource(case.source, wanted=case.series, only=case.files)


def one_line(error: Exception) -> str:
    """Return the reason of a failure; messages of other libraries may quote a scan's header."""
    if isinstance(error, TotalfastError):
        return " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return type(error).__name__
