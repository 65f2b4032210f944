"""Time parts of a run in one process.

    python measure_parts.py machine DEVICE
    python measure_parts.py start DEVICE MODEL
    python measure_parts.py export DEVICE

``machine``: the card and versions. ``start``: seconds of imports, of CUDA's context, and of the
weights of the folder MODEL to the device, one after the other. ``export``: logits to labels on the
device, compared with the CPU's.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from measuring import SCRIPTS, answer, my_turn, synchronised, torch_device

sys.path.insert(0, str(SCRIPTS))

SHAPE, TARGET, CLASSES = (100, 134, 134), (300, 512, 512), 118
ON_CPU = ((20, 27, 27), (60, 102, 102), 12)
"""The same for a try on the CPU."""


def machine(device: str) -> dict[str, Any]:
    """Card, processor, versions."""
    import torch
    from benchmark_command import machine as processor_and_versions

    facts: dict[str, Any] = {"gpu": "none", "cudnn": torch.backends.cudnn.version()}
    if torch_device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts |= {"gpu": properties.name, "gpu_gb": round(properties.total_memory / 1e9, 1)}
        facts |= {"cuda": torch.version.cuda}
    return facts | processor_and_versions()


def start(device: str, model: str) -> dict[str, Any]:
    """Seconds of each stage before the first tile."""
    row: dict[str, float] = {}
    began = time.perf_counter()

    def stage(name: str) -> None:
        nonlocal began
        row[name] = round(synchronised() - began, 3)
        began = time.perf_counter()

    import torch

    stage("import torch")
    import nnunetv2.inference.predict_from_raw_data  # noqa: F401 - what the import costs

    stage("import nnunetv2")
    import totalfast.run.pipeline  # noqa: F401 - what the import costs

    stage("import totalfast")
    target = torch_device(device)
    torch.zeros(1, device=target)
    stage("context of the device")
    path = Path(model) / "fold_0/checkpoint_final.pth"
    state = torch.load(path, weights_only=False, mmap=True, map_location="cpu")
    stage("read checkpoint")
    weights = {key: value.to(target) for key, value in state["network_weights"].items()}
    stage("weights to the device")
    row["weights_mb"] = sum(value.nbytes for value in weights.values()) / 2**20
    return row


def export(device: str) -> dict[str, Any]:
    """Seconds of ``export_labels``, twice each, and voxels that differ from the CPU's."""
    import torch

    from totalfast.export import export_labels

    target = torch_device(device)
    shape, larger, classes = ON_CPU if target.type == "cpu" else (SHAPE, TARGET, CLASSES)
    random = torch.Generator().manual_seed(0)
    coarse = torch.randn(1, classes, *(n // 8 for n in shape), generator=random).to(target)
    logits = torch.nn.functional.interpolate(coarse, shape, mode="trilinear")[0].half().contiguous()
    row: dict[str, Any] = {"classes": classes, "from": shape, "to": larger}
    spacings = {"spacing": (3, 3, 3), "new_spacing": (1, 0.785, 0.785)}
    for method in ("nearest", "linear"):
        for attempt in ("first", "second", "third"):
            began = synchronised()
            labels = export_labels(logits, larger, method=method, **spacings)
            row[f"{method}_{attempt}_s"] = round(synchronised() - began, 4)
        began = time.perf_counter()
        expected = export_labels(logits.cpu(), larger, method=method, **spacings)
        row[f"{method}_on_cpu_s"] = round(time.perf_counter() - began, 4)
        row[f"{method}_differs_from_cpu"] = int((expected != labels).sum())
    return row


def main() -> None:
    """Command line."""
    os.environ.setdefault("TOTALFAST_BACKEND", "torch")
    my_turn()
    answer({"machine": machine, "start": start, "export": export}[sys.argv[1]](*sys.argv[2:]))


if __name__ == "__main__":
    main()
