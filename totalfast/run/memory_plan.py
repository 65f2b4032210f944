"""What a run will need of memory, before it takes any.

Knows headers, tasks and model folders' plans; knows nothing of arrays, and allocates none. The
figures are upper estimates of what a run holds at a time; ``scripts/benchmark_scaling.py``
compares them with measured peaks.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from totalfast.engine.model_summary import ModelSummary
from totalfast.errors import MemoryLimitError
from totalfast.system.cores import usable_cores
from totalfast.system.memory import GB, free_device_bytes, free_host_bytes

if TYPE_CHECKING:
    from totalfast.geometry import Grid
    from totalfast.options import Options

    pass
    from totalfast.tasks import Task

logger = logging.getLogger(__name__)

PROGRAM_BYTES = int(0.45 * GB)
"""Python with nnU-Net and torch 2.14 imported."""

LIBRARY_BYTES = int(0.4 * GB)
"""Pages of a CUDA build of torch that are mapped from its files: up to 0.7 GB, as the system likes,
which takes them back where memory is short."""

COMPILER_BYTES = int(0.1 * GB)
"""Numba, where logits or cubic splines are interpolated."""

SLAB_BYTES = 100_000_000
CUBIC_SLAB_BYTES = 200_000_000
"""What a thread resamples at a time, in float64 (stages.resample, cubic)."""

SPLINE_SLICES = 160
"""Of the scan, at most, that a thread holds three times for splines of orders 2, 4 and 5."""


MARGIN = 1.05
"""Of the estimate, for what allocators keep."""

DEVICE_SHARE = 0.9
"""Of a device's free memory that a plan takes: the rest is the allocator's loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredScan:
    """A scan as its header describes it.

    Parameters
    ----------
    shape
        (x, y, z).
    itemsize
        Bytes of a voxel as stored.
    kept
        Whether its voxels stay in memory while networks run.
    """

    shape: tuple[int, ...]
    itemsize: int
    kept: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """What a run needs at most, in bytes, and where it sums up logits."""

    host: float
    device: float
    on_device: bool

    def check(self, budget: Budget) -> None:
        """Say what was planned.

        Raises
        ------
        MemoryLimitError
            If the user's limit is lower. Less free memory than planned is only warned of, as the
            plan is an upper estimate, and other programs come and go.
        """
        text = f"about {self.host / GB:.1f} GB"
        if budget.device is not None:
            where = "GPU" if self.on_device else "CPU"
            logger.info(
                "Memory: %s; GPU: about %.1f of %.1f GB; logits are summed up on the %s",
                text, self.device / GB, budget.device / GB, where,
            )  # fmt: skip
        elif budget.host is not None:
            logger.info("Memory: %s of %.1f GB", text, budget.host / GB)
        if budget.host is None or self.host <= budget.host:
            return
        advice = "Use a coarser model (--fast, --fastest), or crop the scan"
        if budget.is_limit:
            raise MemoryLimitError(
                f"this run needs {text} of memory; max_memory allows {budget.host / GB:.1f} GB. "
                f"{advice}, or allow more."
            )
        logger.warning(
            "WARNING: this run needs %s of memory, and %.1f GB are free. %s, if it fails.",
            text, budget.host / GB, advice,
        )  # fmt: skip


def plan_memory(
    scan: StoredScan,
    region: Grid,
    *,
    task: Task,
    options: Options,
    budget: Budget,
    keeps_models: bool = True,
) -> MemoryPlan:
    """Estimate what labelling a region of a scan takes, and decide where logits are summed up.

    Parameters
    ----------
    scan
        The whole scan.
    region
        The grid that is labelled: the scan's, or that of the part that the task looks at.
    task
        Its crop, if any, counts as done.
    options
        What else is asked for.
    budget
        What there is.
    keeps_models
        Whether all of the task's models are in memory in the end, or two at a time.
    """
    native, threads = math.prod(scan.shape), usable_cores()
    canonical = region.canonical()
    grid = canonical.resampled(task.spacing_mm) if task.spacing_mm else canonical
    networks = [ModelSummary.of(task, part) for part in task.parts]
    files = [network.weights for network in networks]
    weights = sum(files) if keeps_models else sum(sorted(files)[-2:])
    device = weights + max(net.forward + net.answer + net.image(grid) for net in networks)
    window = max(net.window(grid) for net in networks)
    on_device = budget.device is not None and device + window <= DEVICE_SHARE * budget.device

    smooth = options.export == "linear"
    stored, image = scan.itemsize * native, 4 * math.prod(grid.shape)
    kept, labels = scan.kept * stored, native if smooth else math.prod(grid.shape)
    slab = CUBIC_SLAB_BYTES if options.resampling_order == 3 else SLAB_BYTES
    if options.resampling_order in (2, 4, 5):
        slab = 3 * 8 * SPLINE_SLICES * math.prod(scan.shape[:2])
    preparing = image + max(net.image(grid) for net in networks) + threads * SLAB_BYTES
    predicting = max(
        (1 + net.pads(grid)) * net.image(grid)
        + (net.summing(grid) if budget.device is None else net.answer)
        + (net.window(grid) if budget.device is not None and not on_device else 0)
        + (net.logits(grid) if options.save_probabilities else 0)
        for net in networks
    )
    stages = {
        "inflating": 2 * stored,
        "resampling": stored + image + threads * slab,
        "predicting": kept + image + 2 * labels + max(preparing, predicting),
        "restoring": kept + labels + 3 * native,
    }
    compiles = smooth or options.resampling_order == 3
    program = PROGRAM_BYTES + LIBRARY_BYTES + compiles * COMPILER_BYTES
    host = program + weights + max(stages.values())
    return MemoryPlan(host=MARGIN * host, device=device + on_device * window, on_device=on_device)


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Memory that a run may take, in bytes.

    Parameters
    ----------
    host
        None if the system does not tell.
    device
        Free on the CUDA device that networks run on; None: they run on the CPU.
    is_limit
        Whether the user has set ``host``, so that needing more is an error.
    """

    host: float | None
    device: float | None
    is_limit: bool

    @classmethod
    def of(cls, options: Options) -> Budget:
        """Take the user's limit, or else what is free now."""
        limit = options.max_memory_gb
        return cls(
            host=free_host_bytes() if limit is None else limit * GB,
            device=free_device_bytes(options.device),
            is_limit=limit is not None,
        )
