"""Switch off one optimisation at a time, and measure time and memory of the command.

    python scripts/ablation.py HOME SCAN --name NAME --json FILE [--repeats N]
                               [--readme [OTHER_FILE ...]] [-- FLAGS ...]

Runs ``totalfast`` as a whole process for each row of ``ABLATIONS``. The code of the row runs first
and replaces the fast code by plain code. The order of the rows is random in each round, and the
baseline, with all optimisations, runs between them. The result contains the medians and the number
of voxels that differ from the baseline, which must be 0. Rows are left out if the case does not use
the optimisation. HOME: stand-in weights from scripts/make_standin_weights.py; use tiny ones to
measure the time outside the network. SCAN: as for benchmark_command.py. Prints a table.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmark_command import (
    WEIGHTS,
    add_device,
    compare_folders,
    machine,
    make_scan,
    parse_with_flags,
    run,
    target_name,
)
from readme import write_table

BASELINE = "all optimisations on"

ABLATIONS = {
    BASELINE: "",
    "one thread outside the network": """
import totalfast.system.cores
def one():
    used.append(1)
    return 1
totalfast.system.cores.usable_cores = one
""",
    "scan read by Python's gzip instead of ISA-L": """
import numpy, totalfast.files.read as read
def inflate(path, proxy):
    used.append(1)
    return numpy.asanyarray(proxy.get_unscaled())
read._inflate = inflate
""",
    "each model loaded only when it is needed": """
import totalfast.run.context as context
context.RunContext.start_loading = lambda self, number: used.append(1)
""",
    "all models kept until the end": """
import totalfast.models.store as store
begin = store.ModelStore.__init__
def keep(self, **keywords):
    used.append(1)
    begin(self, **{**keywords, "keep": True})
store.ModelStore.__init__ = keep
""",
    "checkpoints read instead of memory-mapped": """
import totalfast.models.checkpoints as weights
mapped = weights.read_checkpoint
def read(path):
    import torch
    used.append(1)
    load = torch.load
    torch.load = lambda *arguments, mmap=None, **keywords: load(*arguments, **keywords)
    try:
        return mapped(path)
    finally:
        torch.load = load
weights.read_checkpoint = read
""",
    "upstream's modules imported": """
import totalsegmentator.python_api
import nnunetv2.inference.predict_from_raw_data
used.append(1)
""",
    "whole scan resampled by scipy": """
import totalfast.resampling.model_grid as resample
def whole(voxels, image, stored, threads):
    from scipy import ndimage
    used.append(1)
    zoom = [m / n for n, m in zip(stored.shape, voxels.T.shape)]
    out = ndimage.zoom(image.scale(stored), zoom, order=1, mode="nearest")
    voxels[...] = resample.truncate(out.transpose(2, 1, 0))
resample._FILLS[1] = whole
""",
    "skip connections kept until the end": """
import totalfast.backends.forward as forward
def keep(encoder):
    used.append(1)
    return encoder
forward._with_skips_read_once = keep
""",
    "last layer run on the whole tile": """
import totalfast.backends.forward as forward
def whole(network):
    used.append(1)
    return network, None
forward.split_head = whole
""",
    "new memory for the sums of each model": """
import totalfast.engine.rolling_window as window
def zeros(self, shape):
    used.append(1)
    return window.np.zeros(shape, dtype=window.np.float16)
window.WindowMemory.zeros = zeros
""",
    "sums also where one tile covers the image": """
import totalfast.engine.fold_networks as networks, totalfast.engine.rolling_window as window
def through_window(self, image, tiles):
    used.append(1)
    device = self.weights.device
    rolling = window.RollingWindow(self, tiles, window.WindowMemory(), device)
    box = (slice(None), *(slice(0, size) for size in tiles.patch))
    rolling.add(image[box], box)
    yield from rolling.advance(tiles.padded_shape[0])
networks.FoldNetworks.logits_of_one_tile = through_window
""",
    "normalisation into new memory": """
import totalfast.backends.norms as norms
def keep(network):
    used.append(1)
    return network
norms.normalised_in_place = keep
""",
    "logits weighted and added per tile, not per slice": """
import totalfast.engine.rolling_window as window
def add_up(self, total, logits, weight):
    used.append(1)
    logits *= weight
    total += logits
window.RollingWindow._add_up = add_up
""",
    "first maximum by torch's max": """
import totalfast.engine.sliding_window as window
def first_maximum(logits):
    used.append(1)
    return logits.float().max(0).indices
window.first_maximum = first_maximum
""",
    "no huge pages": """
import os
os.environ["THP_MEM_ALLOC_ENABLE"] = "0"
used.append(1)
""",
    "default settings of glibc's allocator": """
