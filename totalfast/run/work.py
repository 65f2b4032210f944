"""Expected work of each stage, for the progress bar."""

from __future__ import annotations

import math
from dataclasses import dataclass
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
        network_s_per_voxel = GPU_S_PER_VOXEL if on_gpu else CPU_S_PER_VOXEL

        def voxels(spacing_mm: tuple[float, ...] | None) -> float:
            if spacing_mm is None:
                return native
            return native * float(np.prod(native_mm / np.asarray(spacing_mm)))

        model = voxels(task.spacing_mm)
        if task.crop is not None:
            model *= TYPICAL_REGION
        read, resample, restore = 1e-8 * native, 1e-7 * model, 5e-9 * native
        # Tiles overlap: each voxel is predicted 1.7 times.
        part = 1.7 * network_s_per_voxel * model
        rough = 0.0
        if task.crop is not None:
            rough = 1.7 * network_s_per_voxel * voxels(task.crop.rough.spacing_mm)
        save = 3e-8 * native
        models = len(task.parts) + (task.refined_by is not None)
        total = read + rough + resample + part * models + restore + save
        return cls(
            read=read,
            rough=rough,
            resample=resample,
            part=part,
            restore=restore,
            save=save,
            total=total,
        )


CPU_S_PER_VOXEL, GPU_S_PER_VOXEL = 5e-6, 2e-8
"""Of the network. An H200 took 6e-9 (scripts/results/gpu.json); smaller GPUs take more."""

TYPICAL_REGION = 0.2
"""Share of a scan that a task with a region segments; an estimate for the progress bar."""
