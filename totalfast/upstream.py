"""Every import from TotalSegmentator, so that only this file depends on its release.

Importing this module imports TotalSegmentator's data tables, and neither torch nor nibabel.
Functions import the heavy modules when they are called. ``totalsegmentator.nnunet`` is never
imported, because it changes nnU-Net's classes for the whole process.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import io
import logging
import os
import re
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from totalsegmentator.map_tasks_config import (
    DEFAULT_CONFIG,
    TASK_CONFIGS,
    TASK_ID_WEIGHTS_CONFIGS,
)
from totalsegmentator.map_to_binary import (
    class_map,
    class_map_5_parts,
    class_map_5_parts_total_v3,
    class_map_parts_headneck_muscles,
    class_map_parts_mr,
    commercial_models,
    map_taskid_to_partname_ct,
    map_taskid_to_partname_ct_v3,
    map_taskid_to_partname_headneck_muscles,
    map_taskid_to_partname_mr,
)
from totalsegmentator.registry import (
    TASKS,
    format_classes_table,
    format_tasks_table,
    task_modality,
)

from totalfast.errors import LicenseError, WeightsError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "CLASS_MAPS",
    "DEFAULT_CONFIG",
    "LICENSE_SERVER_URL",
    "PART_CLASS_MAPS",
    "PART_NAMES",
    "RELEASES_URL",
    "TASKS",
    "TASK_CONFIGS",
    "TASK_ID_WEIGHTS_CONFIGS",
    "WeightsRequest",
    "check_license",
    "custom_trainer",
    "dataset_folder",
    "format_classes_table",
    "format_tasks_table",
    "is_licensed_model",
    "label_names",
    "label_table_xml",
    "postprocessing",
    "python_api",
    "resample_each_label",
    "store_license",
    "task_modality",
    "version",
    "warn_of_untested_version",
    "weights_home",
    "weights_request",
    "write_dicom_seg",
    "write_radiomics",
    "write_rtstruct",
]

logger = logging.getLogger(__name__)

CLASS_MAPS: dict[str, dict[int, str]] = class_map
"""Task name to {label: class name}."""

PART_CLASS_MAPS: dict[str, dict[str, dict[int, str]]] = {
    "total": class_map_5_parts,
    "total_v3": class_map_5_parts_total_v3,
    "total_mr": class_map_parts_mr,
    "headneck_muscles": class_map_parts_headneck_muscles,
}
"""Tasks of several models: task name to {part name: {label of that model: class name}}."""

PART_NAMES: dict[str, dict[int, str]] = {
    "total": map_taskid_to_partname_ct,
    "total_v3": map_taskid_to_partname_ct_v3,
    "total_mr": map_taskid_to_partname_mr,
    "headneck_muscles": map_taskid_to_partname_headneck_muscles,
}
"""Tasks of several models: task name to {model id: part name}."""


def version() -> str:
    """Version of the installed TotalSegmentator."""
    return importlib.metadata.version("TotalSegmentator")


TESTED_VERSION = (2, 18)
"""Newest minor version of TotalSegmentator whose results the tests compare with."""


@functools.cache
def warn_of_untested_version() -> None:
    """Warn once if the installed TotalSegmentator is a newer minor version than tested."""
    major, minor = (int(part) for part in version().split(".")[:2])
    if (major, minor) > TESTED_VERSION:
        logger.warning(
            "WARNING: TotalSegmentator %s is newer than the version that totalfast was tested "
            "with (%d.%d); results may differ from TotalSegmentator's.",
            version(),
            *TESTED_VERSION,
        )


def weights_home() -> Path:
    """Folder that holds the ``DatasetNNN_...`` folders of the models.

    ``TOTALSEG_WEIGHTS_PATH`` wins over ``TOTALSEG_HOME_DIR``, which wins over
    ``~/.totalsegmentator``. This is the rule of upstream's ``get_weights_dir`` (config.py, 2.18.0),
    whose module imports torch; a test compares the two.
    """
    weights = os.environ.get("TOTALSEG_WEIGHTS_PATH")
    if weights is not None:
        return Path(weights)
    home = os.environ.get("TOTALSEG_HOME_DIR")
    if home is not None:
        return Path(home) / "nnunet/results"
    try:
        user_home = Path.home()
    except RuntimeError as error:
        raise WeightsError(
            "there is no place for models, because this user has no home folder. Set "
            "TOTALSEG_WEIGHTS_PATH to the folder of the models."
        ) from error
    if str(user_home) == "/":
        user_home = Path("/tmp")  # noqa: S108 - upstream's rule
    return user_home / ".totalsegmentator" / "nnunet/results"


def dataset_folder(model_id: int) -> Path:
    """Folder of a model's dataset below ``weights_home()``; it may not exist yet."""
    entry: dict[str, str] = TASK_ID_WEIGHTS_CONFIGS[model_id]
    return weights_home() / entry.get("rel_path", "") / entry["foldername"]


