"""Prepare one case of an nnU-Net model for the network, from files or arrays.

nnU-Net prepares cases in worker processes; here it is done in a thread.
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from totalfast.engine.nnunet_calls import call_quietly
from totalfast.engine.normalise import NetworkImage, to_network_image
from totalfast.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from totalfast.engine.model import Model

Item = TypeVar("Item")
_END = object()


def ahead(items: Iterable[Item]) -> Iterator[Item]:
    """Yield items; a thread computes the next item while the current one is used."""
    iterator = iter(items)
    with ThreadPoolExecutor(1, thread_name_prefix="totalfast-prepare") as pool:
        future = pool.submit(next, iterator, _END)
        while (item := future.result()) is not _END:
            future = pool.submit(next, iterator, _END)
            yield item  # type: ignore[misc] # not _END here


def list_cases(folder: str, file_ending: str) -> list[list[str]]:
    """List the files of each case in a folder, one per channel: ``CASE_0000``, ``CASE_0001``, ...

    Equals nnU-Net's ``create_lists_from_splitted_dataset_folder``, which forks processes while
    torch's threads are running.

    Returns
    -------
        A list of paths per case; cases and paths are sorted.

    Raises
    ------
    InputError
        If a file has the ending but no channel number.
    """
    channel = re.compile(r"(.+)_\d{4}" + re.escape(file_ending))
    cases: dict[str, list[str]] = {}
    for path in sorted(Path(folder).iterdir()):
        if path.name.endswith(file_ending) and path.is_file():
            match = channel.fullmatch(path.name)
            if match is None:
                raise InputError(
                    f"{path} has no channel number: an image is named CASE_0000{file_ending}."
                )
            cases.setdefault(match[1], []).append(str(path))
    return [cases[name] for name in sorted(cases)]


def case_from_files(
    files: Sequence[str], previous_stage: str | None, output: str | None, model: Model
) -> dict[str, Any]:
    """Read and prepare one case.

    Parameters
    ----------
    files
        One file per channel.
    previous_stage
        Path of the segmentation of a cascade's first stage.
    output
        The case's ``ofile``: path of the result without its ending.
    model
        A loaded model; its plans define the reader and all preparation.

    Returns
    -------
        A dict of ``data``, ``data_properties`` and ``ofile``, as nnU-Net's data iterators yield it.

    Raises
    ------
    InputError
        If a file can't be read, or the model needs another number of channels.
    """
    reader = model.plans.image_reader_writer_class()
    try:
        image, properties = call_quietly(reader.read_images, tuple(files))
        labels = None
        if previous_stage is not None:
            labels, _ = call_quietly(reader.read_seg, previous_stage)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise InputError(f"{files[0]} can't be read: {error}") from error
    return case_from_array(image, labels, properties, output, model)


def case_from_array(
    image: NDArray[Any],
    previous_stage: NDArray[Any] | None,
    properties: dict[str, Any],
    output: str | None,
    model: Model,
) -> dict[str, Any]:
    """Prepare one case from an image (channels, z, y, x) as nnU-Net's reader returns it.

    ``previous_stage`` is the segmentation of a cascade's first stage, and ``properties`` must hold
    the spacing. See ``case_from_files`` for the other parameters and the returned dict.
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
    """Whether the plans use nnU-Net's default preprocessor, which ``to_network_image`` equals."""
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor

    return model.configuration.preprocessor_class is DefaultPreprocessor


def _by_nnunet(
    image: NDArray[Any],
    previous_stage: NDArray[Any] | None,
    properties: dict[str, Any],
    model: Model,
) -> NDArray[Any]:
    """Prepare an image with the plans' preprocessor; a cascade's labels become channels."""
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
    """Convert a case and its nnU-Net properties to a ``NetworkImage``."""
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
