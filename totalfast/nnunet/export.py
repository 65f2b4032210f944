"""nnU-Net's export, with identical files in a fraction of its time and memory."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from totalfast.export import export_labels
from totalfast.models.nnunet_calls import call_quietly
from totalfast.models.nnunet_versions import check_version
from totalfast.nnunet.client_changes import has_ordinary_labels, has_own_writer
from totalfast.nnunet.file_checks import check_voxels
from totalfast.nnunet.originals import convert_logits
from totalfast.system.pending_files import PendingFiles

if TYPE_CHECKING:
    from typing import TypeAlias

    import torch
    from numpy.typing import NDArray

    Untyped: TypeAlias = Any
    """nnU-Net's objects, which have no types."""

INCOMPLETE = "the written file is incomplete, perhaps because the disk is full"


def export_prediction_from_logits(
    predicted_array_or_file: torch.Tensor | NDArray[np.floating],
    properties_dict: dict[str, Any],
    configuration_manager: Untyped,
    plans_manager: Untyped,
    dataset_json_dict_or_file: dict[str, Any] | str,
    output_file_truncated: str,
    save_probabilities: bool = False,  # noqa: FBT001, FBT002 - nnU-Net's signature
    num_threads_torch: int = 8,
    use_cropped_logits_resampling: bool = False,  # noqa: FBT001, FBT002 - TotalSegmentator's
    *,
    method: str = "auto",
) -> None:
    """Turn logits into a segmentation of the image's size and write it.

    Replaces nnU-Net's function in code with its own loop around nnU-Net's network.

    Parameters
    ----------
    predicted_array_or_file
        Logits (classes, z, y, x) at the network's resolution.
    properties_dict
        The image's properties from nnU-Net's preprocessor.
    configuration_manager, plans_manager, dataset_json_dict_or_file
        nnU-Net's objects of the model.
    output_file_truncated
        Path of the file without its ending, which is in dataset.json.
    save_probabilities
        Also write ``.npz`` and ``.pkl``. This uses nnU-Net's own function and needs its memory.
    num_threads_torch
        Number of threads for ``save_probabilities``.
    use_cropped_logits_resampling
        TotalSegmentator's parameter: its own function exports, which approximates the labels.
    method
        How labels are resampled, as in ``totalfast.export.export_labels``; "auto" gives nnU-Net's
        labels.
    """
    check_version()
    dataset = dataset_json_dict_or_file
    if isinstance(dataset, str):
        dataset = json.loads(Path(dataset).read_text())
    label_manager = plans_manager.get_label_manager(dataset)
    ret = convert_predicted_logits_to_segmentation_with_correct_shape(
        predicted_array_or_file,
        plans_manager,
        configuration_manager,
        label_manager,
        properties_dict,
        save_probabilities,
        num_threads_torch,
        use_cropped_logits_resampling,
        method=method,
    )
    segmentation, probabilities = ret if isinstance(ret, tuple) else (ret, None)
    write_segmentation(
        segmentation,
        Path(output_file_truncated),
        properties_dict,
        plans_manager,
        dataset,
        probabilities=probabilities,
    )


def convert_predicted_logits_to_segmentation_with_correct_shape(
    predicted_logits: torch.Tensor | NDArray[np.floating],
    plans_manager: Untyped,
    configuration_manager: Untyped,
    label_manager: Untyped,
    properties_dict: dict[str, Any],
    return_probabilities: bool = False,  # noqa: FBT001, FBT002 - nnU-Net's signature
    num_threads_torch: int = 8,
    use_cropped_logits_resampling: bool = False,  # noqa: FBT001, FBT002 - TotalSegmentator's
    *,
    method: str = "auto",
) -> NDArray[np.unsignedinteger] | tuple[NDArray[np.unsignedinteger], NDArray[np.floating]]:
    """Turn logits into a segmentation of the image's size.

    Replaces nnU-Net's function. Probabilities, and labels by another rule than argmax or sigmoid
    above 0.5, are computed by nnU-Net's own function and need its memory.

    Parameters
    ----------
    predicted_logits
        Logits (classes, z, y, x) at the network's resolution.
    plans_manager, configuration_manager, label_manager
        nnU-Net's objects of the model.
    properties_dict
        The image's properties from nnU-Net's preprocessor.
    return_probabilities
        Also return the probabilities.
    num_threads_torch, use_cropped_logits_resampling, method
        As for ``export_prediction_from_logits``.

    Returns
    -------
        Labels (z, y, x), or labels and probabilities (classes, z, y, x).
    """
    by_rule = has_ordinary_labels(label_manager) and fits_image(properties_dict)
    if by_rule and not return_probabilities and not use_cropped_logits_resampling:
        return segmentation_from_logits(
            predicted_logits,
            properties_dict,
            configuration_manager,
            plans_manager,
            label_manager,
            method=method,
        )
    more = (True,) if use_cropped_logits_resampling else ()
    return convert_logits(  # type: ignore[no-any-return]
        predicted_logits,
        plans_manager,
        configuration_manager,
        label_manager,
        properties_dict,
        return_probabilities,
        num_threads_torch,
        *more,
    )