import totalfast.system.process_memory as allocator
def none(name):
    used.append(1)
allocator._libc = none
""",
    "default thresholds of Python's garbage collector": """
import gc
def none(*thresholds):
    used.append(1)
gc.set_threshold = none
""",
    "nearest labels looked up per voxel": """
import totalfast.export.nearest as nearest
def gather(labels, indices, *, threads):
    used.append(1)
    z, y, x = indices
    return labels[z[:, None, None], y[:, None], x]
nearest.gather = gather
""",
    "masks compressed by zlib instead of ISA-L": """
import types, zlib
import totalfast.files.gzip_member as gzip_member
isal = gzip_member.isal_zlib
def encoder(*arguments):
    used.append(1)
    return zlib.compressobj(*arguments)
gzip_member.isal_zlib = types.SimpleNamespace(
    compressobj=encoder, DEFLATED=zlib.DEFLATED, MAX_WBITS=zlib.MAX_WBITS,
    Z_SYNC_FLUSH=zlib.Z_SYNC_FLUSH, crc32=zlib.crc32, crc32_combine=isal.crc32_combine,
)
""",
    "empty slices of masks compressed like other slices": """
import totalfast.files.write as write
def zeros(length):
    used.append(1)
    return write.compress(bytes(length))
write.zeros = zeros
""",
    "every slice searched for every label": """
import numpy, totalfast.files.write as write
def everywhere(labels, threads):
    used.append(1)
    return numpy.ones((labels.shape[2], 256), bool)
write._present_labels = everywhere
""",
    "masks saved by nibabel": """
import totalfast.files.write as write
def save(image, names, *, folder, files, threads):
    import nibabel, numpy
    used.append(1)
    voxels = numpy.asanyarray(image.dataobj)
    header = image.header.copy()
    header.extensions.clear()
    for label, name in names.items():
        mask = nibabel.Nifti1Image((voxels == label).astype(numpy.uint8), image.affine, header)
        files.write(folder / f"{name}.nii.gz", lambda path: nibabel.save(mask, path))
import totalfast.run.results
totalfast.run.results.write_masks = save
""",
    "full shutdown of the interpreter": """
import os, sys
def leave(code):
    used.append(1)
    report()  # again, because the functions at exit have run
    raise SystemExit(code)
os._exit = leave
""",
}
"""Name of each variant, and its code, which appends to ``used`` when the replacement is called."""

START = """
import atexit, os, runpy, sys
prelude, used = sys.argv[1], []
@atexit.register
def report():
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    with open(os.environ["TOTALFAST_ABLATION"], "w") as file:
        file.write(f"{int(bool(used) or not prelude)} {status['VmHWM'].split()[0]}")
exec(prelude, {"used": used, "report": report})
from totalfast.system.process_memory import prepare_process
prepare_process()  # as the command does, before it imports torch
sys.argv = ["totalfast", *sys.argv[2:]]
runpy.run_module("totalfast", run_name="__main__", alter_sys=True)
"""

ROWS_BETWEEN = 5
"""Number of rows between two runs of the baseline."""

SETTLE_S = 2.0
"""Pause before each run. All runs are short and similar."""


def run_once(
    prelude: str, words: list[str | Path], environment: dict[str, str], report: Path
) -> dict[str, float] | None:
    """Run the command; return wall and CPU seconds, and peak bytes of its process.

    Returns None if the command did not call the replaced code.
    """
    seconds = run(
        [sys.executable, "-c", START, prelude, *words],
        {**environment, "TOTALFAST_ABLATION": str(report)},
        timed=True,
        watched=False,
        settle_s=SETTLE_S,
    )
    used, peak_kb = report.read_text().split()
    if used != "1":
        return None
    return seconds | {"peak_bytes": 1024 * int(peak_kb)}


def differences(row: str, expected: Path, actual: Path) -> int:
    """Return the number of differing voxels plus other differences; skips files of equal bytes."""
    files, others = (
        {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
        for folder in (expected, actual)
    )
    equal, *_ = filecmp.cmpfiles(expected, actual, files, shallow=False)
    if len(equal) == len(files | others):
        return 0
    compared = compare_folders(row, expected, actual)
    return compared.differing_voxels + len(compared.problems)


def order(repeat: int, rows: list[str]) -> list[str]:
    """Return all rows in random order, with the baseline before, between and after them."""
    others = [row for row in rows if row != BASELINE]
    random.Random(repeat).shuffle(others)  # noqa: S311 - not for security
    parts = [others[k : k + ROWS_BETWEEN] for k in range(0, len(others), ROWS_BETWEEN)]
    return [row for part in parts for row in (BASELINE, *part)] + [BASELINE]


def ablate(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Run all rows in all rounds."""
    scan = make_scan(options.scan, scratch)
    environment = {**os.environ, "TOTALSEG_HOME_DIR": str(options.home.absolute())}
    environment["TOTALFAST_BACKEND"] = "torch"
    name = target_name(options.flags)
    runs: dict[str, list[dict[str, Any]]] = {}
    differing = {}
    for repeat in range(options.repeats + 1):  # round 0 fills numba's and the disk's caches
        for row in order(repeat, list(runs) if repeat else list(ABLATIONS)):
            target = scratch / row / name
            words = ["-i", scan, "-o", target, "-d", options.device, "-q", *options.flags]
            measured = run_once(ABLATIONS[row], words, environment, scratch / "report")
            if measured is None:
                continue
            if repeat:
                runs[row].append(measured)
            elif row not in runs:
                runs[row] = []
                differing[row] = differences(row, scratch / BASELINE, target.parent)
        print(f"round {repeat} of {options.repeats}", flush=True)
    medians = {
        row: {key: statistics.median(run[key] for run in row_runs) for key in row_runs[0]}
        | {"differing": differing[row]}
        for row, row_runs in runs.items()
    }
    return {
        "name": options.name,
        "scan": options.scan,
        "flags": options.flags,
        "weights": WEIGHTS,
        "machine": machine(options.device),
        "runs": runs,
        "median": medians,
    }


