"""Find the folders of a task's models; download those that are missing."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from totalfast import upstream
from totalfast.errors import WeightsError
from totalfast.weights.condition import Condition, inspect
from totalfast.weights.install import download
from totalfast.weights.official_model import CHECKPOINT_NAME, OfficialModel

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from totalfast.tasks import Part, Task
    from totalfast.weights.condition import Finding

__all__ = [
    "CHECKPOINT_NAME",
    "ensure_model",
    "ensure_part",
    "find_model",
    "find_part",
    "is_offline",
    "official_model",
    "parts_of",
]

OFFLINE_VARIABLE = "TOTALFAST_OFFLINE"
"""Environment variable: any value but "", "0" and "false" forbids downloads."""


def is_offline(*, asked: bool = False) -> bool:
    """Whether downloads are forbidden, by an option or by ``TOTALFAST_OFFLINE``."""
    return asked or os.environ.get(OFFLINE_VARIABLE, "").lower() not in ("", "0", "false")


def official_model(task: Task, part: Part) -> OfficialModel:
    """Describe one of a task's models."""
    return OfficialModel(
        model_id=part.model_id,
        trainer=task.trainer,
        plans=task.plans,
        configuration=task.configuration,
        folds=task.folds,
    )


def parts_of(task: Task) -> Iterator[tuple[Task, Part]]:
    """All models that a task needs, in the order of use: those of its rough task come first."""
    if task.crop is not None:
        yield from parts_of(task.crop.rough)
    if task.guide is not None:
        yield from parts_of(task.guide)
    for part in task.parts:
        yield task, part
    if task.refined_by is not None:
        yield from parts_of(task.refined_by)


def find_part(task: Task, part: Part) -> Path:
    """Return the folder of one of a task's models; the errors are those of ``find_model``."""
    return find_model(official_model(task, part))


def ensure_part(task: Task, part: Part, *, offline: bool = False, quiet: bool = False) -> Path:
    """Return the folder of one of a task's models; arguments and errors as ``ensure_model``."""
    return ensure_model(official_model(task, part), offline=offline, quiet=quiet)


def ensure_parts(task: Task, *, offline: bool = False, quiet: bool = False) -> None:
    """Find or download all models that a task needs; errors as ``ensure_model``."""
    for needed, part in parts_of(task):
        ensure_part(needed, part, offline=offline, quiet=quiet)


def find_model(model: OfficialModel) -> Path:
    """Return the folder of a model that is whole.

    Sizes and times of the needed files are compared with the manifest's, if the folder has one.

    Raises
    ------
    WeightsError
        If the model is missing, incomplete or changed.
    """
    finding = _inspect(model)
    if finding.condition is Condition.WHOLE:
        return model.folder
    raise WeightsError(f"{_describe(model, finding)}. {_advice(model, finding)}")


def ensure_model(model: OfficialModel, *, offline: bool = False, quiet: bool = False) -> Path:
    """Return the folder of a model; download the model if it is missing or incomplete.

    Parameters
    ----------
    model
        The model.
    offline
        Download nothing. ``TOTALFAST_OFFLINE=1`` has the same effect.
    quiet
        Show no bar.

    Raises
    ------
    WeightsError
        If the model is changed, or is missing and can't be downloaded.
    LicenseError
        If it needs a licence number and none is stored.
    """
    finding = _inspect(model)
    if finding.condition not in (Condition.MISSING, Condition.INCOMPLETE):
        return find_model(model)
    if is_offline(asked=offline):
        raise WeightsError(
            f"{_describe(model, finding)}, and downloads are off (--offline or "
            f"{OFFLINE_VARIABLE}). {_bring(model)}"
        )
    try:
        download(model, quiet=quiet)
    except WeightsError as error:
        # Another program, TotalSegmentator for example, may have brought it in the meantime.
        if _inspect(model).condition is not Condition.WHOLE:
            raise WeightsError(
                f"{_describe(model, finding)}, and {error} {_bring(model)}"
            ) from error
    return find_model(model)


def _inspect(model: OfficialModel) -> Finding:
    try:
        return inspect(model)
    except OSError as error:
        raise WeightsError(f"model {model.model_id} can't be read: {error}.") from error


def _describe(model: OfficialModel, finding: Finding) -> str:
    dataset = model.dataset
    return {
        Condition.MISSING: f"model {model.model_id} ({dataset.name}) is not in {dataset.parent}",
        Condition.INCOMPLETE: f"model {model.model_id} in {dataset} is incomplete "
        f"({finding.detail})",
        Condition.OTHER: f"{dataset} has no {model.folder_name}, only {finding.detail}",
        Condition.CHANGED: f"model {model.model_id} is not what was unpacked in {dataset}: "
        f"{finding.detail}",
    }[finding.condition]


def _advice(model: OfficialModel, finding: Finding) -> str:
    command = "totalfast weights download"
    return {
        Condition.MISSING: f"'{command} {model.model_id}' downloads it. {_bring(model)}",
        Condition.INCOMPLETE: f"'{command} {model.model_id}' repairs it.",
        Condition.OTHER: f"'{command} {model.model_id}' adds TotalSegmentator's model to the "
        "folder; what is there stays there.",
        Condition.CHANGED: f"'totalfast weights verify {model.model_id}' compares all files; "
        f"'{command} {model.model_id}' replaces the model.",
    }[finding.condition]


def _bring(model: OfficialModel) -> str:
    if upstream.is_licensed_model(model.model_id):
        return "Without internet access, copy this folder from a machine that has it."
    return (
        f"Without internet access, bring {model.dataset.name}.zip from TotalSegmentator's release "
        "page, and run 'totalfast weights import FILE.zip'."
    )
