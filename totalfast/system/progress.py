"""What a run tells while it runs: one bar for the whole of it, and a line a stage.

Knows amounts of work and names of stages; knows nothing of what is done in them.
"""

from __future__ import annotations

import logging
import math
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from totalfast.geometry import Grid

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    import nibabel as nib

    from totalfast.tasks import Task

logger = logging.getLogger(__name__)


class Progress:
    """A tqdm bar over expected seconds of work, so that the share it shows is one of time.

    Parameters
    ----------
    disable
        Show nothing.
    """

    def __init__(self, *, disable: bool) -> None:
        from tqdm import tqdm

        self._bar: Any = tqdm(
            total=1.0,
            disable=disable,
            leave=False,
            dynamic_ncols=True,
            bar_format="{desc:<15}{percentage:3.0f}%|{bar}| {elapsed}<{remaining}",
        )

    def stage(self, name: str) -> None:
        """Name what is being done now."""
        self._bar.set_description_str(name)

    def expect(self, total: float) -> None:
        """Say how much work there is in all. Units need not be right, only their ratios."""
        self._bar.total = total
        self._bar.refresh()

    def advance(self, work: float) -> None:
        """Add finished work."""
        self._bar.update(max(min(work, self._bar.total - self._bar.n), 0.0))

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.refresh()
        self._bar.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Expected seconds of each stage on two CPU cores; only their ratios matter."""

    read: float
    rough: float
    """Finding the region to look at."""
    resample: float
    part: float
    """Network time of one model."""
    restore: float
    save: float
    total: float

    @classmethod
    def of(cls, scan: nib.Nifti1Image, task: Task, *, device: str) -> Work:
        """Estimate from the scan's size; rates measured with the official architectures."""
        native = int(math.prod(scan.shape[:3]))
        native_mm = Grid(shape=scan.shape[:3], affine=scan.affine).spacing_mm
        network_s_per_voxel = 5e-6 if device == "cpu" else 1e-7

        def voxels(spacing_mm: tuple[float, ...] | None) -> float:
            if spacing_mm is None:
                return native
            return native * float(np.prod(native_mm / np.asarray(spacing_mm)))

        model = voxels(task.spacing_mm)
        if task.crop is not None:
            model *= TYPICAL_REGION
        read, resample, restore = 1e-8 * native, 1e-7 * model, 5e-9 * native
        # Tiles overlap, so that they visit each voxel more than once.
        part = 1.7 * network_s_per_voxel * model
        rough = 0.0
        if task.crop is not None:
            rough = 1.7 * network_s_per_voxel * voxels(task.crop.rough.spacing_mm)
        save = 3e-8 * native
        models = len(task.parts) + (task.refined_by is not None)
        total = read + rough + resample + part * models + restore + save
        return cls(
            read=read, rough=rough, resample=resample, part=part, restore=restore, save=save,
            total=total,
        )  # fmt: skip


TYPICAL_REGION = 0.2
"""Share of a scan that tasks look at which look for a region first; a guess for the bar."""


@contextmanager
def timed(before: str | None, after: str) -> Iterator[None]:
    """Say what begins, and how long it took: lines that programs around upstream read."""
    if before is not None:
        logger.info(before)
    began = time.perf_counter()
    yield
    logger.info("%s %.2fs", after, time.perf_counter() - began)
