"""Cases that several processes of one machine take from, each case once."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from totalfast.batch.finding.cases import Case
from totalfast.batch.remote.place import address_of, place_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

VARIABLE = "TOTALFAST_BATCH_QUEUE"
"""Environment variable with the queue's folder, for the processes that take from it."""

CASES = "cases.json"


class SharedQueue:
    """A folder with the list of cases, and an empty file for each case that was taken.

    Parameters
    ----------
    folder
        On a disk of this machine.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def of_parent(cls) -> SharedQueue | None:
        """Return the queue of the process that started this one; None if there is none."""
        folder = os.environ.get(VARIABLE)
        return None if folder is None else cls(Path(folder))

    def fill(self, cases: Sequence[Case]) -> None:
        """Write the list of cases."""
        content = [{**asdict(case), "source": address_of(case.source)} for case in cases]
        (self.folder / CASES).write_text(json.dumps(content), encoding="utf-8")

    def cases(self) -> tuple[Case, ...]:
        """Read the list of cases."""
        content = json.loads((self.folder / CASES).read_text(encoding="utf-8"))
        return tuple(map(_case, content))

    def take(self) -> Iterator[Case]:
        """Yield cases that no other process has taken, one at a time."""
        for number, case in enumerate(self.cases()):
            try:
                with (self.folder / f"{number}.taken").open("x"):
                    pass
            except FileExistsError:
                continue
            yield case


def _case(content: dict[str, Any]) -> Case:
    files = content["files"]
    values = {
        "source": place_of(content["source"]),
        "files": None if files is None else tuple(files),
    }
    return Case(**{**content, **values})
