"""nnU-Net's trainers by name: whether they build the plans' network, and their classes."""

from __future__ import annotations

import functools
import importlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from totalfast import upstream
from totalfast.errors import WeightsError
from totalfast.models.nnunet_versions import (
    reads_trainer_folders,
    registered_trainer,
    trainer_in_folders,
)

if TYPE_CHECKING:
    from typing import TypeAlias

    Untyped: TypeAlias = Any
    """nnU-Net's classes, which have no types."""


class _Trainer(NamedTuple):
    """What the source code tells about a trainer."""

    base: str
    overrides: bool
    """Whether it defines ``build_network_architecture``."""
    module: str


def builds_from_plans(trainer_name: str) -> bool:
    """Whether one of nnU-Net's trainers inherits ``build_network_architecture`` from nnUNetTrainer.

    Reads the trainers' source code, because importing them takes seconds and imports all of
    nnU-Net's training. Returns False for unknown trainers.
    """
    trainers = _nnunet_trainers()
    name = trainer_name
    while name in trainers and name != "nnUNetTrainer":
        if trainers[name].overrides:
            return False
        name = trainers[name].base
    return name == "nnUNetTrainer"


def find_trainer(trainer_name: str) -> Untyped:
    """Return the class of a trainer: TotalSegmentator's, nnU-Net's, or one of the user's.

    A program registers its trainers in nnU-Net's predictor, or they are in the folders of the
    environment variable ``nnUNet_extTrainer``.

    Raises
    ------
    WeightsError
        If the name is none, or no trainer of that name is installed.
    """
    if re.fullmatch(r"[A-Za-z_]\w*", trainer_name, re.ASCII) is None:
        raise WeightsError(f"the checkpoint names the trainer {trainer_name!r}, which is no name.")
    trainer = upstream.custom_trainer(trainer_name)
    if trainer is None and trainer_name in _nnunet_trainers():
        module = importlib.import_module(_nnunet_trainers()[trainer_name].module)
        trainer = getattr(module, trainer_name)
    if trainer is None:
        trainer = registered_trainer(trainer_name) or trainer_in_folders(trainer_name)
    if trainer is None:
        folders = (
            "put the folder of its module into the environment variable nnUNet_extTrainer"
            if reads_trainer_folders()
            else "use nnunetv2 2.8, which also reads the folders in nnUNet_extTrainer"
        )
        raise WeightsError(
            f"the model was trained with {trainer_name}, which is not installed. Install the "
            f"package that has it, or {folders}."
        )
    return trainer


def _nnunet_trainers() -> dict[str, _Trainer]:
    """Read all trainers in nnU-Net's source code, also those that a program has just put there."""
    import nnunetv2

    root = Path(nnunetv2.__path__[0])
    files = sorted((root / "training/nnUNetTrainer").rglob("*.py"))
    return _trainers_in(root, tuple((path, path.stat().st_mtime_ns) for path in files))


@functools.lru_cache(maxsize=1)
def _trainers_in(root: Path, files: tuple[tuple[Path, int], ...]) -> dict[str, _Trainer]:
    """Read the trainers in files below nnU-Net's folder, each with its time of change."""
    importlib.invalidate_caches()
    trainers: dict[str, _Trainer] = {}
    for path, _ in files:
        module = ".".join(("nnunetv2", *path.relative_to(root).with_suffix("").parts))
        name = ""
        # Parsing by ast takes 0.1 s, because the garbage collector visits all of torch meanwhile.
        for match in _DEFINITION.finditer(path.read_text(encoding="utf-8")):
            if match["name"]:
                name = match["name"]
                trainers[name] = _Trainer(match["base"] or "", overrides=False, module=module)
            elif name:  # a method of the last class
                trainers[name] = trainers[name]._replace(overrides=True)
    return trainers


_DEFINITION = re.compile(
    r"^class (?P<name>\w+)(\((?P<base>\w*))?|^    def build_network_architecture\(", re.MULTILINE
)
