"""nnU-Net's export, with the same files and a fraction of its time and memory.

Knows logits, nnU-Net's properties and its writers; knows nothing of networks.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from totalfast.export import export_labels
from totalfast.system.pending_files import PendingFiles

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray


def export_prediction_from_logits(
    predicted_array_or_file: torch.Tensor | NDArray[np.floating],
    properties_dict: dict[str, Any],
    configuration_manager: Any,  # noqa: ANN401 - nnU-Net is untyped
    plans_manager: Any,  # noqa: ANN401
    dataset_json_dict_or_file: dict[str, Any] | str,
    output_file_truncated: str,
    save_probabilities: bool = False,  # noqa: FBT001, FBT002 - nnU-Net's signature
    num_threads_torch: int = 8,
    *,
    method: str = "auto",
) -> None:
    """Turn logits into a segmentation of the image's own size and write it: nnU-Net's function.

    For people who keep their own loop around nnU-Net's network.

    Parameters
    ----------
    predicted_array_or_file
        Logits (classes, z, y, x) at the network's resolution.
    properties_dict
        What nnU-Net's preprocessor said of the image.
    configuration_manager, plans_manager, dataset_json_dict_or_file
        nnU-Net's, of the model.
    output_file_truncated
        Target without its ending, which dataset.json gives.
    save_probabilities
        Also write ``.npz`` and ``.pkl``: this is done by nnU-Net's own function, with its memory.
    num_threads_torch
        Threads of nnU-Net's own function.
    method
        How labels are resampled, as in ``totalfast.export.export_labels``; "auto" gives nnU-Net's
        labels.
    """
    dataset = dataset_json_dict_or_file
    if isinstance(dataset, str):
        dataset = json.loads(Path(dataset).read_text())
    labels_of = plans_manager.get_label_manager(dataset)
    if save_probabilities:
        from nnunetv2.inference.export_prediction import (
            convert_predicted_logits_to_segmentation_with_correct_shape,
        )

        segmentation, probabilities = convert_predicted_logits_to_segmentation_with_correct_shape(
            predicted_array_or_file, plans_manager, configuration_manager, labels_of,
            properties_dict, return_probabilities=True, num_threads_torch=num_threads_torch,
        )  # fmt: skip
    else:
        probabilities = None
        segmentation = segmentation_from_logits(
            predicted_array_or_file, properties_dict, configuration_manager, plans_manager,
            labels_of, method=method,
        )  # fmt: skip
    write_segmentation(
        segmentation, Path(output_file_truncated), properties_dict, plans_manager, dataset,
        probabilities=probabilities,
    )  # fmt: skip


def segmentation_from_logits(
    logits: torch.Tensor | NDArray[np.floating],
    properties: dict[str, Any],
    configuration: Any,  # noqa: ANN401 - nnU-Net is untyped
    plans: Any,  # noqa: ANN401
    labels: Any,  # noqa: ANN401
    *,
    method: str = "auto",
) -> NDArray[np.unsignedinteger]:
    """Labels (z, y, x) of the whole image, from logits of the part that was not cropped."""
    spacing = [properties["spacing"][axis] for axis in plans.transpose_forward]
    shape = tuple(properties["shape_after_cropping_and_before_resampling"])
    own = list(configuration.spacing)
    found = export_labels(
        logits,
        shape,
        method=method,
        resampling=configuration.resampling_fn_probabilities,
        spacing=own if len(own) == len(shape) else [spacing[0], *own],
        new_spacing=spacing,
        regions=tuple(labels.regions_class_order) if labels.has_regions else None,
        labels=len(labels.foreground_labels),
    )
    whole = np.zeros(tuple(properties["shape_before_cropping"]), dtype=found.dtype)
    whole[tuple(slice(*bounds) for bounds in properties["bbox_used_for_cropping"])] = found
    restored: NDArray[np.unsignedinteger] = whole.transpose(plans.transpose_backward)
    return restored


def write_segmentation(
    segmentation: NDArray[np.unsignedinteger],
    target: Path,
    properties: dict[str, Any],
    plans: Any,  # noqa: ANN401 - nnU-Net is untyped
    dataset: dict[str, Any],
    *,
    probabilities: NDArray[np.floating] | None = None,
) -> None:
    """Write a segmentation with the model's writer, whole or not at all.

    ``target`` has no ending yet. With probabilities, nnU-Net's ``.npz`` and ``.pkl`` too.
    """
    ending = dataset["file_ending"]
    writer = plans.image_reader_writer_class()
    with PendingFiles() as files:
        if probabilities is not None:
            from batchgenerators.utilities.file_and_folder_operations import save_pickle

            archive = files.path(target.with_name(target.name + ".npz"), ending=".npz")
            np.savez_compressed(archive, probabilities=probabilities)
            save_pickle(properties, str(files.path(target.with_name(target.name + ".pkl"))))
        part = files.path(target.with_name(target.name + ending), ending=ending)
        writer.write_seg(segmentation, str(part), properties)
