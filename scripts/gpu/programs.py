"""Start programs, time them, and watch their memory."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from .record import DEVICE, ENVIRONMENT, SCAN, SCRIPTS, record

LEAST_S = 20.0
"""A program is not started if fewer seconds are left."""

LONGEST_LINE = 400

AHEAD = 4
"""Processes that import their modules while one of them measures."""

SHOWN = re.compile(
    r"(?:Resampled|Predicted|Saved) in|Done in|^Memory:|^WARNING|^ERROR|GPU|labels saved"
)
"""Lines of the programs that are kept."""


def command(program: str, target: Path, flags: Sequence[str]) -> list[Any]:
    """Words that run a program: "totalfast", "upstream", or "upstream, cucim"."""
    if program.startswith("totalfast"):
        start = ["-m", "totalfast"]
    else:
        cucim = ["--cucim"] if "cucim" in program else []
        start = [str(SCRIPTS / "gpu/upstream.py"), *cucim]
    return [sys.executable, *start, "-i", SCAN, "-o", target, "-d", DEVICE, *flags]


def end(process: subprocess.Popen[Any]) -> None:
    """End a process that we started, and its descendants."""
    try:
        root = psutil.Process(process.pid)
        family = [*root.children(recursive=True), root]
    except psutil.NoSuchProcess:
        return
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()


class Watch:
    """Samples a process in a thread: memory of its tree, and the card's used memory, in MB.

    The sum of the resident memory counts shared pages several times. The card's memory is that of
    all programs that use it.
    """

    def __init__(self, pid: int) -> None:
        self.host_mb = self.vram_mb = 0
        self._pid, self._ended = pid, threading.Event()
        self._threads = [
            threading.Thread(target=loop, daemon=True) for loop in (self._host, self._card)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> dict[str, int]:
        """End the threads; return the peaks."""
        self._ended.set()
        for thread in self._threads:
            thread.join()
        return {"host_rss_mb": self.host_mb, "vram_mb": self.vram_mb}

    def _host(self) -> None:
        while not self._ended.wait(0.1):
            try:
                root = psutil.Process(self._pid)
                family = [root, *root.children(recursive=True)]
                total = sum(member.memory_info().rss for member in family)
            except psutil.Error:
                continue
            self.host_mb = max(self.host_mb, total >> 20)

    def _card(self) -> None:
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        while shutil.which("nvidia-smi") and not self._ended.wait(0.3):
            answer = subprocess.run(query, capture_output=True, text=True, check=False)
            if answer.returncode == 0:
                self.vram_mb = max(self.vram_mb, int(answer.stdout.split()[0]))


def timed(
    words: Sequence[Any],
    *,
    limit_s: float = 150.0,
    every_line: bool = False,
    variables: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Run a command: seconds, peaks of memory, and its lines with the second of each.

    Returns
    -------
        ``wall_s``, ``host_rss_mb``, ``vram_mb``, ``rc``, ``lines``; after a failure ``tail``. Only
        ``skipped`` or ``killed_after_s`` if there was too little time.
    """
    limit_s = min(limit_s, record.seconds_left - 5)
    if limit_s < LEAST_S:
        return {"skipped": "no time left"}
    began = time.time()
    process = subprocess.Popen(
        [str(word) for word in words], env={**ENVIRONMENT, **(variables or {})},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip
    lines: list[tuple[float, str]] = []

    def read() -> None:
        for line in process.stdout or ():
            text = line.rstrip().rpartition("\r")[2][:LONGEST_LINE]
            lines.append((round(time.time() - began, 2), text))

    reader, watch = threading.Thread(target=read, daemon=True), Watch(process.pid)
    reader.start()
    try:
        process.wait(limit_s)
    except subprocess.TimeoutExpired:
        end(process)
        watch.stop()
        return {"killed_after_s": round(limit_s, 1), "lines": lines if every_line else lines[-8:]}
    wall = time.time() - began
    peaks = watch.stop()
    reader.join(1.0)
    row: dict[str, Any] = {"wall_s": round(wall, 2), **peaks, "rc": process.returncode}
    row["lines"] = [line for line in lines if line[1] and (every_line or SHOWN.search(line[1]))]
    if process.returncode:
        row["tail"] = "\n".join(text for _, text in lines)[-1200:]
    return row


def in_turn(
    children: Mapping[str, Sequence[Any]], *, limit_s: float = 60.0
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run measuring scripts; each imports its modules ahead of its turn, then measures alone.

    Parameters
    ----------
    children
        Name of each, and the words after ``python``; the script calls ``measuring.my_turn``.
    limit_s
        Seconds that each may measure.

    Yields
    ------
        Name, and the result that the script printed with ``measuring.answer``, or its error.
    """
    waiting = deque(children.items())
    started: deque[tuple[str, subprocess.Popen[str]]] = deque()
    try:
        while waiting or started:
            while waiting and len(started) < AHEAD and record.seconds_left > LEAST_S:
                name, words = waiting.popleft()
                started.append((name, _start(words)))
            if not started:
                break
            name, process = started.popleft()
            if record.seconds_left > LEAST_S / 2:
                yield name, _answer(process, min(limit_s, record.seconds_left - 5))
            else:
                end(process)
                yield name, {"skipped": "no time left"}
    finally:
        for _, process in started:
            end(process)
    for name, _ in waiting:
        yield name, {"skipped": "no time left"}


def measured(script: str, *words: Any, limit_s: float = 60.0) -> dict[str, Any]:
    """Run one measuring script of this folder and return its result."""
    child = [SCRIPTS / "gpu" / script, *words]
    return next(iter(in_turn({script: child}, limit_s=limit_s)))[1]


def _start(words: Sequence[Any]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *map(str, words)], env=ENVIRONMENT, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip


def _answer(process: subprocess.Popen[str], limit_s: float) -> dict[str, Any]:
    """Let a measuring script begin, and return its result."""
    failure: dict[str, Any] = {}
    try:
        text, _ = process.communicate("\n", timeout=limit_s)
    except subprocess.TimeoutExpired:
        end(process)
        text, _ = process.communicate()
        failure = {"killed_after_s": round(limit_s, 1)}
    if process.returncode and not failure:
        failure = {"rc": process.returncode, "tail": text[-1200:]}
    found = [line for line in text.splitlines() if line.startswith("{") and line.endswith("}")]
    result: dict[str, Any] = json.loads(found[-1]) if found else {}
    return result | failure
