"""Settings of the benchmark on a GPU, its time limit, and the file with its results."""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).resolve().parents[1]
ROOT = SCRIPTS.parent
SHAPE = os.environ.get("SCAN", "phantom:488x404x336:0.75x0.75x1")
DEVICE = os.environ.get("DEVICE", "gpu")
ON_CPU = DEVICE == "cpu"
OUT = Path(os.environ.get("OUT", ".")).absolute()
WORK = Path(os.environ.get("WORK", Path(tempfile.gettempdir()) / "totalfast-gpu")).absolute()
HOME, TINY_HOME, SCAN = WORK / "home", WORK / "tiny", WORK / "ct.nii.gz"
RESULTS = HOME / "nnunet/results"
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(
        str(path) for path in (ROOT, os.environ.get("PYTHONPATH")) if path
    ),
    "PYTHONUNBUFFERED": "1",
    "TOTALFAST_BACKEND": "torch",
    "TOTALFAST_CACHE_DIR": str(WORK / "cache"),
    "NUMBA_CACHE_DIR": str(WORK / "cache"),
    "TOTALSEG_HOME_DIR": str(HOME),
}
"""Of all programs that the benchmark starts."""


class Record:
    """Results so far, written after each, and the seconds that are left.

    They are written to ``$OUT/gpu.json``, and to the working folder for a call that goes on.
    """

    def __init__(self) -> None:
        self.deadline = time.time()
        self.results: dict[str, Any] = {}

    def start(self, seconds: float, *, goes_on: bool) -> None:
        """Begin the time limit, with the results of the last call if this one goes on."""
        self.deadline = time.time() + seconds
        for folder in (OUT, WORK):
            folder.mkdir(parents=True, exist_ok=True)
        earlier = WORK / "gpu.json"
        if goes_on and earlier.exists():
            self.results = json.loads(earlier.read_text())

    @property
    def seconds_left(self) -> float:
        """Seconds until the time limit."""
        return self.deadline - time.time()

    def keep(self, name: str, value: Any) -> None:
        """Add or replace a result, and write all results."""
        self.results[name] = value
        for folder in (OUT, WORK):
            text = json.dumps(self.results, indent=1, default=str)
            (folder / "gpu.json").write_text(text + "\n")
        shown = json.dumps(value, default=str)
        print(f"== {name}: {shown if len(shown) <= 600 else '... ' + shown[-600:]}", flush=True)


record = Record()
