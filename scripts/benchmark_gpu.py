"""Time totalfast on a CUDA GPU with upstream beside it, and compare the labels.

    python scripts/benchmark_gpu.py [SECONDS] [STEP ...]
    python scripts/benchmark_gpu.py --list
    python scripts/benchmark_gpu.py --table FILE

Results go to ``gpu.json`` in ``$OUT`` (default: the current folder) after each measurement, so a
run that is cut off leaves what it measured. At the end the tables are printed. Without STEP all
steps run, in this order; SECONDS (default 1800) is the time limit of all. With STEP the results of
the last call are kept, and ``prepare`` runs if it has not. Seconds are expected ones on an H100
with 16 cores:

============= === =========================================================================
step            s what
============= === =========================================================================
machine        10 card, processor, versions
prepare        45 scan, stand-in weights, tiny weights of the tests
fast           90 ``--fast``, one mask per class: upstream twice, totalfast twice, compared
total          95 1.5 mm, label map: totalfast twice, upstream, compared
session        25 calls in one process, three of ``--fast``, three of 1.5 mm, nothing saved
deterministic  30 ``--fast`` twice with ``--deterministic``, twice without
network        50 one tile of both networks with each setting, in processes of their own
memory         75 a call of each within 4, 3, 6, 8 and 16 GB of the device's memory
export         10 nearest and linear on the device, compared with the CPU's
cold           30 where the seconds of a ``--fast`` process go
tests         180 ``pytest -m cuda``; cut off where the time ends
peer           60 FastSegmentator on the same scan, twice, if it is installed
search         25 ``--fast`` and 1.5 mm with cuDNN's search for algorithms
cucim          45 upstream's ``--fast`` with cucim, if it is installed
profile        40 functions and kernels of later calls
============= === =========================================================================

The first ten steps fit into 480 s. Weights are stand-ins, not TotalSegmentator's
(scripts/make_standin_weights.py): the 3 mm model and one part of the 1.5 mm model are fitted; the
other parts are copies of that part with other last layers. The environment variables SCAN, DEVICE,
OUT and WORK choose the scan, the device (``cpu`` for a try with tiny networks), the folder of the
results and the working folder. ``scripts/pack_for_gpu.sh`` prepares a machine without a network.

Upstream runs without cucim. Where cupy and cucim are installed, it resamples by another rule, and
its labels differ from its own on a CPU. Step ``cucim`` measures that difference.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu import calls, commands, preparation
from gpu.record import ENVIRONMENT, record
from gpu.table import tables

STEPS = {
    "machine": calls.step_machine,
    "prepare": preparation.prepare,
    "fast": commands.step_fast,
    "total": commands.step_total,
    "session": calls.step_session,
    "deterministic": commands.step_deterministic,
    "network": calls.step_network,
    "memory": calls.step_memory,
    "export": calls.step_export,
    "cold": commands.step_cold,
    "tests": commands.step_tests,
    "peer": commands.step_peer,
    "search": commands.step_search,
    "cucim": commands.step_cucim,
    "profile": calls.step_profile,
}

LEAST_S = 20.0
"""A step does not begin if fewer seconds are left."""


def run(names: list[str]) -> None:
    """Run steps; a step that fails does not stop the others."""
    for name in names:
        began = time.time()
        if record.seconds_left < LEAST_S:
            record.keep(f"{name}_skipped", "no time left")
            continue
        try:
            STEPS[name]()
        except Exception:  # noqa: BLE001 - the other steps are still worth their time
            record.keep(f"{name}_failed", traceback.format_exc()[-1500:])
        took = record.results.get("step_s", {}) | {name: round(time.time() - began, 1)}
        record.keep("step_s", took)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("seconds", type=float, nargs="?", default=1800.0, metavar="SECONDS")
    parser.add_argument("steps", nargs="*", metavar="STEP", help="see --list; default: all")
    parser.add_argument("--list", action="store_true", help="print the steps and end")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the tables of a gpu.json")
    options = parser.parse_args()
    unknown = [name for name in options.steps if name not in STEPS]
    if unknown:
        parser.error(f"unknown steps: {', '.join(unknown)}; see --list")
    if options.list:
        print((__doc__ or "").partition("cores:\n\n")[2].partition("\n\n")[0])
    elif options.table:
        results = json.loads(options.table.read_text())
        if "step_s" not in results:
            parser.error(f"{options.table} is of an earlier version, which had other keys")
        print(tables(results))
    else:
        os.environ.update(ENVIRONMENT)
        record.start(options.seconds, goes_on=bool(options.steps))
        first = [] if preparation.is_prepared() else ["machine", "prepare"]
        run(list(dict.fromkeys([*first, *options.steps])) if options.steps else list(STEPS))
        print("\n" + tables(record.results), flush=True)


if __name__ == "__main__":
    main()