RELEASES_URL = "https://github.com/wasserth/TotalSegmentator/releases/download"
LICENSE_SERVER_URL = "https://backend.totalsegmentator.com:443/download_weights"
"""Where upstream's ``download_pretrained_weights`` fetches models (libs.py, 2.18.0). The two are
inside its functions; a test compares the requests for all models with upstream's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsRequest:
    """The request for a model's zip file."""

    url: str
    body: Mapping[str, str] | None = field(default=None, repr=False)
    """JSON of a POST request, with the licence number; None for a GET request."""


def is_licensed_model(model_id: int | str) -> bool:
    """Whether a model is downloaded with a licence number."""
    entry = TASK_ID_WEIGHTS_CONFIGS[model_id]
    return model_id in commercial_models.values() or bool(entry.get("commercial"))


def weights_request(model_id: int | str, *, base_url: str = RELEASES_URL) -> WeightsRequest | None:
    """Return the request that upstream sends for a model; None if upstream has no URL for it.

    Parameters
    ----------
    model_id
        Number, or name, in upstream's table.
    base_url
        Where models without a licence are.

    Raises
    ------
    LicenseError
        If the model needs a licence number, and none is stored.
    """
    if is_licensed_model(model_id):
        from totalsegmentator.config import get_license_number

        # Upstream inverts the table, so the last of two tasks with one model counts.
        tasks: dict[int | str, str] = {number: name for name, number in commercial_models.items()}
        task = tasks.get(model_id, str(model_id))
        check_license(task)
        body = {"license_number": get_license_number(), "task": task, "version": version()}
        return WeightsRequest(url=LICENSE_SERVER_URL, body=body)
    entry: dict[str, str] = TASK_ID_WEIGHTS_CONFIGS[model_id]
    if entry.get("version") in (None, "TODO"):
        return None
    return WeightsRequest(url=f"{base_url}/{entry['version']}/{entry['foldername']}.zip")


def check_license(task: str) -> None:
    """Check with upstream's own offline check whether a licensed task may run.

    Raises
    ------
    LicenseError
        If no licence number is stored, or an invalid one.
    """
    from totalsegmentator.config import has_valid_license_offline

    status, message = has_valid_license_offline()
    if status != "yes":
        raise LicenseError(
            f"task '{task}' needs a TotalSegmentator licence. "
            f"{message.removeprefix('ERROR: ')} For non-commercial use one is free: "
            "https://backend.totalsegmentator.com/license-academic/. Store it once with "
            "'totalseg_set_license -l NUMBER'."
        )


def store_license(number: str) -> None:
    """Let upstream check a licence number online and store it in its ``config.json``.

    The only use of the network beside downloads; it needs a number from the user.

    Raises
    ------
    LicenseError
        If upstream refuses the number.
    """
    from totalsegmentator.config import set_license_number, setup_totalseg

    setup_totalseg()
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            set_license_number(number)
    except SystemExit as refusal:
        raise LicenseError(" ".join(printed.getvalue().split())) from refusal


def resample_each_label(
    labels: NDArray[np.uint8], shape: tuple[int, int, int], *, threads: int
) -> NDArray[np.uint8]:
    """Upstream's linear resampling of each label's mask; labels and shape are (x, y, z)."""
    from totalsegmentator.resampling import resample_one_hot_crop

    resampled: NDArray[np.uint8] = resample_one_hot_crop(labels, shape, order=1, nr_cpus=threads)
    return resampled


def python_api() -> Any:  # noqa: ANN401 - a module without types
    """Upstream's module with its Python call."""
    from totalsegmentator import python_api

    return python_api


def postprocessing() -> Any:  # noqa: ANN401 - a module without types
    """Upstream's module of steps on label maps, for rarely used steps."""
    from totalsegmentator import postprocessing

    return postprocessing


