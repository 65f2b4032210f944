"""A batch in several processes of one machine: one for each GPU, or for each few cores."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from totalfast.batch.results.entries import FAILED, Entry
from totalfast.batch.shared_queue import VARIABLE, SharedQueue
from totalfast.system.cores import THREADS_VARIABLE, usable_cores

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence

    from totalfast.batch.finding.cases import Case
    from totalfast.batch.results.manifest import Manifest

logger = logging.getLogger(__name__)

END_S = 60.0
"""How long a worker may take to remove what it has begun to write, after it was told to end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workers:
    """Processes that take cases from one queue.

    Parameters
    ----------
    words
        The command line of the batch, without the program's name and "batch".
    devices
        Device of each process.
    manifest
        Gets the cases whose worker ended; workers have manifests of their own.
    retries
        How often cases are tried again whose worker ended, for example because it was killed.
    """

    words: Sequence[str]
    devices: Sequence[str]
    manifest: Manifest
    retries: int
    _lines: queue.SimpleQueue[dict[str, Any] | None] = field(default_factory=queue.SimpleQueue)

    def run(self, cases: Sequence[Case]) -> Generator[Entry, None, None]:
        """Segment cases; yield an entry of the manifest as each attempt ends."""
        for attempt in range(1, self.retries + 2):
            left = {case.name: case for case in cases}
            for entry in self._attempt(cases):
                left.pop(entry.name, None)
                yield entry
            if not left:
                return
            cases = tuple(left.values())
            if attempt <= self.retries:
                logger.warning("WARNING: workers ended before %d cases were done.", len(cases))
        for case in cases:
            entry = Entry(
                name=case.name,
                state=FAILED,
                options=self.manifest.options_hash(),
                fingerprint=case.fingerprint(),
                source=str(case.source),
                series=case.series,
                attempt=self.retries + 1,
                error="its worker process ended without a result; it may have been killed",
            )
            self.manifest.add(entry)
            yield entry

    def _attempt(self, cases: Sequence[Case]) -> Iterator[Entry]:
        with tempfile.TemporaryDirectory(prefix="totalfast-batch-") as folder:
            SharedQueue(Path(folder)).fill(cases)
            processes = [self._start(number, folder) for number in range(len(self.devices))]
            readers = [self._read(process) for process in processes]
            try:
                for _ in readers:
                    yield from self._entries_of_a_worker()
            finally:
                _end(processes)
                for reader in readers:
                    reader.join()

    def _start(self, number: int, folder: str) -> subprocess.Popen[str]:
        words = ["--device", self.devices[number], "--json"]
        words += ["--num-parts", str(len(self.devices)), "--part-id", str(number)]
        threads = max(usable_cores() // len(self.devices), 1)
        return subprocess.Popen(  # noqa: S603 - the user's own words
            [sys.executable, "-m", "totalfast", "batch", *self.words, *words],
            env=os.environ | {VARIABLE: folder, THREADS_VARIABLE: str(threads)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )

    def _read(self, process: subprocess.Popen[str]) -> threading.Thread:
        """Start a thread that hands over a worker's lines, and None at its end."""

        def read() -> None:
            with process.stdout or contextlib.nullcontext(()) as lines:
                for line in lines:
                    with contextlib.suppress(ValueError):  # a library's message
                        event = json.loads(line)
                        self._lines.put(event if isinstance(event, dict) else {})
            self._lines.put(None)

        thread = threading.Thread(target=read, name="totalfast-worker", daemon=True)
        thread.start()
        return thread

    def _entries_of_a_worker(self) -> Iterator[Entry]:
        """Yield entries of all workers until one of them ends."""
        while (event := self._lines.get()) is not None:
            if event.get("event") == "case":
                yield Entry.from_json(
                    {name: value for name, value in event.items() if name != "event"}
                )


def _end(processes: Sequence[subprocess.Popen[str]]) -> None:
    """Wait for workers; those that still run are told to end."""
    for process in processes:
        if process.poll() is None:
            process.terminate()
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_S)
        process.kill()
        process.wait()
