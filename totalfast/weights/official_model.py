"""One of TotalSegmentator's models: its folder, its files, and which of them are missing."""

from __future__ import annotations

import os
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from totalfast import upstream

if TYPE_CHECKING:
    from collections.abc import Sequence

CHECKPOINT_NAME = "checkpoint_final.pth"


@dataclass(frozen=True, slots=True, kw_only=True)
class OfficialModel:
    """One of TotalSegmentator's models, as a task needs it.

    Parameters
    ----------
    model_id
        Number in upstream's table.
    trainer, plans, configuration
        nnU-Net's names, which make up the name of the model's folder.
    folds
        The folds that are needed; None needs all folds of the model.
    """

    model_id: int
    trainer: str
    plans: str
    configuration: str
    folds: tuple[int, ...] | None

    @property
    def dataset(self) -> Path:
        """The ``DatasetNNN_...`` folder, which may not exist yet."""
        return upstream.dataset_folder(self.model_id)

    @property
    def folder_name(self) -> str:
        """Name of the folder with plans.json, inside the dataset's folder."""
        return f"{self.trainer}__{self.plans}__{self.configuration}"

    @property
    def folder(self) -> Path:
        """The folder with plans.json, which may not exist yet."""
        return self.dataset / self.folder_name

    def needed(self, dataset: Path, *, known_folds: Sequence[str] | None) -> list[str]:
        """List the needed files, relative to the model's folder.

        Parameters
        ----------
        dataset
            The dataset's folder, at its place or where it was unpacked.
        known_folds
            Names of the folds that were unpacked, such as "fold_0"; None if that is unknown.
        """
        if self.folds is not None:
            folds = [f"fold_{fold}" for fold in self.folds]
        else:
            folds = list(known_folds or _present_folds(dataset / self.folder_name))
        return ["plans.json", "dataset.json", *(f"{fold}/{CHECKPOINT_NAME}" for fold in folds)]

    def faults(self, dataset: Path, *, known_folds: Sequence[str] | None) -> list[str]:
        """List what is missing or cut off, such as "no fold_0/checkpoint_final.pth"."""
        folder = dataset / self.folder_name
        if not folder.is_dir():
            return [f"no {self.folder_name}"]
        faults = []
        for name in self.needed(dataset, known_folds=known_folds):
            if not (folder / name).is_file():
                faults.append(f"no {name}")
            elif _is_cut_off(folder / name):
                faults.append(f"{name} is cut off")
        return faults


def _present_folds(folder: Path) -> list[str]:
    """Names of all folds from the lowest to the highest number.

    Folds are numbered without gaps, so a gap is a fold that was lost.
    """
    matches = (re.fullmatch(r"fold_(\d+)", path.name) for path in folder.glob("fold_*"))
    numbers = [int(match.group(1)) for match in matches if match] or [0]
    return [f"fold_{fold}" for fold in range(min(numbers), max(numbers) + 1)]


def other_models(dataset: Path, model: OfficialModel) -> list[str]:
    """Names of the folders in a dataset's folder that hold other, whole models."""
    return sorted(
        plans.parent.name
        for plans in dataset.glob("*/plans.json")
        if plans.parent.name != model.folder_name
        and any(plans.parent.glob(f"fold_*/{CHECKPOINT_NAME}"))
    )


def _is_cut_off(path: Path) -> bool:
    """Whether the end of a file is missing, as after a killed program that unpacked it.

    Reads some bytes only. Checkpoints are zip archives, whose table of contents is at the end;
    those from before torch 1.6 are not checked.
    """
    with path.open("rb") as stream:
        start = stream.read(2)
        if not start:
            return True
        if path.suffix == ".json":
            stream.seek(max(stream.seek(0, os.SEEK_END) - 64, 0))
            return start[:1] == b"{" and not stream.read().rstrip().endswith(b"}")
        return start == b"PK" and not zipfile.is_zipfile(stream)
