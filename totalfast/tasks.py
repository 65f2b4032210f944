"""Tasks: models, spacing, classes and region, read from upstream's tables and not copied."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from totalfast.errors import OptionError
from totalfast.upstream import (
    CLASS_MAPS,
    DEFAULT_CONFIG,
    PART_CLASS_MAPS,
    PART_NAMES,
    TASK_CONFIGS,
    TASKS,
    task_modality,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

BROKEN_TASKS = frozenset({"test"})
"""In upstream's table, but broken there too (2.18.0)."""

ROUGH_MARGIN_MM = (20.0, 20.0, 20.0)
"""Margin around the structures of the rough total task. Upstream uses the margins of its table only
where another task finds the region (2.18.0)."""

BODY_MARGIN_MM = (3.0, 3.0, 3.0)
"""Margin around the body, for ``body_seg``."""

BODY_REGIONS = frozenset({"body_trunc", "body_extremities"})
"""Classes of the rough body model that the rough total model lacks."""

SMALL_PLANS = "nnUNetResEncUNetLPlans_8"
"""Plans of the smaller models of ``total_v3``."""

COARSE_STEP_TASKS = frozenset({"total", "total_v3", "total_mr"})
"""Tasks whose tiles overlap by a fifth, not by half (TotalSegmentator 2.18.0, nnunet.py)."""

TILE_STEP, COARSE_TILE_STEP = 0.5, 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One model of a task, and the task's label for each of the model's."""

    model_id: int
    labels: Mapping[int, int] | None
    """Model label to task label; None if they are the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Crop:
    """The region of a task: around structures that a rough task finds first."""

    rough: Task
    labels: frozenset[int]
    """Labels of the rough task that the box encloses."""
    margin_mm: tuple[float, float, float]
    robust: bool = False
    """Whether the rough model is the 3 mm one."""
    outside: frozenset[int] | None = None
    """Labels of the rough task; voxels far from them are removed. None removes none."""
    outside_mm: float = 0.0
    """Distance from those labels up to which voxels are kept."""
    announced: str = "Generating rough segmentation for cropping..."
    """Upstream's message at the start of the rough pass."""


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
    """Label to class name, in upstream's order; only the selected classes."""
    several_models: bool
    """Whether upstream's table has a list of models, even a list of one."""
    selected: bool = False
    """Whether only some classes were selected; others are removed."""
    crop: Crop | None = None
    """None segments the whole scan."""
    guide: Task | None = None
    """A coarser task with the same classes, which finds where each model has something to do. None
    runs all models on the whole image."""
    refined_by: Task | None = None
    """Task whose first class masks the result, at the scan's resolution."""
    licensed: bool = False
    """Whether the task needs a licence number."""
    hint: str | None = None
    """Upstream's message for users of the task."""
    coarse_mm: int | None = None
    """Spacing in upstream's message, if the resolution is coarser than the default."""
    tile_step: float
    """Largest distance between neighbouring tiles, as a share of the tile size."""

    def labels_of(self, part: Part) -> Collection[int]:
        """The task's labels that one of its models can give."""
        return self.classes.keys() if part.labels is None else part.labels.values()

    @property
    def modality(self) -> str:
        """The scans that the models were trained on: "CT" or "MR"."""
        return str(task_modality(self.name))


