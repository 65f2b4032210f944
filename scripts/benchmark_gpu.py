"""Time totalfast on a CUDA GPU with upstream beside it, and compare the labels.

    python scripts/benchmark_gpu.py SECONDS [STEP ...]

Results go to ``$OUT/gpu.json`` (default: the current folder) after each step, so that a run that
is cut off leaves what it measured. Steps are the functions ``step_*`` below, in the order of
``STEPS``. Weights are stand-ins, not TotalSegmentator's (scripts/make_standin_weights.py): the 3 mm
model and one part of the 1.5 mm model are fitted; the other parts are copies of that part with
other last layers.

Upstream runs without cucim. Where cupy and cucim are installed, it resamples by another rule, and
its labels differ from its own on a CPU. Step ``cucim`` measures that difference.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import psutil

SCRIPTS = Path(__file__).resolve().parent
SHAPE = os.environ.get("SCAN", "phantom:488x404x336:0.75x0.75x1")
DEVICE = os.environ.get("DEVICE", "gpu")
OUT = Path(os.environ.get("OUT", "."))
WORK = Path(os.environ.get("WORK", "/tmp/totalfast-gpu"))  # noqa: S108 - a benchmark's own folder
HOME, SCAN = WORK / "home", WORK / "ct.nii.gz"
RESULTS = HOME / "nnunet/results"
ENVIRONMENT = {
    **os.environ,
    "TOTALSEG_HOME_DIR": str(HOME),
    "TOTALFAST_CACHE_DIR": str(WORK / "cache"),
    "NUMBA_CACHE_DIR": str(WORK / "cache"),
}

UPSTREAM = """
import runpy, sys
import totalsegmentator.resampling as resampling
resampling.cucim_available = sys.argv.pop(1) == "cucim" and resampling.cucim_available
if __name__ == "__main__":
    runpy.run_module("totalsegmentator.bin.TotalSegmentator", run_name="__main__")
"""

PART_FOLDERS = {
    292: "part2_vertebrae_1532subj",
    293: "part3_cardiac_1559subj",
    294: "part4_muscles_1559subj",
    295: "part5_ribs_1559subj",
}
LEAST_VOXELS = 100
"""Smaller structures do not count for the lowest Dice."""

deadline = time.time() + 480.0
measured: dict[str, Any] = {}


def keep(name: str, value: Any) -> None:
    """Add a result and write all results."""
    measured[name] = value
    (OUT / "gpu.json").write_text(json.dumps(measured, indent=1, default=str))
    print(f"== {name}: {json.dumps(value, default=str)[:1500]}", flush=True)


def seconds_left() -> float:
    """Seconds until the time limit."""
    return deadline - time.time()


def watch_vram(stop: threading.Event, peak: list[int]) -> None:
    """Record the peak of the card's used memory, MB."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    while shutil.which("nvidia-smi") and not stop.wait(0.3):
        answer = subprocess.run(query, capture_output=True, text=True, check=False)
        if answer.returncode == 0:
            peak[0] = max(peak[0], int(answer.stdout.split()[0]))


def tree_mb(pid: int) -> float:
    """Sum of the resident memory of a process tree, MB; shared pages count several times."""
    total = 0
    try:
        for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
            total += process.memory_info().rss
    except psutil.Error:
        return 0.0
    return total / 2**20


def timed(words: list[Any], *, limit_s: float = 150.0) -> dict[str, Any]:
    """Run a command: wall seconds, peak VRAM, peak host memory; its last lines if it failed."""
    if seconds_left() < 20:
        return {"skipped": "no time left"}
    stop, peak = threading.Event(), [0]
    watch = threading.Thread(target=watch_vram, args=(stop, peak), daemon=True)
    watch.start()
    began, host, log = time.time(), 0.0, WORK / "last.log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            [str(word) for word in words], env=ENVIRONMENT, stdout=stream,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        while process.poll() is None:
            host = max(host, tree_mb(process.pid))
            if time.time() - began > min(limit_s, max(seconds_left(), 1.0)):
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                stop.set()
                return {"killed_after_s": round(time.time() - began, 1)}
            time.sleep(0.1)
    wall = time.time() - began
    stop.set()
    watch.join()
    text = log.read_text(errors="replace")
    row: dict[str, Any] = {
        "wall_s": round(wall, 2),
        "vram_mb": peak[0],
        "host_rss_mb": round(host),
        "rc": process.returncode,
        "lines": re.findall(r"(?:Resampled|Predicted|Saved) in [\d.]+s|Done in [\d.]+ s", text),
    }
    if process.returncode:
        row["tail"] = text[-800:]
    return row


