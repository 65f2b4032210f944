"""Properties of a model that is not loaded yet: tile size, features, and the memory it needs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from totalfast.models.model_files import read_json
from totalfast.models.plans import (
    MAX_FEATURES,
    MAX_STAGES,
    check_dataset,
    check_grid,
    resolve_configuration,
)
from totalfast.models.weights import CHECKPOINT_NAME, find_part

if TYPE_CHECKING:
    from totalfast.geometry import Grid
    from totalfast.models.model_files import Entry
    from totalfast.tasks import Part, Task


FORWARD_FEATURES = 6.5
"""Peak memory of an eager forward pass, as a multiple of the float32 features at full resolution.

Measured with torch 2.14 and oneDNN (official numbers of features, patches of 64 to 128, plain and
residual U-Nets). The peak is at the last layer with joined features: 2 for the joined features, 2
for their copy in oneDNN's layout, 1 for the output, 1 for its copy in oneDNN's layout, and 0.5 for
all coarser stages.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSummary:
    """A model's properties, read from its folder without loading the weights.

    Parameters
    ----------
    patch
        Tile size (z, y, x), or (y, x) of a 2-D model.
    spacing_mm
        Spacing in the plans, along the same axes.
    axes
        The image's axes in the network's order (the plans' ``transpose_forward``).
    features
        Number of the network's features at full resolution.
    heads
        Number of the network's output channels.
    folds
        Number of networks that are averaged.
    weights
        Size of all folds' checkpoints in bytes.
    """

    patch: tuple[int, ...]
    spacing_mm: tuple[float, ...]
    axes: tuple[int, ...]
    features: int
    heads: int
    folds: int
    weights: int

    @classmethod
    def of(cls, task: Task, part: Part) -> ModelSummary:
        """Read the summary of one of a task's models.

        Raises
        ------
        WeightsError
            If the model can't be found or downloaded, or its plans can't be read.
        """
        folder = find_part(task, part)
        folds = "*" if task.folds is None else f"[{''.join(map(str, task.folds))}]"
        files = list(folder.glob(f"fold_{folds}/{CHECKPOINT_NAME}"))
        plans, dataset = read_json(folder / "plans.json"), read_json(folder / "dataset.json")
        configuration = resolve_configuration(plans, task.configuration)
        check_grid(plans, configuration)
        check_dataset(dataset)
        order = dataset.value.get("regions_class_order") or None
        return cls(
            patch=tuple(configuration.value["patch_size"]),
            spacing_mm=tuple(configuration.value["spacing"]),
            axes=tuple(plans.value["transpose_forward"]),
            features=_features(configuration),
            heads=len(order if isinstance(order, list) else dataset.value["labels"]),
            folds=len(files),
            weights=sum(file.stat().st_size for file in files),
        )

    def pads(self, grid: Grid) -> bool:
        """Whether an image on this grid is smaller than a tile, so that padding copies it."""
        return self._shape(grid) != self._sizes(grid)

    def image(self, grid: Grid) -> int:
        """Bytes of the padded image at the plans' spacing, float32."""
        return 4 * math.prod(self._shape(grid))

    def window(self, grid: Grid) -> int:
        """Bytes of the rolling window: float16 sums per class and fold, and of the weights."""
        _, y, x = self._shape(grid)
        return 2 * (self.folds * self.heads + 1) * self._depth * y * x

    def summing(self, grid: Grid) -> int:
        """Bytes of a forward pass on the CPU and of the rolling window.

        A single network on a single tile needs no window.
        """
        if self.folds == 1 and math.prod(self._shape(grid)) == math.prod(self.patch):
            return self.forward
        return self.forward + self.window(grid)

    def logits(self, grid: Grid) -> int:
        """Bytes of all logits in float16, and of nnU-Net's two float32 copies of them."""
        return (2 + 4 + 4) * self.heads * math.prod(self._shape(grid))

    @property
    def forward(self) -> int:
        """Peak bytes of an eager forward pass in float32, without its last layer."""
        return int(FORWARD_FEATURES * 4 * self.features * math.prod(self.patch))

    @property
    def answer(self) -> int:
        """Bytes of the last layer's output for one tile in float32."""
        return 4 * self.heads * math.prod(self.patch)

    @property
    def _depth(self) -> int:
        return self.patch[0] if len(self.patch) == 3 else 1

    def _sizes(self, grid: Grid) -> tuple[int, ...]:
        """Shape of the image at the plans' spacing, in the network's axis order."""
        shape, spacing = grid.shape[::-1], grid.spacing_mm[::-1]
        lengths = [(shape[axis], float(spacing[axis])) for axis in self.axes]
        if len(self.spacing_mm) == 2:
            (slices, _), *lengths = lengths
            return (slices, *self._resized(lengths))
        return self._resized(lengths)

    def _resized(self, lengths: list[tuple[int, float]]) -> tuple[int, ...]:
        """Sizes at the plans' spacing, from (size, spacing in mm) per axis."""
        return tuple(
            round(n * mm / target) for (n, mm), target in zip(lengths, self.spacing_mm, strict=True)
        )

    def _shape(self, grid: Grid) -> tuple[int, ...]:
        """Shape of the image at the plans' spacing, padded to a tile."""
        patch = (self._depth, *self.patch[-2:])
        return tuple(max(n, p) for n, p in zip(self._sizes(grid), patch, strict=True))


def _features(configuration: Entry) -> int:
    """Number of features of the first stage, from plans in the new or old format."""
    if "architecture" not in configuration:
        return configuration.item("UNet_base_num_features").whole(1, MAX_FEATURES)
    features = configuration.item("architecture").item("arch_kwargs").item("features_per_stage")
    if isinstance(features.value, list):
        features = features.items(range(1, MAX_STAGES + 1))[0]
    return features.whole(1, MAX_FEATURES)
