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

UNSUPPORTED_TASKS = frozenset({"teeth", "vertebrae_pp", "vertebrae_pp_refined", "test"})
"""Tasks with steps of their own, which are refused until they are supported."""

ROUGH_MARGIN_MM = (20.0, 20.0, 20.0)
"""Around what the rough model found; what upstream's table says instead is never used (2.18.0)."""

BODY_REGIONS = frozenset({"body_trunc", "body_extremities"})
"""Classes that the rough body model finds, and the one of ``total`` does not."""

COARSE_STEP_TASKS = frozenset({"total", "total_v3", "total_mr"})
"""Tasks whose tiles overlap by a fifth instead of a half (TotalSegmentator 2.18.0, nnunet.py)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One model of a task, and the task's label for each of the model's."""

    model_id: int
    labels: Mapping[int, int] | None
    """Model label to task label; None if they are the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Crop:
    """Where a task looks: around structures that a rough model finds first."""

    rough: Task
    labels: frozenset[int]
    """Of the rough task: what the box is drawn around."""
    robust: bool
    """Whether the finer of the rough models is used, at 3 mm."""
    margin_mm: tuple[float, float, float]
    outside: frozenset[int] | None
    """Of the rough task: where else nothing is kept; None keeps all."""
    outside_mm: float
    """How far around those something is kept."""


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
    crop: Crop | None = None
    """None looks at the whole scan."""
    licensed: bool = False
    """Whether TotalSegmentator asks for a licence number."""
    hint: str | None = None
    """What upstream tells users of the task."""
    coarse_mm: int | None = None
    """With a coarser resolution than the default: the spacing that upstream tells users of."""

    @property
    def tile_step(self) -> float:
        """Distance of neighbouring tiles as a share of the tile size."""
        return 0.8 if self.name in COARSE_STEP_TASKS else 0.5


def resolve_task(
    name: str,
    *,
    fast: bool = False,
    fastest: bool = False,
    plans: str = "nnUNetPlans",
    robust_crop: bool = False,
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
    robust_crop
        Find the region with the 3 mm model instead of the 6 mm model.

    Raises
    ------
    OptionError
        If upstream has no such task, or not at this resolution.
    UnsupportedError
        If totalfast can't run it yet.
    """
    if name not in TASKS or name not in TASK_CONFIGS:
        raise OptionError(f"unknown task '{name}'. 'totalfast --list-tasks' shows all of them.")
    if name in UNSUPPORTED_TASKS:
        raise UnsupportedError(f"task '{name}' is not supported yet; use TotalSegmentator for it.")
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
    task_id, folds, resample = config["task_id"], config["folds"], config["resample"]
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
        spacing_mm=_spacing(resample),
        trainer=config["trainer"],
        plans=config["plans"],
        configuration=config["model"],
        folds=None if folds is None else tuple(folds),
        classes=CLASS_MAPS[name],
        several_models=isinstance(task_id, list),
        crop=_crop(name, config, robust=robust_crop or config["robust_crop"]),
        licensed=bool(raw.get("commercial")),
        hint=raw.get("info_msg"),
        coarse_mm=None if resolution == "default" or resample is None else int(resample),
    )


def _crop(name: str, config: dict[str, Any], *, robust: bool) -> Crop | None:
    """Choose the rough model as upstream does (2.18.0, python_api.py)."""
    regions = config["crop"]
    if regions is None:
        return None
    of_mr = name.endswith("_mr")
    rough_name = "total_mr" if of_mr or config["modality"] == "mr" else "total"
    model_id = 852 if of_mr else 297 if robust else 298
    trainer = (
        "nnUNetTrainer_2000epochs_NoMirroring" if of_mr else "nnUNetTrainer_4000epochs_NoMirroring"
    )
    spacing_mm = 3.0 if robust or of_mr else 6.0
    if not BODY_REGIONS.isdisjoint(regions):
        rough_name, model_id, spacing_mm, trainer = "body", 300, 6.0, "nnUNetTrainer"
    classes = CLASS_MAPS[rough_name]
    label_of = {class_name: label for label, class_name in classes.items()}
    outside = config["remove_outside"]
    return Crop(
        rough=Task(
            name=rough_name,
            resolution="fast" if spacing_mm == 3.0 else "fastest",
            parts=(Part(model_id=model_id, labels=None),),
            spacing_mm=(spacing_mm,) * 3,
            trainer=trainer,
            plans="nnUNetPlans",
            configuration="3d_fullres",
            folds=(0,),
            classes=classes,
            several_models=False,
        ),
        labels=frozenset(label_of[region] for region in regions),
        robust=robust,
        margin_mm=ROUGH_MARGIN_MM,
        outside=None if outside is None else frozenset(label_of[region] for region in outside),
        outside_mm=float(config["remove_outside_dilation"] or 0),
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
