"""Find the folder of one of TotalSegmentator's models; download missing models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from totalfast import upstream
from totalfast.errors import WeightsError

if TYPE_CHECKING:
    from totalfast.tasks import Part, Task


CHECKPOINT_NAME = "checkpoint_final.pth"


def find_model(model_id: int, *, trainer: str, plans: str, configuration: str) -> Path:
    """Return the folder of one of TotalSegmentator's models; download it if it is missing.

    Raises
    ------
    WeightsError
        If the model is incomplete, or is missing and can't be downloaded.
    """
    dataset = upstream.dataset_folder(model_id)
    if not dataset.exists():
        _download(model_id, dataset)
    folder = dataset / f"{trainer}__{plans}__{configuration}"
    if not folder.is_dir():
        content = ", ".join(sorted(path.name for path in dataset.iterdir())) or "nothing"
        raise WeightsError(
            f"model {model_id} is incomplete: {dataset} holds {content}, but {folder.name} is "
            "needed. Delete the folder, then it is downloaded again."
        )
    return folder


def find_part(task: Task, part: Part) -> Path:
    """Return the folder of one of a task's models; the errors are those of ``find_model``."""
    return find_model(
        part.model_id, trainer=task.trainer, plans=task.plans, configuration=task.configuration
    )


def _download(model_id: int, dataset: Path) -> None:
    import requests

    try:
        upstream.download_weights(model_id)
    except (OSError, requests.RequestException, ValueError) as error:
        raise WeightsError(
            f"model {model_id} is not in {dataset} and can't be downloaded: {error}. "
            "Without internet access, copy this folder from a machine that has it "
            "(TOTALSEG_HOME_DIR and TOTALSEG_WEIGHTS_PATH set its place)."
        ) from error
    if not dataset.exists():
        raise WeightsError(f"the download of model {model_id} did not create {dataset}.")
