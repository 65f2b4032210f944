"""Summary of a model that is not loaded yet: patch, features, and the memory that it needs."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from totalfast.engine.weights import CHECKPOINT_NAME, find_part
from totalfast.errors import WeightsError

if TYPE_CHECKING:
    from totalfast.geometry import Grid
    from totalfast.tasks import Part, Task


FORWARD_FEATURES = 6.5
"""Peak of an eager forward pass as a multiple of the features at full resolution, in float32.

Measured on torch 2.14 with oneDNN at the last joined layer (official features, patches of 64 to
128, plain and residual): what two joined are, and once more in oneDNN's order; an answer in either
order; the half is all coarser stages.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSummary:
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
    def of(cls, task: Task, part: Part) -> ModelSummary:
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
