"""Run the cases of a batch that are not done, note how each ends, and try failed ones again."""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from totalfast.errors import InputError, OptionError, OutputError
from totalfast.models.weights import ensure_parts
from totalfast.options import Options
from totalfast.run.many import run_many
from totalfast.session import task_outputs
from totalfast.system.disk import is_disk_full

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence

    from totalfast.batch.attempts import Attempts
    from totalfast.batch.finding.cases import Case
    from totalfast.batch.results.entries import Entry
    from totalfast.batch.results.manifest import Manifest
    from totalfast.run.many import Outcome, Running

logger = logging.getLogger(__name__)

HOPELESS = (InputError, OptionError)
"""Errors that another attempt meets again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A batch in the threads of this process.

    Parameters
    ----------
    attempts
        Segments the cases.
    manifest
        Where the end of each attempt is noted.
    retries
        How often a case is tried again.
    at_a_time
        Number of cases in work.
    """

    attempts: Attempts
    manifest: Manifest
    retries: int
    at_a_time: int

    def run(
        self,
        cases: Iterable[Case],
        running: Running[Case],
        on_error: Callable[[Exception], None] | None = None,
    ) -> Generator[Entry, None, None]:
        """Segment cases; yield an entry of the manifest as each attempt ends.

        A case that failed is tried again after all others. The entries are in the manifest when
        they are yielded; those of cases that end after the generator was closed are there, too.

        Parameters
        ----------
        cases
            Each case once.
        running
            Filled with the cases that have begun.
        on_error
            Called with each error, as long as it has a traceback, in the thread of its case.

        Raises
        ------
        OutputError
            If the disk is full: after the cases in work have ended, no others are begun.
        """
        attempt = 1
        while cases:
            failed = []
            entries: dict[Case, Entry] = {}

            def note(outcome: Outcome[Case, None], attempt: int, into: dict[Case, Entry]) -> None:
                if outcome.error is not None and on_error is not None:
                    on_error(outcome.error)
                into[outcome.key] = entry = self.attempts.entry(outcome, attempt)
                self.manifest.add(entry)

            outcomes = run_many(
                _until_full(cases, full := threading.Event()),
                self.attempts.segment,
                threads=self.at_a_time,
                running=running,
                ended=functools.partial(note, attempt=attempt, into=entries),
            )
            with contextlib.closing(outcomes):
                for outcome in outcomes:
                    if outcome.error is not None and not isinstance(outcome.error, HOPELESS):
                        failed.append(outcome.key)
                    if is_disk_full(outcome.error):
                        full.set()
                    yield entries.pop(outcome.key)
            if full.is_set():
                raise disk_full(self.manifest.folder)
            attempt += 1
            cases = failed if attempt <= 1 + self.retries else []
            if cases:
                logger.info("Trying again what failed: %d of the cases ...", len(cases))


def disk_full(folder: object) -> OutputError:
    """Return the error of a batch that ended because the disk of its folder is full."""
    return OutputError(
        f"the disk of {folder} is full, so no further cases were begun. Free some space and run "
        "the same command again; it goes on with what is missing."
    )


def _until_full(cases: Iterable[Case], full: threading.Event) -> Iterator[Case]:
    for case in cases:
        if full.is_set():
            return
        yield case


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
