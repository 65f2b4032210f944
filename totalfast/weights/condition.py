"""Whether a model is missing, incomplete, changed or whole; nothing is downloaded or deleted."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from totalfast.weights.manifest import DamagedManifestError, find_change, read_manifest
from totalfast.weights.official_model import OfficialModel, other_models


class Condition(Enum):
    """The condition of a model's folder."""

    MISSING = "missing"
    INCOMPLETE = "incomplete"
    """Files are missing or cut off. A download was interrupted."""
    OTHER = "other"
    """The dataset's folder holds other models, and not this one."""
    CHANGED = "changed"
    """A file is not the one that was unpacked."""
    WHOLE = "whole"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The condition of a model's folder, and what is wrong with it ("" if it is whole)."""

    condition: Condition
    detail: str = ""


def inspect(model: OfficialModel) -> Finding:
    """Look at a model's folder; costs about a millisecond if it is whole.

    Raises
    ------
    OSError
        If the folder can't be read.
    """
    dataset = model.dataset
    if not dataset.is_dir():
        return Finding(condition=Condition.MISSING)
    try:
        manifest = read_manifest(dataset)
    except DamagedManifestError as error:
        return Finding(condition=Condition.CHANGED, detail=f"its manifest is damaged: {error}")
    known_folds = None if manifest is None else manifest.folds.get(model.folder_name)
    faults = model.faults(dataset, known_folds=known_folds)
    if faults:
        others = other_models(dataset, model)
        if others and not model.folder.is_dir():
            return Finding(condition=Condition.OTHER, detail=", ".join(others))
        return Finding(condition=Condition.INCOMPLETE, detail=", ".join(faults))
    if manifest is not None:
        needed = model.needed(dataset, known_folds=known_folds)
        names = [f"{model.folder_name}/{name}" for name in needed]
        change = find_change(dataset, manifest, [name for name in names if name in manifest.files])
        if change is not None:
            return Finding(condition=Condition.CHANGED, detail=change)
    return Finding(condition=Condition.WHOLE)
