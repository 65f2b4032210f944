"""What a task means: models, spacing, classes and clean-up, read from upstream's tables.

Knows names and numbers; knows nothing of arrays. Nothing here is copied: a task that upstream
changes changes here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from totalfast.errors import OptionError, UnsupportedError
from totalfast.upstream import (
    CLASS_MAPS,
    DEFAULT_CONFIG,
    PART_CLASS_MAPS,
    PART_NAMES,
    TASK_CONFIGS,
    TASKS,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

SUPPORTED_TASKS = (
    "total",
    "total_v3",
    "total_mr",
    "body",
    "body_mr",
    "vertebrae_mr",
    "vertebrae_body",
    "breasts",
    "trunk_cavities",
)
"""Tasks that need no cropping pass; the others are refused until they are supported."""

COARSE_STEP_TASKS = frozenset({"total", "total_v3", "total_mr"})
"""Tasks whose tiles overlap by a fifth instead of a half (TotalSegmentator 2.18.0, nnunet.py)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One model of a task, and the task's label for each of the model's."""

    model_id: int
    labels: Mapping[int, int] | None
    """Model label to task label; None if they are the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A task, resolved for one resolution."""

    name: str
    resolution: str
    """"default", "fast" or "fastest"."""
    parts: tuple[Part, ...]
    spacing_mm: tuple[float, float, float] | None
    """Model spacing (x, y, z); None leaves resampling to nnU-Net."""
    trainer: str
    plans: str
    configuration: str
    folds: tuple[int, ...] | None
    classes: Mapping[int, str]
    """Label to class name, in upstream's order."""
    several_models: bool
    """Whether upstream treats the task as a list of models, even a list of one."""

    @property
    def tile_step(self) -> float:
        """Distance of neighbouring tiles as a share of the tile size."""
        return 0.8 if self.name in COARSE_STEP_TASKS else 0.5


def resolve_task(
    name: str, *, fast: bool = False, fastest: bool = False, plans: str = "nnUNetPlans"
) -> Task:
    """Look up a task.

    Parameters
    ----------
    name
        One of upstream's task names.
    fast, fastest
        Coarser models; ``fast`` wins if both are set.
    plans
        nnU-Net plans identifier of the model folder.

    Raises
    ------
    OptionError
        If upstream has no such task, or not at this resolution.
    UnsupportedError
        If totalfast can't run it yet.
    """
    if name not in TASKS or name not in TASK_CONFIGS:
        raise OptionError(f"unknown task '{name}'. 'totalfast --list-tasks' shows all of them.")
    if name not in SUPPORTED_TASKS:
        raise UnsupportedError(
            f"task '{name}' is not supported yet; use TotalSegmentator for it. "
            f"Supported: {', '.join(SUPPORTED_TASKS)}."
        )
    raw = TASK_CONFIGS[name]
    if raw.get("disallow_fast") and fast:
        raise OptionError(f"task {name} does not work with option --fast")
    config: dict[str, Any] = {**DEFAULT_CONFIG, "plans": plans}
    resolution = "default"
    if "sub_modes" in raw:
        resolution = "fast" if fast else "fastest" if fastest else "default"
        if resolution not in raw["sub_modes"]:
            resolution = "fast"
        config |= raw["sub_modes"][resolution]
    else:
        config |= raw
    task_id, folds = config["task_id"], config["folds"]
    ids = task_id if isinstance(task_id, list) else [task_id]
    return Task(
        name=name,
        resolution=resolution,
        parts=tuple(
            Part(
                model_id=model_id,
                labels=_part_labels(name, model_id) if isinstance(task_id, list) else None,
            )
            for model_id in ids
        ),
        spacing_mm=_spacing(config["resample"]),
        trainer=config["trainer"],
        plans=config["plans"],
        configuration=config["model"],
        folds=None if folds is None else tuple(folds),
        classes=CLASS_MAPS[name],
        several_models=isinstance(task_id, list),
    )


def _part_labels(task: str, model_id: int) -> dict[int, int]:
    label_of = {class_name: label for label, class_name in CLASS_MAPS[task].items()}
    part_classes = PART_CLASS_MAPS[task][PART_NAMES[task][model_id]]
    return {label: label_of[class_name] for label, class_name in part_classes.items()}


def _spacing(resample: float | list[float] | None) -> tuple[float, float, float] | None:
    if resample is None:
        return None
    if isinstance(resample, float | int):
        return (float(resample),) * 3
    x, y, z = resample
    return (float(x), float(y), float(z))
