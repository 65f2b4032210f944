"""A batch on a Ray cluster. This process hands out the cases and writes the manifest.

Each node has actors, which are processes with a session. An actor gets its next case when it has
fewer than ``at_a_time`` in work. The cases of an actor that ended go to others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import secrets
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from totalfast.about import versions
from totalfast.batch.cluster.actor import PASSED_ON, SAME_VERSIONS, Job
from totalfast.batch.cluster.connection import connected
from totalfast.batch.cluster.pool import ActorPool, Ended
from totalfast.batch.cluster.waiting import WaitingCases
from totalfast.batch.results.entries import FAILED, Entry
from totalfast.batch.run import disk_full
from totalfast.system.staging import recover

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Mapping, Sequence

    from totalfast.batch.cluster.waiting import Try
    from totalfast.batch.finding.cases import Case
    from totalfast.batch.remote.place import Place
    from totalfast.batch.results.manifest import Manifest
    from totalfast.run.many import Running

logger = logging.getLogger(__name__)

SIGN = ".batch-"
"""Beginning of the name of a file by which the nodes see that they have the same folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RayEngine:
    """A batch on the nodes of a Ray cluster.

    Parameters
    ----------
    job
        What is the same for all cases.
    manifest
        Where the end of each attempt is noted.
    retries
        How often a case is tried again, also if its process ended.
    per_node
        Number of processes on a node; None for one per GPU, or one where there is none.
    address
        Of a running cluster, as in ``connected``.
    """

    job: Job
    manifest: Manifest
    retries: int
    per_node: int | None = None
    address: str | None = None

    def run(self, cases: Sequence[Case], running: Running[Case]) -> Generator[Entry, None, None]:
        """Segment cases; yield an entry of the manifest as each attempt ends.

        The entries are in the manifest when they are yielded; those of cases that end after the
        generator was closed are there, too.

        Parameters
        ----------
        cases
            Each case once.
        running
            Filled with the cases in work.

        Raises
        ------
        ClusterError
            If there is no cluster, or none of its nodes can be used.
        OptionError
            If Ray is not installed.
        OutputError
            If the disk is full: after the cases in work have ended, no others are begun.
        """
        if not cases:
            return
        lost: set[Case] = set()
        with connected(self.address), _sign_in(self.job.folder) as sign:
            pool = ActorPool(dataclasses.replace(self.job, sign=sign), self.per_node, running)
            try:
                yield from self._run(WaitingCases(cases, self.retries), pool, lost)
            finally:
                for result in pool.end():
                    self._note(result.entry)
                if isinstance(self.job.folder, Path):
                    for case in lost:
                        self._recover(self.job.folder / case.name)

    def _recover(self, folder: Path) -> None:
        """Delete what a process that ended has left in the folder of its case."""
        for place in (folder, *(folder / task for task in self.job.tasks)):
            recover(place)

    def _run(
        self, waiting: WaitingCases, pool: ActorPool, lost: set[Case]
    ) -> Generator[Entry, None, None]:
        is_full = False
        while pool.in_work or (waiting and not is_full):
            if not is_full:
                pool.give(waiting)
            for ended in pool.wait():
                if ended.result is None:
                    lost.add(ended.attempt.case)
                entry = self._entry_of(ended, waiting)
                is_full = is_full or (ended.result is not None and ended.result.is_disk_full)
                if entry is not None:
                    yield entry
        if is_full:
            raise disk_full(self.job.folder)

    def _entry_of(self, ended: Ended, waiting: WaitingCases) -> Entry | None:
        """Note how an attempt ended; None if its process ended and the case is tried again."""
        name, attempt, result = ended.attempt.case.name, ended.attempt, ended.result
        if result is None:
            if waiting.lost(attempt):
                logger.warning("WARNING: %s is tried again: %s.", name, ended.reason)
                return None
            return self._note(self._lost_entry(attempt, ended.reason))
        if result.entry.error is not None and not result.is_hopeless and waiting.failed(attempt):
            logger.info("%s failed and is tried again after the others.", name)
        return self._note(result.entry)

    def _note(self, entry: Entry) -> Entry:
        """Add an entry to the manifest with the time of this machine; nodes' clocks may differ."""
        entry = dataclasses.replace(entry, finished=datetime.now(timezone.utc).isoformat())
        self.manifest.add(entry)
        return entry

    def _lost_entry(self, attempt: Try, reason: str) -> Entry:
        case = attempt.case
        return Entry(
            name=case.name,
            state=FAILED,
            options=self.manifest.options_hash(),
            fingerprint=case.fingerprint(),
            source=str(case.source),
            series=case.series,
            attempt=attempt.attempt,
            error=reason,
        )


def job_of(
    folder: Place,
    keywords: Mapping[str, Any],
    tasks: Sequence[str],
    manifest: Manifest,
    *,
    at_a_time: int | None,
) -> Job:
    """Describe a batch for the nodes, as it would run in this process.

    The parameters are those of ``Job``.
    """
    return Job(
        folder=folder,
        keywords=keywords,
        tasks=tasks,
        options=manifest.options_hash(),
        at_a_time=at_a_time,
        working_folder=Path.cwd(),
        environment={
            name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)
        },
        versions=versions(*SAME_VERSIONS),
    )


@contextlib.contextmanager
def _sign_in(folder: Place) -> Iterator[str]:
    """Write a file with a new name, until the context ends; return the name.

    Nothing is written to a folder that is elsewhere, which all nodes see.
    """
    if not isinstance(folder, Path):
        yield ""
        return
    for left in folder.glob(f"{SIGN}*"):  # of a command that was killed
        left.unlink(missing_ok=True)
    sign = folder / f"{SIGN}{secrets.token_hex(8)}"
    sign.touch()
    try:
        yield sign.name
    finally:
        sign.unlink(missing_ok=True)
