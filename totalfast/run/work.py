"""Expected work of each stage, for the progress bar."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from totalfast.geometry import Grid

if TYPE_CHECKING:
    import nibabel as nib

    from totalfast.tasks import Task


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Expected seconds of each stage on two CPU cores; only their ratios matter."""

    read: float
    rough: float
    """Finding the region to look at."""
    guide: float
    """Finding where each model has something to do."""
    resample: float
    part: float
    """Network time of one model."""
    restore: float
    save: float
    total: float

    @classmethod
    def of(cls, scan: nib.Nifti1Image, task: Task, *, on_gpu: bool) -> Work:
        """Estimate from the scan's size; rates measured with the official architectures."""
        native = int(math.prod(scan.shape[:3]))
        native_mm = Grid(shape=scan.shape[:3], affine=scan.affine).spacing_mm
        region = 1.0 if task.crop is None else TYPICAL_REGION

        def voxels(spacing_mm: tuple[float, ...] | None) -> float:
            if spacing_mm is None:
                return native
            return native * float(np.prod(native_mm / np.asarray(spacing_mm)))

        def network(task: Task) -> float:
            # Tiles overlap: each voxel is predicted 1.7 times.
            seconds = GPU_S_PER_VOXEL if on_gpu else CPU_S_PER_VOXEL
            return 1.7 * seconds * voxels(task.spacing_mm)

        read, restore, save = 1e-8 * native, 5e-9 * native, 3e-8 * native
        resample = 1e-7 * region * voxels(task.spacing_mm)
        part = region * network(task)
        rough = 0.0 if task.crop is None else network(task.crop.rough)
        guide = 0.0 if task.guide is None else region * network(task.guide)
        models = len(task.parts) + (task.refined_by is not None)
        return cls(
            read=read,
            rough=rough,
            guide=guide,
            resample=resample,
            part=part,
            restore=restore,
            save=save,
            total=read + rough + guide + resample + part * models + restore + save,
        )

    def of_models(self, count: int, *, share: float) -> Work:
        """Return the work if ``count`` models compute only a share of their tiles."""
        saved = self.part * (1 - share)
        return replace(self, part=self.part - saved, total=self.total - count * saved)


CPU_S_PER_VOXEL, GPU_S_PER_VOXEL = 1e-6, 2e-8
"""Of the network. On two cores winograd takes 5e-7 and torch 2e-6 (scripts/results/winograd.json).
An H200 took 6e-9 (scripts/results/gpu.json); smaller GPUs take more."""

TYPICAL_REGION = 0.2
"""Share of a scan that a task with a region segments; an estimate for the progress bar."""
