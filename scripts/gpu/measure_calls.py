"""Time calls of ``Session.segment`` in one process.

    python measure_calls.py session DEVICE SCAN
    python measure_calls.py memory DEVICE SCAN LIMIT_GB FAST TARGET
    python measure_calls.py profile DEVICE SCAN TARGET TEXT

``session``: three calls of --fast, then three of 1.5 mm, nothing saved. ``memory``: one call, with
a limit for torch's memory on the device; 0 for none. ``profile``: functions and kernels of later
calls, written to the file TEXT.
"""

from __future__ import annotations

import cProfile
import logging
import pstats
import sys
from pathlib import Path
from typing import Any

import torch
from measuring import answer, my_turn, peak_mb, synchronised, torch_device

import totalfast
import totalfast.run.pipeline  # imports nnU-Net, before the turn
from totalfast.errors import TotalfastError


class Kept(logging.Handler):
    """Keeps the lines of totalfast's log that concern memory, and warnings."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one line."""
        text = record.getMessage()
        if record.levelno >= logging.WARNING or text.startswith("Memory") or "GPU" in text:
            self.lines.append(f"{record.levelname}: {text}")


def session(device: str, scan: str) -> dict[str, Any]:
    """Calls one after the other, with the peak of torch's memory in each."""
    rows = []
    with totalfast.Session(device=device) as opened:
        for fast in (True, True, True, False, False, False):
            if torch.cuda.is_initialized():
                torch.cuda.reset_peak_memory_stats()
            began = synchronised()
            opened.segment(scan, None, fast=fast, ml=True, quiet=True, skip_saving=True)
            rows.append({"fast": fast, "s": round(synchronised() - began, 3), "peak_mb": peak_mb()})
            answer({"calls": rows})
    return {"calls": rows}


def memory(device: str, scan: str, limit_gb: str, fast: str, target: str) -> dict[str, Any]:
    """One call within a limit."""
    if device.startswith("gpu") and float(limit_gb):
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(float(limit_gb) * 1e9 / total)
    kept, log = Kept(), logging.getLogger("totalfast")
    log.addHandler(kept)
    log.setLevel(logging.INFO)
    row: dict[str, Any] = {"limit_gb": float(limit_gb), "fast": fast == "fast"}
    began = synchronised()
    try:
        with totalfast.Session(device=device) as opened:
            opened.segment(scan, target, fast=fast == "fast", ml=True)
    except (TotalfastError, RuntimeError) as error:
        row["error"] = f"{type(error).__name__}: {str(error)[:400]}"
    row |= {"s": round(synchronised() - began, 2), "reserved_mb": peak_mb(reserved=True)}
    return row | {"peak_mb": peak_mb(), "lines": kept.lines}


def profile(device: str, scan: str, target: str, text: str) -> dict[str, Any]:
    """Functions of a later call by cumulative time, and its kernels."""
    with totalfast.Session(device=device) as opened, Path(text).open("w") as file:
        for fast in (True, False):
            keywords: Any = {"fast": fast, "ml": True, "quiet": True}
            opened.segment(scan, target, **keywords)
            profiler = cProfile.Profile()
            profiler.enable()
            opened.segment(scan, target, **keywords)
            profiler.disable()
            file.write("--fast\n" if fast else "1.5 mm\n")
            pstats.Stats(profiler, stream=file).sort_stats("cumulative").print_stats(45)
        if torch_device(device).type == "cuda":
            from torch.profiler import ProfilerActivity
            from torch.profiler import profile as kernels

            with kernels(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
                opened.segment(scan, target, fast=True, ml=True, quiet=True)
            averages = found.key_averages()
            file.write(averages.table(sort_by="cuda_time_total", row_limit=25))
            counted = {"cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"}
            copies = ("Memcpy HtoD", "Memcpy DtoH")
            counts = {
                event.key: event.count
                for event in averages
                if event.key in counted or event.key.startswith(copies)
            }
            return {"text": Path(text).name, "counts": counts}
    return {"text": Path(text).name}


def main() -> None:
    """Command line."""
    measure = {"session": session, "memory": memory, "profile": profile}[sys.argv[1]]
    my_turn()
    answer(measure(*sys.argv[2:]))


if __name__ == "__main__":
    main()