def write_radiomics(scan: Path | Any, masks: Path, target: Path) -> None:  # noqa: ANN401 - nibabel
    """Write features of all masks in a folder as JSON; needs the package pyradiomics.

    Parameters
    ----------
    scan
        A NIfTI file, or an image, which pyradiomics then reads from a temporary file.
    masks
        Folder of the ``.nii.gz`` masks.
    target
        The file to write.
    """
    import nibabel as nib
    from totalsegmentator.statistics import get_radiomics_features_for_entire_dir

    with tempfile.TemporaryDirectory(prefix="totalfast-") as folder:
        if not isinstance(scan, Path):
            nib.save(scan, Path(folder) / "ct.nii.gz")
            scan = Path(folder) / "ct.nii.gz"
        get_radiomics_features_for_entire_dir(scan, masks, target)


def custom_trainer(name: str) -> type | None:
    """Return the trainer of that name if TotalSegmentator brings it itself, else None."""
    if name not in CUSTOM_TRAINERS:
        return None
    from totalsegmentator import custom_trainers

    trainer: type = getattr(custom_trainers, name)
    return trainer


CUSTOM_TRAINERS = frozenset(
    {
        "nnUNetTrainer_MOSAIC_1k_QuarterLR_NoMirroring",
        "nnUNetTrainerDiceTopK10Loss_2000epochs",
        "nnUNetTrainerSkeletonRecall",
    }
)
"""Trainers that upstream adds to nnU-Net. Only the names are here because their module needs
torch."""


def label_table_xml(labels: dict[int, str]) -> bytes:
    """XML that upstream stores with a label map: names and colours of the labels."""
    import nibabel as nib
    import numpy as np
    from totalsegmentator.nifti_ext_header import add_label_map_to_nifti

    # The function reads the image as float64; one voxel keeps that cheap.
    carrier = nib.Nifti1Image(np.zeros((1, 1, 1), dtype=np.uint8), np.eye(4))
    extension: Any = add_label_map_to_nifti(carrier, labels).header.extensions[-1]
    content: bytes = extension.get_content()
    return content


def label_names(header: Any) -> dict[int, str]:  # noqa: ANN401 - nibabel is untyped
    """Read the names that ``label_table_xml`` stored in a NIfTI header; none if it has no table.

    Upstream's ``load_multilabel_nifti`` parses XML, which other programs' extensions may not be.
    """
    names: dict[int, str] = {}
    for extension in header.extensions:
        content = extension.get_content()
        text = content.decode("utf-8", "replace") if isinstance(content, bytes) else str(content)
        labels = re.findall(r'<Label Key="(\d+)"[^>]*><!\[CDATA\[(.*?)\]\]></Label>', text)
        names.update((int(label), name) for label, name in labels)
    return names


def write_rtstruct(
    labels: NDArray[np.uint8], names: Mapping[int, str], series: Path, path: Path
) -> None:
    """Write labels as a DICOM RT structure set with upstream's own writer.

    Parameters
    ----------
    labels
        (x, y, z), as upstream's ``dcm_to_nifti`` orients the series.
    names
        Label to name; absent ones are left out.
    series
        Folder of the series' slices.
    path
        Must end in ``.dcm``.
    """
    from totalsegmentator.dicom_io import save_mask_as_rtstruct

    with _dicom_writers_are_silent():
        save_mask_as_rtstruct(labels, dict(names), series, path)


def write_dicom_seg(
    labels: NDArray[np.uint8], names: Mapping[int, str], series: Path, path: Path
) -> None:
    """Write labels as a DICOM segmentation; the arguments are those of ``write_rtstruct``.

    ``path`` may be a folder, too; the file is then named after its SeriesInstanceUID.
    """
    from totalsegmentator.dicom_io import save_mask_as_dicomseg

    with _dicom_writers_are_silent():
        save_mask_as_dicomseg(labels, dict(names), series, path, nifti_affine=None)


_writing_dicom = threading.Lock()


@contextlib.contextmanager
def _dicom_writers_are_silent() -> Iterator[None]:
    """Keep upstream's DICOM writers from printing, drawing bars and configuring the root logger."""
    from totalsegmentator import dicom_io

    replaced: list[tuple[Any, str, Any]] = [(dicom_io, "tqdm", lambda items, **_: items)]
    with contextlib.suppress(ImportError):
        replaced.append((importlib.import_module("rt_utils.rtstruct"), "print", lambda *_: None))
    # logging.basicConfig leaves the root logger alone if it has a handler.
    root, silence = logging.getLogger(), logging.NullHandler()
    with _writing_dicom:
        before = [vars(module).get(name, print) for module, name, _ in replaced]
        root.addHandler(silence)
        try:
            for module, name, value in replaced:
                setattr(module, name, value)
            yield
        finally:
            root.removeHandler(silence)
            for (module, name, _), value in zip(replaced, before, strict=True):
                setattr(module, name, value)
