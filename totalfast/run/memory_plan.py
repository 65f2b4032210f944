"""What a run will need of memory, before it takes any.

Knows headers, tasks and model folders' plans; knows nothing of arrays, and allocates none. The
figures are upper estimates of what a run holds at a time; ``scripts/benchmark_scaling.py``
compares them with measured peaks.
"""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from totalfast.engine.models import CHECKPOINT_NAME, find_part
from totalfast.errors import MemoryLimitError, WeightsError
from totalfast.run.budget import GB
from totalfast.system.cores import usable_cores

if TYPE_CHECKING:
    from totalfast.geometry import Grid
    from totalfast.options import Options
    from totalfast.run.budget import Budget
    from totalfast.tasks import Part, Task

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

FORWARD_FEATURES = 6.5
"""Peak of an eager forward pass as a multiple of the features at full resolution, in float32.

Measured on torch 2.14 with oneDNN at the last joined layer (official features, patches of 64 to
128, plain and residual): what two joined are, and once more in oneDNN's order; an answer in either
order; the half is all coarser stages.
"""

MARGIN = 1.05
"""Of the estimate, for what allocators keep."""

DEVICE_SHARE = 0.9
"""Of a device's free memory that a plan takes: the rest is the allocator's loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """What a model folder says of a model before it is loaded.

    Parameters
    ----------
    patch
        Tile size (z, y, x), or (y, x) of a 2-D model.
    spacing_mm
        Its plans' spacing, of the same axes.
    axes
        The image's axes in the order that the network has them in.
    features
        Channels of the network at full resolution.
    heads
        Channels of its answer.
    folds
        Networks that are averaged.
    weights
        Bytes of all folds' files.
    """

    patch: tuple[int, ...]
    spacing_mm: tuple[float, ...]
    axes: tuple[int, ...]
    features: int
    heads: int
    folds: int
    weights: int

    @classmethod
    def of(cls, task: Task, part: Part) -> Network:
        """Read a model's plans; for parameters and errors see ``find_part``."""
        folder = find_part(task, part)
        folds = "*" if task.folds is None else f"[{''.join(map(str, task.folds))}]"
        files = list(folder.glob(f"fold_{folds}/{CHECKPOINT_NAME}"))
        try:
            plans = json.loads((folder / "plans.json").read_text())
            dataset = json.loads((folder / "dataset.json").read_text())
            configuration = _configuration(plans["configurations"], task.configuration)
            return cls(
                patch=tuple(configuration["patch_size"]),
                spacing_mm=tuple(configuration["spacing"]),
                axes=tuple(plans["transpose_forward"]),
                features=_features(configuration),
                heads=len(dataset.get("regions_class_order") or dataset["labels"]),
                folds=len(files),
                weights=sum(file.stat().st_size for file in files),
            )
        except (OSError, ValueError, LookupError) as error:
            raise WeightsError(
                f"the plans in {folder} can't be read: {error!r}. "
                "Delete the folder, so that it is downloaded again."
            ) from error

    def pads(self, grid: Grid) -> bool:
        """Whether an image of that grid is smaller than a tile, and copied to be padded."""
        return self._shape(grid) != self._sizes(grid)

    def image(self, grid: Grid) -> int:
        """Bytes of what the network is run on."""
        return 4 * math.prod(self._shape(grid))

    def window(self, grid: Grid) -> int:
        """Bytes of the rolling window: float16 sums of all classes and folds, and of weights."""
        _, y, x = self._shape(grid)
        return 2 * (self.folds * self.heads + 1) * self._depth * y * x

    def summing(self, grid: Grid) -> int:
        """Bytes of forward passes on the CPU and of the window that their answers go to.

        One network's answer to one tile needs no sums.
        """
        if self.folds == 1 and math.prod(self._shape(grid)) == math.prod(self.patch):
            return self.forward
        return self.forward + self.window(grid)

    def logits(self, grid: Grid) -> int:
        """Bytes of all logits, float16, and of what nnU-Net makes of them: float32, twice."""
        return (2 + 4 + 4) * self.heads * math.prod(self._shape(grid))

    @property
    def forward(self) -> int:
        """Bytes of an eager forward pass in float32, without its last layer."""
        return int(FORWARD_FEATURES * 4 * self.features * math.prod(self.patch))

    @property
    def answer(self) -> int:
        """Bytes of the last layer's answer to one tile in float32."""
        return 4 * self.heads * math.prod(self.patch)

    @property
    def _depth(self) -> int:
        return self.patch[0] if len(self.patch) == 3 else 1

    def _sizes(self, grid: Grid) -> tuple[int, ...]:
        """Shape of the network's axes at the plans' spacing."""
        shape, spacing = grid.shape[::-1], grid.spacing_mm[::-1]
        own = [(shape[axis], float(spacing[axis])) for axis in self.axes]
        if len(self.spacing_mm) == 2:
            (slices, _), *own = own
            return (slices, *self._resized(own))
        return self._resized(own)

    def _resized(self, own: list[tuple[int, float]]) -> tuple[int, ...]:
        return tuple(
            round(n * mm / target) for (n, mm), target in zip(own, self.spacing_mm, strict=True)
        )

    def _shape(self, grid: Grid) -> tuple[int, ...]:
        """The same, padded to a tile."""
        patch = (self._depth, *self.patch[-2:])
        return tuple(max(n, p) for n, p in zip(self._sizes(grid), patch, strict=True))


def _configuration(configurations: dict[str, Any], name: str) -> dict[str, Any]:
    """A configuration with all that it inherits (nnU-Net 2.8.1, plans_handler.py)."""
    own: dict[str, Any] = configurations[name]
    if "inherits_from" not in own:
        return own
    return _configuration(configurations, own["inherits_from"]) | own


def _features(configuration: dict[str, Any]) -> int:
    """Features of the first stage, in the new format of plans or the old one."""
    if "architecture" in configuration:
        return int(configuration["architecture"]["arch_kwargs"]["features_per_stage"][0])
    return int(configuration["UNet_base_num_features"])


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
    networks = [Network.of(task, part) for part in task.parts]
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