def fits_image(properties: dict[str, Any]) -> bool:
    """Whether the box of the crop lies in the image and has the crop's shape."""
    box = properties["bbox_used_for_cropping"]
    shapes = (
        properties["shape_after_cropping_and_before_resampling"],
        properties["shape_before_cropping"],
    )
    return all(
        start >= 0 and stop <= full and stop - start == cropped
        for (start, stop), cropped, full in zip(box, *shapes, strict=True)
    )


def segmentation_from_logits(
    logits: torch.Tensor | NDArray[np.floating],
    properties: dict[str, Any],
    configuration: Untyped,
    plans: Untyped,
    labels: Untyped,
    *,
    method: str = "auto",
) -> NDArray[np.unsignedinteger]:
    """Labels (z, y, x) of the whole image, from logits (classes, z, y, x) of its cropped part."""
    spacing = [properties["spacing"][axis] for axis in plans.transpose_forward]
    shape = tuple(properties["shape_after_cropping_and_before_resampling"])
    plans_mm = list(configuration.spacing)
    cropped = export_labels(
        logits,
        shape,
        method=method,
        resampling=configuration.resampling_fn_probabilities,
        spacing=plans_mm if len(plans_mm) == len(shape) else [spacing[0], *plans_mm],
        new_spacing=spacing,
        regions=tuple(labels.regions_class_order) if labels.has_regions else None,
        labels=len(labels.foreground_labels),
    )
    whole = np.zeros(tuple(properties["shape_before_cropping"]), dtype=cropped.dtype)
    whole[tuple(slice(*bounds) for bounds in properties["bbox_used_for_cropping"])] = cropped
    restored: NDArray[np.unsignedinteger] = whole.transpose(plans.transpose_backward)
    return restored


def write_segmentation(
    segmentation: NDArray[np.unsignedinteger],
    target: Path,
    properties: dict[str, Any],
    plans: Untyped,
    dataset: dict[str, Any],
    *,
    probabilities: NDArray[np.floating] | None = None,
) -> None:
    """Write a segmentation with the model's writer, completely or not at all.

    ``target`` is the path without its ending. With probabilities, ``.npz`` and ``.pkl`` files are
    written too, like nnU-Net's.
    """
    ending = dataset["file_ending"]
    writer = plans.image_reader_writer_class()
    with PendingFiles(rescue_from=target.parent) as files:
        if probabilities is not None:
            from batchgenerators.utilities.file_and_folder_operations import save_pickle

            files.write(
                target.with_name(target.name + ".npz"),
                lambda staged: np.savez_compressed(staged, probabilities=probabilities),
            )
            files.write(
                target.with_name(target.name + ".pkl"),
                lambda staged: save_pickle(properties, str(staged)),
            )
        place = target.with_name(target.name + ending)
        if has_own_writer(type(writer)):
            # A writer of the program: it may write anywhere, and needs the real path.
            writer.write_seg(segmentation, str(place), properties)
        else:
            files.write(
                place,
                lambda staged: _write_checked(segmentation, staged, properties, writer),
                names_its_files=True,
            )
        files.commit()


def _write_checked(
    segmentation: NDArray[np.unsignedinteger],
    path: Path,
    properties: dict[str, Any],
    writer: Untyped,
) -> list[Path]:
    """Write a segmentation and check that the file is complete; return what was written.

    On a full disk, SimpleITK writes truncated NIfTI files without an error; for other formats it
    raises RuntimeError. It writes ``x.nii.gz.nii.gz`` as ``x.nii.gz``, and the writer of TIFF files
    writes a second file.

    Raises
    ------
    OSError
        If the file is not complete.
    """
    before = set(path.parent.iterdir())
    try:
        call_quietly(writer.write_seg, segmentation, str(path), properties)
    except RuntimeError as error:
        raise OSError(errno.EIO, INCOMPLETE) from error
    written = sorted(set(path.parent.iterdir()) - before)
    try:
        checked = [check_voxels(file) for file in written]
    except (EOFError, OSError, ValueError) as error:
        raise OSError(errno.EIO, INCOMPLETE) from error
    if not written or None in checked:
        raise OSError(errno.EIO, INCOMPLETE)
    return written
