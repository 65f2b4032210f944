"""Switch each optimisation off by itself, and see what the command then costs.

    python scripts/ablation.py HOME SCAN --json FILE [--repeats N] [-- FLAGS ...]

Runs ``totalfast`` as a whole process, once as it is and once for each row of ``ABLATIONS`` with
that row's lines executed first, which put the plain way in place of the fast one. All take turns;
the medians are kept, with the voxels that differ from the run as it is (none, or the row compares
two different things). HOME: stand-ins made by scripts/make_standin_weights.py, tiny ones if what
lies around the network is to be seen. SCAN: as for benchmark_command.py. Prints README's table.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmark_command import compare_folders, machine, make_scan
from readme import write_table

ABLATIONS = {
    "as it is": "",
    "one thread outside of the network": """
import totalfast.cores
totalfast.cores.usable_cores = lambda: 1
""",
    "scan read by Python's gzip instead of ISA-L": """
import numpy, totalfast.stages.read as read
read._inflate = lambda path, proxy: numpy.asanyarray(proxy.get_unscaled())
""",
    "models loaded after the scan is read": """
import totalfast.pipeline
totalfast.pipeline._begin_loading = lambda run, task: None
""",
    "checkpoints read instead of mapped": """
import totalfast.weights as weights
mapped = weights.read_checkpoint
def read(path):
    import torch
    load = torch.load
    torch.load = lambda *arguments, mmap=None, **keywords: load(*arguments, **keywords)
    try:
        return mapped(path)
    finally:
        torch.load = load
weights.read_checkpoint = read
""",
    "imports as upstream's": """
import totalsegmentator.python_api
import nnunetv2.inference.predict_from_raw_data
""",
    "scan resampled by scipy, whole": """
import totalfast.stages.resample as resample
def whole(voxels, image, stored, threads):
    from scipy import ndimage
    target = voxels.T
    zoom = [m / n for n, m in zip(stored.shape, target.shape)]
    scaled = ndimage.zoom(image.scale(stored), zoom, order=3, mode="nearest")
    target[...] = resample.truncate(scaled)
resample._fill_cubic = whole
""",
    "last layer run on the whole tile": """
import totalfast.backends.forward as forward
forward.split_head = lambda network: (network, None)
""",
    "accumulators allocated at once": """
import totalfast.sliding_window as window
def zeros(shape, device):
    import torch
    return torch.zeros(shape, dtype=torch.half, device=device)
window._zeros = zeros
""",
    "logits weighted and added without a slice's memory": """
import totalfast.sliding_window as window
def add_up(self, total, logits, weight):
    logits *= weight
    total += logits
window._RollingWindow._add_up = add_up
""",
    "no huge pages": """
import os
os.environ["THP_MEM_ALLOC_ENABLE"] = "0"
""",
    "labels picked voxel by voxel": """
import totalfast.export.nearest as nearest
def gather(labels, indices, *, threads):
    z, y, x = indices
    return labels[z[:, None, None], y[:, None], x]
nearest.gather = gather
""",
    "masks compressed by zlib instead of ISA-L": """
import types, zlib
import totalfast.gzip_member as gzip_member
isal = gzip_member.isal_zlib
gzip_member.isal_zlib = types.SimpleNamespace(
    compressobj=zlib.compressobj, DEFLATED=zlib.DEFLATED, MAX_WBITS=zlib.MAX_WBITS,
    Z_SYNC_FLUSH=zlib.Z_SYNC_FLUSH, crc32=zlib.crc32, crc32_combine=isal.crc32_combine,
)
""",
    "empty slices of masks compressed like others": """
import totalfast.stages.write as write
write.zeros = lambda length: write.compress(bytes(length))
""",
    "each mask compressed whole": """
import numpy, totalfast.stages.write as write
write._present_labels = lambda labels, threads: numpy.ones((labels.shape[2], 256), bool)
""",
    "masks saved by nibabel": """
import totalfast.stages.write as write
def save(image, names, *, folder, files, threads):
    import nibabel, numpy
    voxels = numpy.asanyarray(image.dataobj)
    header = image.header.copy()
    header.extensions.clear()
    for label, name in names.items():
        mask = nibabel.Nifti1Image((voxels == label).astype(numpy.uint8), image.affine, header)
        path = files.path(folder / f"{name}.nii.gz", ending=".nii.gz")
        nibabel.save(mask, path)
