"""What runs on the nodes of a Ray cluster: a process that holds a session and segments cases.

It does not import Ray, so that it can be tested without it.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from totalfast.about import versions
from totalfast.errors import TotalfastError, WeightsError
from totalfast.system.progress import Cancelled

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from totalfast.batch.attempts import Attempts
    from totalfast.batch.finding.cases import Case
    from totalfast.batch.remote.place import Place
    from totalfast.batch.results.entries import Entry

SAME_VERSIONS = ("totalfast", "TotalSegmentator", "nnunetv2")
"""Packages that must have the same version on all nodes."""

PASSED_ON = ("TOTALFAST_", "TOTALSEG_", "nnUNet_")
"""Beginnings of the names of environment variables that the nodes take over from the command."""

PROGRESS_S = 1.0
"""Time between two messages about the progress of the cases in work."""


MOST_CASES = 8
"""Maximum number of cases in work in one process, unless the user names one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is the same for all cases of a batch.

    Parameters
    ----------
    folder
        Of the results; all nodes must see it, if it is not elsewhere.
    keywords
        Of ``Session.segment``, with the device.
    tasks
        Names of tasks.
    options
        Hash of the options, for entries.
    at_a_time
        Number of cases in work; None chooses by the node's cores and GPU.
    working_folder
        Current folder of the command; relative paths start there.
    environment
        Environment variables of the command that begin as in ``PASSED_ON``.
    versions
        Those of ``SAME_VERSIONS`` where the command runs.
    sign
        Name of a file in ``folder`` that the command has just written; "" if it is elsewhere.
    """

    folder: Place
    keywords: Mapping[str, Any]
    tasks: Sequence[str]
    options: str
    at_a_time: int | None
    working_folder: Path
    environment: Mapping[str, str]
    versions: Mapping[str, str]
    sign: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """Whether a process can work: the number of cases that it takes, or why it can't."""

    at_a_time: int = 0
    problem: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """How an attempt ended, and what that means for others."""

    entry: Entry
    is_hopeless: bool = False
    """Another attempt would meet the same error."""
    is_disk_full: bool = False


class CaseActor:
    """Segments cases in the threads of one process; each method runs in a thread of its own.

    Parameters
    ----------
    job
        What is the same for all cases.
    """

    def __init__(self, job: Job) -> None:
        from totalfast.run.many import Running

        self._job = job
        self._cancelled = threading.Event()
        self._running: Running[Case] = Running()
        self._attempts: Attempts | None = None

    def prepare(self) -> Ready:
        """Check that this node can do the job, and open the session."""
        from totalfast.system.process_memory import prepare_process

        prepare_process()
        problem = self._problem()
        if problem is not None:
            return Ready(problem=problem)
        from totalfast.batch.attempts import Attempts
        from totalfast.session import Session, runs_at_a_time

        job, device = self._job, self._job.keywords["device"]
        self._attempts = Attempts(
            session=Session(device=device, follow_modality=True),
            folder=job.folder,
            keywords=job.keywords,
            tasks=job.tasks,
            options=job.options,
        )
        return Ready(at_a_time=job.at_a_time or min(runs_at_a_time(device), MOST_CASES))

    def _problem(self) -> str | None:
        """Why this node can't do the job; None if it can."""
        job, here = self._job, versions(*SAME_VERSIONS)
        if here != job.versions:
            return f"it has {_listed(here)}, but the command runs with {_listed(job.versions)}"
        try:
            os.chdir(job.working_folder)
        except OSError:
            return f"it does not see the command's current folder, {job.working_folder}"
        if isinstance(job.folder, Path) and not (job.folder / job.sign).exists():
            return f"it does not see the files that the command writes to {job.folder}"
        os.environ.update(job.environment)
        from totalfast.batch.run import check

        try:
            check({**job.keywords, "offline": True}, job.tasks)
        except WeightsError as error:
            return f"{error} All nodes need the same folder of models"
        except TotalfastError as error:
            return str(error)
        return None

    def segment(self, case: Case, attempt: int) -> Result | None:
        """Segment a case; None if the batch was ended meanwhile."""
        from totalfast.batch.run import HOPELESS
        from totalfast.run.many import StageClock, run_one
        from totalfast.system.disk import is_disk_full

        if self._attempts is None or self._cancelled.is_set():
            return None
        clock = self._running.clocks[case] = StageClock(self._cancelled)
        try:
            outcome = run_one(case, self._attempts.segment, clock)
            return Result(
                entry=self._attempts.entry(outcome, attempt),
                is_hopeless=isinstance(outcome.error, HOPELESS),
                is_disk_full=is_disk_full(outcome.error),
            )
        except Cancelled:
            return None
        finally:
            self._running.clocks.pop(case, None)

    def fractions(self) -> dict[str, float]:
        """Return the share of each case in work that is done, after a moment."""
        self._cancelled.wait(PROGRESS_S)
        return {case.name: share for case, share in self._running.fractions().items()}

    def end(self) -> None:
        """Let the cases in work end at their next sign of progress; nothing is half-written."""
        self._cancelled.set()


def _listed(found: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in sorted(found.items())) or "none"
