"""One case of a plain nnU-Net model: its files or arrays, as the network gets them.

Knows nnU-Net's readers, preprocessors and the properties that it hands from one step to the next;
knows nothing of networks. What nnU-Net does in worker processes is done in a thread.
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from totalfast.engine.normalise import NetworkImage, to_network_image
from totalfast.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from totalfast.engine.model import Model

Item = TypeVar("Item")
_END = object()


def ahead(items: Iterable[Item]) -> Iterator[Item]:
    """Yield items that are made in a thread, one ahead of the one that is used."""
    iterator = iter(items)
    with ThreadPoolExecutor(1, thread_name_prefix="totalfast-prepare") as pool:
        future = pool.submit(next, iterator, _END)
        while (item := future.result()) is not _END:
            future = pool.submit(next, iterator, _END)
            yield item  # type: ignore[misc] # it is not the end


def list_cases(folder: str, file_ending: str) -> list[list[str]]:
    """The files of each case of a folder, ``CASE_0000`` and on, one a channel, sorted.

    As nnU-Net's ``create_lists_from_splitted_dataset_folder``, which forks a pool of processes for
    it, with torch's threads running.

    Raises
    ------
    InputError
        If a file has the ending, but no number of a channel.
    """
    channel = re.compile(r"(.+)_\d{4}" + re.escape(file_ending))
    cases: dict[str, list[str]] = {}
    for path in sorted(Path(folder).iterdir()):
        if path.name.endswith(file_ending) and path.is_file():
            match = channel.fullmatch(path.name)
            if match is None:
                raise InputError(
                    f"{path} has no number of a channel: an image is called CASE_0000{file_ending}."
                )
            cases.setdefault(match[1], []).append(str(path))
    return [cases[name] for name in sorted(cases)]


def case_from_files(
    files: Sequence[str], previous_stage: str | None, output: str | None, model: Model
) -> dict[str, Any]:
    """Read and prepare one case: what nnU-Net's data iterators give.

    Parameters
    ----------
    files
        One file a channel.
    previous_stage
        Segmentation of a cascade's first stage.
    output
        Handed on.
    model
        Whose plans name the reader.

    Raises
    ------
    InputError
        If a file can't be read, or the channels are not the model's.
    """
    reader = model.plans.image_reader_writer_class()
    try:
        image, properties = reader.read_images(tuple(files))
        before = None if previous_stage is None else reader.read_seg(previous_stage)[0]
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise InputError(f"{files[0]} can't be read: {error}") from error
    return case_from_array(image, before, properties, output, model)


def case_from_array(
    image: NDArray[Any],
    previous_stage: NDArray[Any] | None,
    properties: dict[str, Any],
    output: str | None,
    model: Model,
) -> dict[str, Any]:
    """Prepare one case of an image (channels, z, y, x) as nnU-Net's reader gives it.

    ``properties`` must hold the spacing; see ``case_from_files`` for the others.
    """
    import torch

    if _is_default(model) and previous_stage is None:
        spacing = [float(mm) for mm in properties["spacing"]]
        prepared = to_network_image(image, spacing_mm=spacing, model=model)
        data = prepared.voxels
        properties["shape_before_cropping"] = prepared.full_shape
        properties["bbox_used_for_cropping"] = [[part.start, part.stop] for part in prepared.box]
        properties["shape_after_cropping_and_before_resampling"] = prepared.cropped_shape
    else:
        data = _by_nnunet(image, previous_stage, properties, model)
    tensor = torch.from_numpy(data).to(torch.float32, memory_format=torch.contiguous_format)
    return {"data": tensor, "data_properties": properties, "ofile": output}


def _is_default(model: Model) -> bool:
    """Whether the model is prepared for by nnU-Net's own preprocessor, which ours equals."""
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor

    return model.configuration.preprocessor_class is DefaultPreprocessor


def _by_nnunet(
    image: NDArray[Any],
    previous_stage: NDArray[Any] | None,
    properties: dict[str, Any],
    model: Model,
) -> NDArray[Any]:
    """Prepare with the preprocessor that the plans name; a cascade's labels become channels."""
    from nnunetv2.utilities.label_handling.label_handling import convert_labelmap_to_one_hot

    preprocessor = model.configuration.preprocessor_class(verbose=False)
    data, labels, _ = preprocessor.run_case_npy(
        image, previous_stage, properties, model.plans, model.configuration, model.dataset
    )
    if previous_stage is not None:
        one_hot = convert_labelmap_to_one_hot(labels[0], model.labels.foreground_labels, data.dtype)
        data = np.vstack((data, one_hot))
    prepared: NDArray[Any] = data
    return prepared


def network_image(case: dict[str, Any], model: Model) -> NetworkImage:
    """Describe a case by what nnU-Net's properties say of it."""
    properties = case["data_properties"]
    spacing = [float(properties["spacing"][axis]) for axis in model.plans.transpose_forward]
    plans_mm = [float(mm) for mm in model.configuration.spacing]
    if len(plans_mm) < len(spacing):
        plans_mm = [spacing[0], *plans_mm]
    z, y, x = (slice(int(start), int(stop)) for start, stop in properties["bbox_used_for_cropping"])
    return NetworkImage(
        voxels=np.asarray(case["data"], dtype=np.float32),
        box=(z, y, x),
        cropped_shape=tuple(properties["shape_after_cropping_and_before_resampling"]),
        full_shape=tuple(properties["shape_before_cropping"]),
        spacing_mm=tuple(spacing),
        network_spacing_mm=tuple(plans_mm),
    )
