"""One attempt of a case of a batch: segment it, and tell how that ended."""

from __future__ import annotations

import contextlib
import logging
import shutil
import socket
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from totalfast.about import versions
from totalfast.batch.remote.calls import TransferError
from totalfast.batch.remote.place import Remote
from totalfast.batch.results.entries import DONE, FAILED, Entry
from totalfast.batch.transfers import named_elsewhere, on_this_disk, publish, rescue, unmark
from totalfast.batch.work_folders import work_folder
from totalfast.errors import OutputError, TotalfastError
from totalfast.files.targets import marker_file, output_in
from totalfast.options import Options
from totalfast.run.many import THREAD_NAME, Outcome
from totalfast.session import task_outputs
from totalfast.system.disk import kept_if_used
from totalfast.system.memory import peak_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from totalfast.batch.finding.cases import Case
    from totalfast.batch.remote.place import Place
    from totalfast.files.dicom.read import SeriesSource
    from totalfast.options import SegmentKeywords
    from totalfast.run.many import StageClock
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
        Has a folder for each case; it may be elsewhere.
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
    folder: Place
    keywords: Mapping[str, Any]
    tasks: Sequence[str]
    options: str
    part: tuple[int, int] = (0, 1)
    _uploaded: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Case to the files that were uploaded."""
    _rescued: dict[str, Path] = field(default_factory=dict)
    """Case to its results that could not be uploaded, and are not computed again."""

    def outputs_of(self, folder: Path) -> dict[str, Path]:
        """Return the output of each task: a folder of masks, or a label map in a case's folder."""
        if len(self.tasks) > 1:
            return task_outputs(folder, self.tasks, self.keywords)
        (task,) = self.tasks
        return {task: output_in(folder, Options.from_keywords(self.keywords))}

    def segment(self, case: Case, clock: StageClock) -> None:
        """Segment a case; its results are written together at the end."""
        threading.current_thread().name = f"{THREAD_NAME} {case.name}"
        clock.tasks = len(self.tasks)
        if isinstance(self.folder, Path):
            self._segment(case, self.folder / case.name, clock)
            return
        began_s = time.perf_counter()
        target = self.folder / case.name
        results = self._rescued.get(case.name)
        if results is not None:
            self._upload(case, results, target, clock, began_s)
            shutil.rmtree(self._rescued.pop(case.name).parent, ignore_errors=True)
            return
        with work_folder() as folder:
            with named_elsewhere({folder: self.folder}):
                self._segment(case, folder / case.name, clock)
            self._upload(case, folder / case.name, target, clock, began_s)

    def _segment(self, case: Case, folder: Path, clock: StageClock) -> None:
        """Segment a case into a folder on this disk."""
        keywords = cast("SegmentKeywords", {**self.keywords, "series": case.series})
        with contextlib.ExitStack() as stack:
            if isinstance(case.source, Remote):
                clock.stage("Downloading")
            place = stack.enter_context(on_this_disk(case.source, lambda: clock.advance(0.0)))
            source = place if case.files is None else _series(case, place)
            stack.enter_context(kept_if_used(folder))
            if len(self.tasks) > 1:
                self.session.tasks_shown(source, folder, self.tasks, keywords, clock)
                return
            ((task, output),) = self.outputs_of(folder).items()
            keywords["task"] = task
            self.session.segment_shown(source, output, keywords, clock)

    def _upload(
        self, case: Case, results: Path, target: Remote, clock: StageClock, began_s: float
    ) -> None:
        """Upload results; if that fails, keep them on this machine."""

        def entry(files: tuple[str, ...]) -> Mapping[str, Any]:
            self._uploaded[case.name] = tuple(f"{case.name}/{name}" for name in files)
            ended: Outcome[Case, None] = Outcome(
                key=case,
                value=None,
                error=None,
                seconds=dict(clock.seconds),
                total_s=time.perf_counter() - began_s,
                warnings=(),
            )
            return self.entry(ended, 1).to_json()

        clock.stage("Uploading")
        try:
            publish(
                results,
                target,
                markers=self._markers(results),
                stamp=entry,
                check=lambda: clock.advance(0.0),
            )
        except OutputError as error:
            self._uploaded.pop(case.name, None)
            if case.name not in self._rescued:
                try:
                    self._rescued[case.name] = rescue(results)
                except OSError as full:
                    raise OutputError(
                        f"{error} They can't be kept on this machine either: {full.strerror}."
                    ) from full
            error.args = (f"{error} The results are complete in {self._rescued[case.name]}.",)
            raise

    def entry(self, outcome: Outcome[Case, None], attempt: int) -> Entry:
        """Describe how an attempt ended. After an error, older results lose their markers."""
        case = outcome.key
        if outcome.error is not None:
            self._unmark(case, outcome.error)
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
        """The completion markers, which list all other files; of uploaded results all files."""
        if not isinstance(self.folder, Path):
            return self._uploaded.get(case.name, ())
        markers = self._markers(self.folder / case.name)
        return tuple(marker.relative_to(self.folder).as_posix() for marker in markers)

    def _markers(self, folder: Path) -> list[Path]:
        options = Options.from_keywords(self.keywords)
        return [marker_file(output, options) for output in self.outputs_of(folder).values()]

    def _unmark(self, case: Case, error: Exception) -> None:
        """Remove the markers of older results, which are of another input or other options."""
        if not isinstance(self.folder, Path):
            if not isinstance(error, OutputError | TransferError):  # the server does not answer
                names = [marker.as_posix() for marker in self._markers(Path())]
                unmark(self.folder / case.name, names)
            return
        for marker in self._markers(self.folder / case.name):
            if marker.exists():
                logger.warning("WARNING: %s keeps older results.", marker.parent)
                with contextlib.suppress(OSError):
                    marker.unlink()


def _series(case: Case, place: Path) -> SeriesSource:
    from totalfast.files.dicom.read import SeriesSource

    return SeriesSource(place, wanted=case.series, only=case.files)


def one_line(error: Exception) -> str:
    """Return the reason of a failure; messages of other libraries may quote a scan's header."""
    if isinstance(error, TotalfastError):
        return " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return type(error).__name__