COLUMNS = {"wall_s": (1, "s", 1), "cpu_s": (1, "s", 1), "peak_bytes": (1e9, "GB", 2)}
"""Per case: the key in the results to scale, unit and number of decimals."""


def table(results: list[dict[str, Any]]) -> str:
    """Return time and memory of each variant minus those of the baseline, cases side by side."""
    first = results[0]["median"]
    slowest_first = sorted(first, key=lambda row: -first[row]["wall_s"])
    others = [row for result in results for row in result["median"]]
    rows = dict.fromkeys([BASELINE, *slowest_first, *others])
    names = [f"{result['name']}: wall | CPU | peak memory" for result in results]
    lines = [f"| variant | {' | '.join(names)} |", "|---" * (1 + 3 * len(names)) + "|"]
    rows_cells = [[row, *(_cells(result, row) for result in results)] for row in rows]
    lines += [f"| {' | '.join(cells)} |" for cells in rows_cells]
    return "\n".join([*lines, "", *map(_footnote, results)]) + "\n"


def _cells(result: dict[str, Any], row: str) -> str:
    if row not in result["median"]:
        return "- | - | -"
    median, baseline = result["median"][row], result["median"][BASELINE]
    cells = []
    for key, (scale, unit, digits) in COLUMNS.items():
        if row == BASELINE:
            text = f"{median[key] / scale:.{digits}f}"
        else:
            text = f"{(median[key] - baseline[key]) / scale:+.{digits}f}"
        cells.append(f"{text} {unit}")
    return " | ".join(cells)


def _footnote(result: dict[str, Any]) -> str:
    walls = sorted(run["wall_s"] for run in result["runs"][BASELINE])
    repeats = max(len(runs) for row, runs in result["runs"].items() if row != BASELINE)
    return (
        f"{result['name']}: {result['scan']}, `{' '.join(result['flags'])}`, {result['weights']}; "
        f"medians of {repeats} runs. {len(walls)} runs with all optimisations took "
        f"{walls[0]:.1f} to {walls[-1]:.1f} s, so smaller differences mean nothing."
    )


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("home", type=Path, help="TOTALSEG_HOME_DIR with stand-in weights")
    parser.add_argument("scan", help="a NIfTI file, or phantom:NXxNYxNZ:SXxSYxSZ")
    parser.add_argument("--json", type=Path, required=True, help="write the results to this file")
    parser.add_argument("--repeats", type=int, default=3)
    add_device(parser)
    parser.add_argument("--name", required=True, help="name of the case in the table")
    parser.add_argument(
        "--readme",
        type=Path,
        nargs="*",
        metavar="FILE",
        help="also write the table in scripts/results, together with the results of other cases",
    )
    options = parse_with_flags(parser)
    with tempfile.TemporaryDirectory(prefix="totalfast-ablation-") as scratch:
        result = ablate(options, Path(scratch))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(table([result]))
    if options.readme is not None:
        others = [json.loads(path.read_text()) for path in options.readme]
        write_table(Path(__file__).name, table([*others, result]))
    return int(any(median["differing"] for median in result["median"].values()))


if __name__ == "__main__":
    sys.exit(main())
