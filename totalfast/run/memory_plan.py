"""Estimate the memory of a run from the scan's header and the models' plans.

Nothing is allocated. The estimates are upper bounds; ``scripts/benchmark_scaling.py`` compares them
with measured peaks.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from totalfast.errors import MemoryLimitError
from totalfast.models.model_summary import ModelSummary
from totalfast.system.cores import usable_cores
from totalfast.system.memory import GB, free_host_bytes, total_host_bytes

if TYPE_CHECKING:
    from totalfast.geometry import Grid
    from totalfast.options import Options
    from totalfast.tasks import Task

logger = logging.getLogger(__name__)

PROGRAM_BYTES = int(0.45 * GB)
"""Python with nnU-Net and torch 2.14 imported."""

LIBRARY_BYTES = int(0.4 * GB)
"""Pages of a CUDA build of torch that are mapped from its files: up to 0.7 GB. The system frees
them where memory is short."""

COMPILER_BYTES = int(0.1 * GB)
"""Numba, for networks on a CPU, and for logits or cubic splines that are interpolated."""

SLAB_BYTES = 100_000_000
CUBIC_SLAB_BYTES = 200_000_000
"""Memory of one thread that resamples in float64 (resampling.model_grid, resampling.cubic)."""

SPLINE_SLICES = 160
"""Most slices that a thread holds three times, for splines of orders 2, 4 and 5."""


ADVICE = "Use a coarser model (--fast, --fastest), or crop the scan"
"""What to do if the memory is too small."""

MARGIN = 1.05
"""Factor on the estimate, for memory that allocators keep."""

LOWEST_SHARE = 0.5
"""Share of the estimate that a run takes at least. Measured runs took 0.69 to 0.96 of it
(scripts/results/scaling.json); the estimate is higher for OpenVINO, whose networks need less."""


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
    """Main memory of a run at most, in bytes.

    Parameters
    ----------
    own
        What each run takes: the scan, and what is made of it.
    shared
        What runs in one process share: the program, libraries, and models.
    """

    own: float
    shared: float

    @property
    def host(self) -> float:
        """Bytes of a single run."""
        return self.own + self.shared

    def refuse(self, budget: Budget) -> None:
        """Compare the plan with what the run may take at most.

        Raises
        ------
        MemoryLimitError
            If the user's limit is lower, or without a limit all memory of the machine or of the
            container is certainly too small.
        """
        if self.host <= budget.host:
            return
        if budget.is_limit:
            raise MemoryLimitError(
                f"this run needs {self._text} of memory; max_memory allows "
                f"{budget.host / GB:.1f} GB. {ADVICE}, or allow more."
            )
        if budget.total is not None and LOWEST_SHARE * self.host > budget.total:
            raise MemoryLimitError(
                f"this run needs {self._text} of memory; the machine or container has "
                f"{budget.total / GB:.1f} GB. {ADVICE}, or run it where there is more memory. "
                "--max-memory takes its place as the limit."
            )

    def check(self, budget: Budget) -> None:
        """Log the plan, and compare it with the budget.

        Too little free memory is only a warning, because the plan is an upper estimate and other
        programs start and end.

        Raises
        ------
        MemoryLimitError
            As ``refuse``.
        """
        logger.info("Memory: %s of %.1f GB", self._text, budget.host / GB)
        self.refuse(budget)
        if self.host > budget.host:
            logger.warning(
                "WARNING: this run needs %s of memory, and %.1f GB are free. %s, if it fails.",
                self._text,
                budget.host / GB,
                ADVICE,
            )

    @property
    def _text(self) -> str:
        return f"about {self.host / GB:.1f} GB"


def plan_memory(
    scan: StoredScan,
    region: Grid,
    *,
    task: Task,
    options: Options,
    on_gpu: bool = False,
    sums_on_host: bool = False,
    keeps_models: bool = True,
) -> MemoryPlan:
    """Estimate the memory for labelling a region of a scan.

    Parameters
    ----------
    scan
        The whole scan.
    region
        The grid to label: the scan's, or the region's.
    task
        The task; its crop is not counted.
    options
        The run's options.
    on_gpu
        Whether the networks run on a CUDA device.
    sums_on_host
        Whether logits are summed up in main memory, beside a CUDA device.
    keeps_models
        Whether all of the task's models stay in memory, or two at a time.
    """
    native, threads = math.prod(scan.shape), usable_cores()
    canonical = region.canonical()
    grid = canonical.resampled(task.spacing_mm) if task.spacing_mm else canonical
    networks = [ModelSummary.of(task, part) for part in task.parts]
    files = [network.weights for network in networks]
    weights = sum(files) if keeps_models else sum(sorted(files)[-2:])

    smooth = options.export == "linear"
    stored, image = scan.itemsize * native, 4 * math.prod(grid.shape)
    kept, labels = scan.kept * stored, native if smooth else math.prod(grid.shape)
    slab = CUBIC_SLAB_BYTES if options.resampling_order == 3 else SLAB_BYTES
    if options.resampling_order in (2, 4, 5):
        slab = 3 * 8 * SPLINE_SLICES * math.prod(scan.shape[:2])
    preparing = image + max(net.image(grid) for net in networks) + threads * SLAB_BYTES
    predicting = max(
        (1 + net.pads(grid)) * net.image(grid)
        + (net.summing(grid) if not on_gpu else 0)
        + (net.answer + net.window(grid) if on_gpu and sums_on_host else 0)
        + (net.logits(grid) if options.save_probabilities else 0)
        for net in networks
    )
    stages = {
        "inflating": 2 * stored,
        "resampling": stored + image + threads * slab,
        "predicting": kept + image + 2 * labels + max(preparing, predicting),
        "restoring": kept + labels + 3 * native,
    }
    compiles = smooth or options.resampling_order == 3 or not on_gpu
    program = PROGRAM_BYTES + LIBRARY_BYTES + compiles * COMPILER_BYTES
    return MemoryPlan(own=MARGIN * max(stages.values()), shared=MARGIN * (program + weights))


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Memory that a run may take, in bytes.

    Parameters
    ----------
    host
        Bytes of main memory.
    is_limit
        Whether the user set ``host``; needing more is then an error.
    total
        All memory of the machine or of the container, with its swap; None if unknown.
    """

    host: float
    is_limit: bool
    total: float | None = None

    @classmethod
    def of(cls, options: Options) -> Budget:
        """Take the user's limit, or the free memory."""
        limit = options.max_memory_gb
        return cls(
            host=free_host_bytes() if limit is None else limit * GB,
            is_limit=limit is not None,
            total=total_host_bytes(),
        )