def command(program: str, target: Path, flags: list[str]) -> list[Any]:
    """Words that run a program: "totalfast", "upstream", or "upstream, cucim"."""
    start = [sys.executable, "-m", "totalfast"]
    if program != "totalfast":
        script = WORK / "upstream.py"
        script.write_text(UPSTREAM)
        start = [sys.executable, str(script), "cucim" if "cucim" in program else "scipy"]
    return [*start, "-i", SCAN, "-o", target, "-d", DEVICE, *flags]


def run_python(code: str, limit_s: float = 120.0) -> tuple[str, str, int]:
    """Run Python code: its output, its errors, its exit code."""
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=ENVIRONMENT, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    timer = threading.Timer(
        max(min(limit_s, seconds_left()), 1.0), lambda: os.killpg(process.pid, signal.SIGKILL)
    )
    timer.start()
    text, errors = process.communicate()
    timer.cancel()
    return text, errors, process.returncode


def compare_files(pair: tuple[Path, Path]) -> tuple[int, int, list[tuple[float, str]]]:
    """Differing voxels, voxels, and Dice of each structure of two files."""
    one, other = pair
    a, b = (np.asanyarray(nib.load(path).dataobj).astype(np.uint8) for path in pair)
    counts = np.bincount((a.ravel().astype(np.uint16) << 8) | b.ravel(), minlength=1 << 16)
    table = counts.reshape(256, 256)
    both, of_a, of_b = np.diag(table), table.sum(axis=1), table.sum(axis=0)
    scores = [
        (float(2 * both[label] / (of_a[label] + of_b[label])), f"{one.name}:{label}")
        for label in range(1, 256)
        if max(of_a[label], of_b[label]) >= LEAST_VOXELS
    ]
    return int(table.sum() - both.sum()), int(a.size), scores


def differing(one: Path, other: Path) -> dict[str, Any]:
    """Differing voxels of two label maps or folders of masks, and the lowest Dice."""
    if not one.exists() or not other.exists():
        return {"missing": [str(path) for path in (one, other) if not path.exists()]}
    names = sorted(path.name for path in one.glob("*.nii.gz")) if one.is_dir() else [None]
    pairs = [(one / name, other / name) if name else (one, other) for name in names]
    with ProcessPoolExecutor() as pool:
        rows = list(pool.map(compare_files, pairs))
    scores = [score for row in rows for score in row[2]]
    lowest, where = min(scores, default=(1.0, ""))
    return {
        "differing": sum(row[0] for row in rows),
        "voxels": sum(row[1] for row in rows),
        f"lowest_dice_of_{LEAST_VOXELS}_voxels": lowest,
        "where": where,
    }


def step_machine() -> None:
    """Card, versions, and the seconds that CUDA takes to start."""
    import torch

    began = time.time()
    if torch.cuda.is_available():
        torch.zeros(1, device="cuda")
        torch.cuda.synchronize()
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    keep("machine", {
        "gpu": card, "torch": torch.__version__, "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(), "cores": os.cpu_count(),
        "cuda_init_s": round(time.time() - began, 2),
    })  # fmt: skip


def step_scan() -> None:
    """Make or copy the scan."""
    sys.path[:0] = [str(SCRIPTS.parent), str(SCRIPTS)]
    import benchmark_command

    made = benchmark_command.make_scan(SHAPE, WORK)
    if made != SCAN:
        shutil.copy(made, SCAN)
    keep("scan", {"source": SHAPE, "bytes": SCAN.stat().st_size})


def step_standins() -> None:
    """Make the stand-in weights of models 297 and 291, and copy 291 to the other parts."""
    began = time.time()
    maker = SCRIPTS / "make_standin_weights.py"
    makers = [
        subprocess.Popen([sys.executable, maker, HOME, "--ids", number], env=ENVIRONMENT)
        for number in ("297", "291")
    ]
    codes = [process.wait(timeout=max(seconds_left(), 1.0)) for process in makers]
    copy_part_models()
    keep("standins", {"s": round(time.time() - began, 1), "rc": codes})