import totalfast.deliver
totalfast.deliver.write_masks = save
""",
    "interpreter taken down at the end": """
import os, sys
def leave(code):
    raise SystemExit(code)
os._exit = leave
""",
}
"""What is switched off, and the lines that do it."""

START = """
import runpy, sys
exec(sys.argv[1])
sys.argv = ["totalfast", *sys.argv[2:]]
runpy.run_module("totalfast", run_name="__main__", alter_sys=True)
"""

SETTLE_S = 2.0


def run_once(prelude: str, words: list[str | Path], environment: dict[str, str]) -> dict[str, Any]:
    """Run the command; wall and CPU seconds, and the peak of its one process."""
    time.sleep(SETTLE_S)
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", START, prelude, *words],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    errors = process.stderr.read() if process.stderr else b""
    _, status, used = os.wait4(process.pid, 0)
    wall = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{prelude}\nfailed: {errors.decode()[-2000:]}")
    return {
        "wall_s": wall,
        "cpu_s": used.ru_utime + used.ru_stime,
        "peak_bytes": used.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
    }


def ablate(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Run all rows in turn."""
    scan = make_scan(options.scan, scratch)
    environment = {**os.environ, "TOTALSEG_HOME_DIR": str(options.home.absolute())}
    environment["TOTALFAST_BACKEND"] = "torch"
    name = "seg.nii.gz" if "-ml" in options.flags else "seg"
    runs: dict[str, list[dict[str, Any]]] = {row: [] for row in ABLATIONS}
    differing = {}
    for repeat in range(options.repeats + 1):  # the first fills numba's cache and the disk's
        for number, (row, prelude) in enumerate(ABLATIONS.items()):
            target = scratch / str(number) / name
            words = ["-i", scan, "-o", target, "-d", "cpu", "-q", *options.flags]
            figures = run_once(prelude, words, environment)
            if repeat:
                runs[row].append(figures)
                continue
            compared = compare_folders(row, scratch / "0", scratch / str(number))
            differing[row] = compared.differing_voxels + len(compared.problems)
        print(f"round {repeat} of {options.repeats}", flush=True)
    medians = {
        row: {key: statistics.median(run[key] for run in some) for key in some[0]}
        | {"differing": differing[row]}
        for row, some in runs.items()
    }
    return {
        "scan": options.scan,
        "flags": options.flags,
        "weights": "stand-in weights, not TotalSegmentator's (scripts/make_standin_weights.py)",
        "machine": machine(),
        "runs": runs,
        "median": medians,
    }


def table(result: dict[str, Any]) -> str:
    """Seconds and memory of each row, above those of the run as it is."""
    medians = result["median"]
    base = medians["as it is"]
    lines = ["| switched off | wall | CPU | peak memory |", "|---|---|---|---|"]
    for row, figures in medians.items():
        cells = [row]
        for key, scale, unit in (("wall_s", 1, "s"), ("cpu_s", 1, "s"), ("peak_bytes", 1e9, "GB")):
            value = figures[key] / scale
            more = value - base[key] / scale
            digits = 2 if unit == "GB" else 1
            cells.append(f"{value:.{digits}f} {unit}" if row == "as it is" else
                         f"{more:+.{digits}f} {unit}")  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    repeats = len(result["runs"]["as it is"])
    lines += ["", f"{result['scan']}, `{' '.join(result['flags'])}`, {result['weights']}; "
              f"medians of {repeats}."]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("home", type=Path, help="TOTALSEG_HOME_DIR with stand-ins")
    parser.add_argument("scan", help="a NIfTI file, or phantom:NXxNYxNZ:SXxSYxSZ")
    parser.add_argument("--json", type=Path, required=True, help="write the figures here")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--readme", action="store_true", help="put the table into README.md")
    arguments = sys.argv[1:]
    split = arguments.index("--") if "--" in arguments else len(arguments)
    options = parser.parse_args(arguments[:split])
    options.flags = arguments[split + 1 :]
    with tempfile.TemporaryDirectory(prefix="totalfast-ablation-") as scratch:
        result = ablate(options, Path(scratch))
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))
    if options.readme:
        write_table(Path(__file__).name, table(result))
    return int(any(figures["differing"] for figures in result["median"].values()))


if __name__ == "__main__":
    sys.exit(main())
