"""Find the folder of one of TotalSegmentator's models; download a missing one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from totalfast import upstream
from totalfast.errors import WeightsError

if TYPE_CHECKING:
    from totalfast.tasks import Part, Task


CHECKPOINT_NAME = "checkpoint_final.pth"


def find_model(model_id: int, *, trainer: str, plans: str, configuration: str) -> Path:
    """Return the folder of one of TotalSegmentator's models; a missing one is downloaded.

    Raises
    ------
    WeightsError
        If it is neither there nor to be had.
    """
    dataset = upstream.dataset_folder(model_id)
    if not dataset.exists():
        _download(model_id, dataset)
    folder = dataset / f"{trainer}__{plans}__{configuration}"
    if not folder.is_dir():
        found = ", ".join(sorted(path.name for path in dataset.iterdir())) or "nothing"
        raise WeightsError(
            f"model {model_id} is incomplete: {dataset} has {found}, but {folder.name} is needed. "
            "Delete the folder, so that it is downloaded again."
        )
    return folder


def find_part(task: Task, part: Part) -> Path:
    """Return the folder of one of a task's models; errors are ``find_model``'s."""
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
            "Without a network, copy the folder there from a machine that has it "
            "(TOTALSEG_HOME_DIR and TOTALSEG_WEIGHTS_PATH say where 'there' is)."
        ) from error
    if not dataset.exists():
        raise WeightsError(f"the download of model {model_id} did not make {dataset}.")