def copy_part_models() -> None:
    """The other four parts of the 1.5 mm model, with other last layers."""
    import torch

    from totalfast.upstream import PART_CLASS_MAPS, PART_NAMES

    (first,) = RESULTS.glob("Dataset291_*/*")
    checkpoint = torch.load(first / "fold_0/checkpoint_final.pth", weights_only=False)
    dataset = json.loads((first / "dataset.json").read_text())
    for number, end in PART_FOLDERS.items():
        names = list(PART_CLASS_MAPS["total"][PART_NAMES["total"][number]].values())
        labels = {"background": 0} | {name: k + 1 for k, name in enumerate(names)}
        folder = RESULTS / f"Dataset{number}_TotalSegmentator_{end}" / first.name
        (folder / "fold_0").mkdir(parents=True, exist_ok=True)
        shutil.copy(first / "plans.json", folder)
        (folder / "dataset.json").write_text(json.dumps(dataset | {"labels": labels}))
        weights = dict(checkpoint["network_weights"])
        for key in [key for key in weights if ".seg_layers." in key]:
            old = weights[key]
            count = old.shape[0]
            rows = [k if k < count else 1 + (k * 7) % (count - 1) for k in range(len(labels))]
            weights[key] = old[torch.tensor(rows)].clone()
        torch.save(
            checkpoint | {"network_weights": weights}, folder / "fold_0/checkpoint_final.pth"
        )


def step_fast() -> None:
    """--fast, one mask per class: upstream twice, totalfast with cold and with warm caches."""
    base = WORK / "fast"
    rows: dict[str, Any] = {}
    for label, program in (
        ("upstream", "upstream"),
        ("totalfast_first", "totalfast"),
        ("totalfast", "totalfast"),
        ("upstream_again", "upstream"),
    ):
        rows[label] = timed(command(program, base / label, ["--fast"]))
        keep("fast_per_class", rows)
    rows["ours_vs_upstream"] = differing(base / "upstream", base / "totalfast")
    rows["upstream_vs_itself"] = differing(base / "upstream", base / "upstream_again")
    rows["ours_vs_itself"] = differing(base / "totalfast_first", base / "totalfast")
    keep("fast_per_class", rows)


def step_cucim() -> None:
    """Upstream's --fast with cucim (if installed) against upstream without it."""
    base = WORK / "fast"
    rows = {"upstream_cucim": timed(command("upstream, cucim", base / "cucim", ["--fast"]))}
    rows["cucim_vs_upstream"] = differing(base / "upstream", base / "cucim")
    keep("cucim", rows)


def step_total() -> None:
    """1.5 mm, label map."""
    base = WORK / "total"
    base.mkdir(exist_ok=True)
    rows: dict[str, Any] = {}
    for label in ("totalfast_first", "totalfast", "upstream"):
        words = command(label.partition("_")[0], base / f"{label}.nii.gz", ["-ml"])
        rows[label] = timed(words)
        keep("total_ml", rows)
    rows["ours_vs_upstream"] = differing(base / "upstream.nii.gz", base / "totalfast.nii.gz")
    keep("total_ml", rows)


def step_session() -> None:
    """Calls in one process, one after the other, with torch's peak of VRAM."""
    text, errors, code = run_python(f"""
import json, time, torch, totalfast
session = totalfast.Session(device={DEVICE!r})
cuda = torch.cuda.is_available()
for fast in (True, True, True, False, False, False):
    if cuda: torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    session.segment({str(SCAN)!r}, None, fast=fast, ml=True, quiet=True, skip_saving=True)
    vram = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0
    row = dict(fast=fast, s=round(time.perf_counter() - began, 3), vram_gb=round(vram, 2))
    print(json.dumps(row), flush=True)
""")
    calls = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    keep("session", {"calls": calls, "rc": code, "errors": errors[-1500:] if code else ""})


def step_where() -> None:
    """Profile a warm call by function, and by kernel, into $OUT/where.txt."""
    text, errors, code = run_python(f"""
import cProfile, pstats, torch, totalfast
session = totalfast.Session(device={DEVICE!r})
target = {str(WORK / "where.nii.gz")!r}
go = lambda fast: session.segment({str(SCAN)!r}, target, fast=fast, ml=True, quiet=True)
for fast in (True, False):
    go(fast)
    profile = cProfile.Profile(); profile.enable(); go(fast); profile.disable()
    print("FAST" if fast else "TOTAL")
    pstats.Stats(profile).sort_stats("cumulative").print_stats(45)
if torch.cuda.is_available():
    from torch.profiler import ProfilerActivity, profile as kernels
    with kernels(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found: go(True)
    print(found.key_averages().table(sort_by="cuda_time_total", row_limit=25))
""")
    (OUT / "where.txt").write_text(text + errors)
    keep("where", {"rc": code, "lines": text.count("\n"), "errors": errors[-500:] if code else ""})


