"""Run the cases of a batch that are not done, note how each ends, and try failed ones again."""

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
from totalfast.errors import InputError, OptionError, TotalfastError
from totalfast.files.targets import marker_file, output_in
from totalfast.models.weights import ensure_parts
from totalfast.options import Options
from totalfast.run.many import THREAD_NAME, Running, run_many
from totalfast.session import task_outputs
from totalfast.system.disk import kept_if_used
from totalfast.system.memory import peak_bytes

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Mapping, Sequence

    from totalfast.batch.cases import Case
    from totalfast.batch.manifest import Manifest
    from totalfast.options import SegmentKeywords
    from totalfast.run.many import Outcome, StageClock
    from totalfast.session import Session

logger = logging.getLogger(__name__)

PACKAGES = ("totalfast", "TotalSegmentator", "nnunetv2", "torch")
"""What the labels depend on."""

HOPELESS = (InputError, OptionError)
"""Errors that another attempt meets again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Cases, and how they are segmented.

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
    manifest
        What is done, and where the end of each attempt is noted.
    retries
        How often a case is tried again.
    at_a_time
        Number of cases in work.
    """

    session: Session
    folder: Path
    keywords: Mapping[str, Any]
    tasks: Sequence[str]
    manifest: Manifest
    retries: int
    at_a_time: int

    def run(self, cases: Iterable[Case], running: Running[Case]) -> Generator[Entry, None, None]:
        """Segment cases; yield an entry of the manifest as each attempt ends.

        A case that failed is tried again after all others. The entries are in the manifest when
        they are yielded.
        """
        attempt = 1
        while cases:
            failed = []
            with contextlib.closing(self._outcomes(cases, running)) as outcomes:
                for outcome in outcomes:
                    entry = self._entry(outcome, attempt)
                    self.manifest.add(entry)
                    if outcome.error is not None and not isinstance(outcome.error, HOPELESS):
                        failed.append(outcome.key)
                    yield entry
            attempt += 1
            cases = failed if attempt <= 1 + self.retries else []
            if cases:
                logger.info("Trying again what failed: %d of the cases ...", len(cases))

    def outputs_of(self, case: Case) -> dict[str, Path]:
        """Return the output of each task: a folder of masks, or a label map."""
        folder = self.folder / case.name
        if len(self.tasks) > 1:
            return task_outputs(folder, self.tasks, self.keywords)
        (task,) = self.tasks
        return {task: output_in(folder, Options.from_keywords(self.keywords))}

    def _outcomes(
        self, cases: Iterable[Case], running: Running[Case]
    ) -> Generator[Outcome[Case, None], None, None]:
        return run_many(cases, self._segment, threads=self.at_a_time, running=running)

    def _segment(self, case: Case, clock: StageClock) -> None:
        threading.current_thread().name = f"{THREAD_NAME} {case.name}"
        folder, clock.tasks = self.folder / case.name, len(self.tasks)
        keywords = cast("SegmentKeywords", {**self.keywords, "series": case.series})
        with kept_if_used(folder):
            if len(self.tasks) > 1:
                self.session.tasks_shown(case.source, folder, self.tasks, keywords, clock)
                return
            ((task, output),) = self.outputs_of(case).items()
            keywords["task"] = task
            self.session.segment_shown(case.source, output, keywords, clock)

    def _entry(self, outcome: Outcome[Case, None], attempt: int) -> Entry:
        case = outcome.key
        if outcome.error is not None:
            self._unmark(case)
        return Entry(
            name=case.name,
            source=str(case.source),
            series=case.series,
            fingerprint=case.fingerprint(),
            options=self.manifest.options_hash(),
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
            part=self.manifest.part,
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


def check(keywords: Mapping[str, Any], tasks: Sequence[str]) -> Options:
    """Check what is the same for all cases, before the first one: options, licence, models.

    Raises
    ------
    TotalfastError
        If an option is not valid, or a model is missing and can't be downloaded.
    """
    if len(tasks) > 1:
        task_outputs(Path(), tasks, keywords)
    for name in tasks:
        options = Options.from_keywords({**keywords, "task": name})
        ensure_parts(options.resolved_task(), offline=options.offline, quiet=options.quiet)
    return options


def one_line(error: Exception) -> str:
    """Return the reason of a failure; messages of other libraries may quote a scan's header."""
    if isinstance(error, TotalfastError):
        return " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return type(error).__name__