def resolve_task(
    name: str,
    *,
    fast: bool = False,
    fastest: bool = False,
    plans: str = "nnUNetPlans",
    model_size: str = "big",
    robust_crop: bool = False,
    roi_subset: Sequence[str] | None = None,
    body_seg: bool = False,
    guided: bool = False,
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
    model_size
        "small" takes the smaller models of ``total_v3``.
    robust_crop
        Find the region with the 3 mm model instead of the 6 mm model.
    roi_subset
        Selected classes of a ``total`` task; only their models and region are used.
    body_seg
        Segment only the body, if the task has no region of its own.
    guided
        Let the task's fast model find where each of its models has something to do.

    Raises
    ------
    OptionError
        If upstream has no such task or class, or not at this resolution; with ``guided``, if it has
        no faster one.
    """
    if name not in TASKS or name not in TASK_CONFIGS or name in BROKEN_TASKS:
        raise OptionError(f"unknown task '{name}'. 'totalfast --list-tasks' shows all of them.")
    raw = TASK_CONFIGS[name]
    if raw.get("disallow_fast") and fast:
        raise OptionError(f"task {name} does not work with option --fast")
    if roi_subset is not None:
        _check_classes(name, roi_subset)
    config: dict[str, Any] = {**DEFAULT_CONFIG, "plans": plans}
    resolution = "default"
    if "sub_modes" in raw:
        resolution = "fast" if fast else "fastest" if fastest else "default"
        if resolution not in raw["sub_modes"]:
            resolution = "fast"
        config |= raw["sub_modes"][resolution]
    else:
        config |= raw
    if name == "total_v3" and model_size == "small":
        config["plans"] = SMALL_PLANS
    task_id, folds, resample = config["task_id"], config["folds"], config["resample"]
    classes = CLASS_MAPS[name]
    if roi_subset is not None:
        classes = {
            label: structure for label, structure in classes.items() if structure in roi_subset
        }
    return Task(
        name=name,
        resolution=resolution,
        parts=_parts(name, task_id, roi_subset),
        spacing_mm=_spacing(resample),
        trainer=config["trainer"],
        plans=config["plans"],
        configuration=config["model"],
        folds=None if folds is None else tuple(folds),
        classes=classes,
        several_models=isinstance(task_id, list),
        selected=roi_subset is not None,
        crop=_crop(
            name,
            config,
            robust=robust_crop or config["robust_crop"],
            roi_subset=roi_subset,
            body_seg=body_seg,
        ),
        guide=_guide(name, plans=plans, model_size=model_size) if guided else None,
        refined_by=_vertebral_bodies() if name == "vertebrae_pp_refined" else None,
        licensed=bool(raw.get("commercial")),
        hint=raw.get("info_msg"),
        coarse_mm=None if resolution == "default" or resample is None else int(resample),
        tile_step=_tile_step(name),
    )


def _guide(name: str, *, plans: str, model_size: str) -> Task:
    guided = [task for task, raw in TASK_CONFIGS.items() if "fast" in raw.get("sub_modes", {})]
    if name not in guided:
        raise OptionError(
            f"guided needs a faster model with the same classes; tasks {', '.join(guided)} have "
            f"one, task {name} has none."
        )
    return resolve_task(name, fast=True, plans=plans, model_size=model_size)


def _tile_step(task: str) -> float:
    return COARSE_TILE_STEP if task in COARSE_STEP_TASKS else TILE_STEP


def _check_classes(task: str, roi_subset: Sequence[str]) -> None:
    if not task.startswith("total"):
        raise OptionError(
            f"roi_subset only works with task 'total' or 'total_mr', not with '{task}'."
        )
    known = CLASS_MAPS[task].values()
    for structure in roi_subset:
        if structure not in known:
            close = difflib.get_close_matches(structure, known, n=3)
            hint = f" Did you mean {' or '.join(close)}?" if close else ""
            raise OptionError(
                f"task '{task}' has no class '{structure}'.{hint} "
                f"'totalfast --list-classes {task}' shows all of them."
            )


def _parts(
    name: str, task_id: int | list[int], roi_subset: Sequence[str] | None
) -> tuple[Part, ...]:
    """The models of a task that have at least one of the selected classes."""
    if not isinstance(task_id, list):
        return (Part(model_id=task_id, labels=None),)
    if roi_subset is not None:
        ids = {part: model_id for model_id, part in PART_NAMES[name].items()}
        task_id = [
            ids[part]
            for part, structures in PART_CLASS_MAPS[name].items()
            if not set(roi_subset).isdisjoint(structures.values())
        ]
    return tuple(
        Part(model_id=model_id, labels=_part_labels(name, model_id)) for model_id in task_id
    )


def _crop(
    name: str,
    config: dict[str, Any],
    *,
    robust: bool,
    roi_subset: Sequence[str] | None,
    body_seg: bool,
) -> Crop | None:
    """Choose region and rough model like upstream (2.18.0, python_api.py)."""
    regions = config["crop"] if config["crop"] is not None else roi_subset
    if regions is None:
        return _body_crop() if body_seg and not name.endswith("_mr") else None
    if config["crop_model"] is not None:
        rough, margin_mm = resolve_task(config["crop_model"]), config["crop_addon"]
    else:
        rough = _rough_task(name, config, regions, robust=robust)
        margin_mm = ROUGH_MARGIN_MM
    label_of = {structure: label for label, structure in rough.classes.items()}
    for structure in regions:
        if structure not in label_of:
            raise OptionError(
                f"roi_subset does not work with class '{structure}' of task '{name}': the region "
                f"is found by the models of task '{rough.name}', which lack this class."
            )
    outside = config["remove_outside"]
    x, y, z = (float(mm) for mm in margin_mm)
    return Crop(
        rough=rough,
        labels=frozenset(label_of[structure] for structure in regions),
        robust=robust and config["crop_model"] is None,
        margin_mm=(x, y, z),
        outside=None if outside is None else frozenset(label_of[region] for region in outside),
        outside_mm=float(config["remove_outside_dilation"] or 0),
    )


def _rough_task(
    name: str, config: dict[str, Any], regions: Collection[str], *, robust: bool
) -> Task:
    """The coarse ``total`` or ``body`` task that finds a region."""
    if not BODY_REGIONS.isdisjoint(regions):
        return _single_model("body", 300, spacing_mm=6.0, trainer="nnUNetTrainer")
    of_mr = name.endswith("_mr")
    return _single_model(
        "total_mr" if of_mr or config["modality"] == "mr" else "total",
        852 if of_mr else 297 if robust else 298,
        spacing_mm=3.0 if robust or of_mr else 6.0,
        trainer="nnUNetTrainer_2000epochs_NoMirroring"
        if of_mr
        else "nnUNetTrainer_4000epochs_NoMirroring",
    )


def _body_crop() -> Crop:
    rough = _single_model("body", 300, spacing_mm=6.0, trainer="nnUNetTrainer")
    return Crop(
        rough=rough,
        labels=frozenset(rough.classes),
        margin_mm=BODY_MARGIN_MM,
        announced="Generating rough body segmentation...",
    )


def _vertebral_bodies() -> Task:
    return _single_model("vertebrae_body", 305, spacing_mm=1.5, trainer="nnUNetTrainer_DASegOrd0")


def _single_model(name: str, model_id: int, *, spacing_mm: float, trainer: str) -> Task:
    """A task that is in upstream's code, not in its table."""
    return Task(
        name=name,
        resolution="fast" if spacing_mm == 3.0 else "fastest",
        parts=(Part(model_id=model_id, labels=None),),
        spacing_mm=(spacing_mm,) * 3,
        trainer=trainer,
        plans="nnUNetPlans",
        configuration="3d_fullres",
        folds=(0,),
        classes=CLASS_MAPS[name],
        several_models=False,
        tile_step=_tile_step(name),
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