def step_network() -> None:
    """One 128x128x128 tile of the official architecture, by several means."""
    import torch
    from dynamic_network_architectures.architectures.unet import PlainConvUNet

    network = PlainConvUNet(
        1, 6, [32, 64, 128, 256, 320, 320], torch.nn.Conv3d, 3, [1, 2, 2, 2, 2, 2], 2, 25,
        [2] * 5, conv_bias=True, norm_op=torch.nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True}, nonlin=torch.nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
    ).cuda().eval()  # fmt: skip
    rows: dict[str, Any] = {}

    def clock(name: str, call: Any, batch: int = 1, repeats: int = 8) -> None:
        with torch.inference_mode(), torch.autocast("cuda"):
            began = time.time()
            call()
            torch.cuda.synchronize()
            first = time.time() - began
            call()
            start, stop = torch.cuda.Event(True), torch.cuda.Event(True)
            start.record()
            for _ in range(repeats):
                call()
            stop.record()
            torch.cuda.synchronize()
        ms = start.elapsed_time(stop) / repeats / batch
        rows[name] = {"first_s": round(first, 2), "ms_per_tile": round(ms, 2)}
        keep("network", rows)

    tile = torch.randn(1, 1, 128, 128, 128, device="cuda")
    for benchmark in (False, True):
        torch.backends.cudnn.benchmark = benchmark
        clock(f"autocast, benchmark {benchmark}", lambda: network(tile))
    two = tile.repeat(2, 1, 1, 1, 1)
    clock("batch 2", lambda: network(two), batch=2)
    last, layout = network.to(memory_format=torch.channels_last_3d), torch.channels_last_3d
    clock("channels last", lambda: last(tile.to(memory_format=layout)))


def step_export() -> None:
    """118 classes, 100x134x134 to 300x512x512, logits on the device."""
    import torch

    from totalfast.export import export_labels

    shape, target = (100, 134, 134), (300, 512, 512)
    random = torch.Generator(device="cuda").manual_seed(0)
    coarse = torch.randn(1, 118, 13, 17, 17, device="cuda", generator=random)
    logits = torch.nn.functional.interpolate(coarse, shape, mode="trilinear")[0].half().contiguous()
    rows: dict[str, Any] = {}

    def exported(source: Any, method: str) -> np.ndarray:
        return export_labels(
            source, target, method=method, spacing=(3, 3, 3), new_spacing=(1, 0.785, 0.785)
        )

    for method in ("nearest", "linear"):
        for attempt in ("first", "second"):
            torch.cuda.synchronize()
            began = time.perf_counter()
            labels = exported(logits, method)
            rows[f"{method}_{attempt}_s"] = round(time.perf_counter() - began, 4)
    rows["linear_gpu_vs_cpu_differing"] = int((exported(logits.cpu(), "linear") != labels).sum())
    keep("export", rows)


def step_peer() -> None:
    """FastSegmentator on the same scan and weights, if it is installed."""
    folder = WORK / "peer-in"
    folder.mkdir(exist_ok=True)
    shutil.copy(SCAN, folder / "ct.nii.gz")
    start = "from fastsegmentator.cli import main; main()"
    words = [
        sys.executable, "-c", start, "totalseg", "-i", folder, "-o", WORK / "peer-out",
        "--task", "total", "--weights_dir", RESULTS,
    ]  # fmt: skip
    rows: dict[str, Any] = {"first": timed(words), "second": timed(words)}
    written = sorted((WORK / "peer-out").glob("*.nii.gz"))
    if written:
        rows["vs_upstream"] = differing(WORK / "total/upstream.nii.gz", written[0])
    keep("fastsegmentator_total", rows)


STEPS = (
    "machine", "scan", "standins", "fast", "session", "total", "export", "network", "cucim",
    "where", "peer",
)  # fmt: skip


def main() -> None:
    """Run the named steps, or all."""
    global deadline  # noqa: PLW0603
    deadline = time.time() + float(sys.argv[1] if len(sys.argv) > 1 else 480.0)
    os.environ.update(ENVIRONMENT)
    OUT.mkdir(parents=True, exist_ok=True)
    WORK.mkdir(parents=True, exist_ok=True)
    for name in sys.argv[2:] or STEPS:
        began = time.time()
        if seconds_left() < 15:
            keep(f"{name}_skipped", "no time left")
            continue
        try:
            globals()[f"step_{name}"]()
        except Exception:  # noqa: BLE001 - the other steps are still worth their time
            keep(f"{name}_failed", traceback.format_exc()[-1500:])
        print(f"-- {name}: {time.time() - began:.0f} s, {seconds_left():.0f} s left", flush=True)


if __name__ == "__main__":
    main()
