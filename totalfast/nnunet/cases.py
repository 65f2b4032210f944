"""Prepare one case of an nnU-Net model for the network, from files or arrays.

nnU-Net prepares cases in worker processes; here it is done in a thread.
"""

from __future__ import annotations

import logging
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from totalfast.engine.normalise import NetworkImage, to_network_image
from totalfast.errors import InputError
from totalfast.models.nnunet_calls import with_print
from totalfast.models.nnunet_versions import prepare
from totalfast.nnunet.client_changes import (
    PREPARING_FUNCTIONS,
    changed_functions,
    changed_methods,
)
from totalfast.nnunet.file_checks import check_voxels, is_utf8

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from typing import TypeAlias

    from numpy.typing import NDArray

    from totalfast.models.model import Model

    Untyped: TypeAlias = Any
    """What nnU-Net's readers return."""

logger = logging.getLogger(__name__)

FLAT = 999
"""nnU-Net's readers give 2-D images this multiple of their spacing as the thickness of a slice."""

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
    torch's threads are running, with three differences: hidden files are left out, the ending may
    be in upper case, and links to missing files are listed, so that they are reported.

    Returns
    -------
        A list of paths per case; cases and paths are sorted. A file that has the ending but no
        channel number is a case of its own, which ``check_channel_numbers`` refuses.
    """
    cases: dict[str, list[str]] = {}
    for path in sorted(Path(folder).iterdir()):
        hidden = path.name.startswith(".")
        if hidden or not path.name.lower().endswith(file_ending.lower()):
            continue
        if path.is_file() or not path.exists():
            match = _channel(file_ending).fullmatch(path.name)
            cases.setdefault(match[1] if match else path.name, []).append(str(path))
    return [cases[name] for name in sorted(cases)]


def check_channel_numbers(files: Sequence[str], file_ending: str) -> None:
    """Check that the files of a case in a folder are numbered from 0000 without a gap.

    nnU-Net takes the files in their order, so without channel 0000 it would use the wrong channels.

    Raises
    ------
    InputError
        If a file has no channel number, or a number is missing or there twice.
    """
    numbers = []
    for file in files:
        match = _channel(file_ending).fullmatch(Path(file).name)
        if match is None:
            raise InputError(
                f"{file} has no channel number: an image is named CASE_0000{file_ending}."
            )
        numbers.append(match[2])
    expected = [f"{number:04d}" for number in range(len(files))]
    if numbers != expected:
        raise InputError(
            f"{_names(files)}: the channels are numbered {', '.join(numbers)}, but should be "
            f"{', '.join(expected)}."
        )


def _channel(file_ending: str) -> re.Pattern[str]:
    return re.compile(r"(.+)_(\d{4})" + re.escape(file_ending), re.IGNORECASE | re.DOTALL)


def _names(files: Sequence[str]) -> str:
    return ", ".join(Path(file).name for file in files)


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
        If a file can't be read, the files do not fit together, or the model needs another number
        of channels or of dimensions.
    """
    kind = model.configuration.preprocessor_class
    if changed_methods(kind, ("run_case",)):
        data, labels, properties = kind(verbose=False).run_case(
            list(files), previous_stage, model.plans, model.configuration, model.dataset
        )
        return _case(_stacked(data, labels, previous_stage, model), properties, output)
    reader = model.plans.image_reader_writer_class()
    image, properties = _read(reader.read_images, tuple(files), _names(files))
    _check_image(image, properties, _names(files), model)
    labels = None
    if previous_stage is not None:
        labels, _ = _read(reader.read_seg, previous_stage, f"the previous stage's {previous_stage}")
        if labels.shape[1:] != image.shape[1:]:
            raise InputError(
                f"the previous stage's {previous_stage} has {labels.shape[1:]} voxels, but the "
                f"image has {image.shape[1:]} (z, y, x)."
            )
    return case_from_array(image, labels, properties, output, model)


def _read(read: Callable[..., Any], files: str | tuple[str, ...], what: str) -> Untyped:
    """Call a reader; its printed remarks become warnings, or the reason of an error."""
    printed: list[str] = []
    try:
        for file in [files] if isinstance(files, str) else files:
            if not is_utf8(file):
                raise ValueError("its name is not UTF-8; rename it")  # noqa: TRY301
            # If it knows nothing about the file, the reader may know more.
            no_number, voxels = check_voxels(Path(file)) or (0, 0)
            if no_number:
                if no_number == voxels:
                    raise ValueError("all its voxels are NaN or infinite")  # noqa: TRY301
                logger.warning(
                    "WARNING: %s: %d of %d voxels are NaN or infinite; nnU-Net's readers based on "
                    "SimpleITK take 0 for them.",
                    Path(file).name,
                    no_number,
                    voxels,
                )
        contents = with_print(read, lambda *values: printed.extend(map(str, values)))(files)
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - readers' libraries have errors of many types
        reason = " ".join(_remarks(printed)) or _reason(error)
        raise InputError(f"{what} can't be read: {reason}") from error
    for remark in _remarks(printed):
        logger.warning("WARNING: %s: %s", what, remark)
    return contents


def _remarks(printed: Sequence[str]) -> list[str]:
    """nnU-Net's remarks, one line each, without the list of files and the advice behind it."""
    _, *remarks = re.split(r"(?:WARNING|ERROR)[!:]* ", " ".join(printed))
    return [" ".join(remark.partition("Image files:")[0].split()) for remark in remarks]


def _reason(error: Exception) -> str:
    """The last line of an error's message, without ITK's names of objects."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return re.sub(r"^(?:ITK ERROR|sitk::ERROR): (?:\w+\(\w+\): )?", "", lines[-1])


def _check_image(image: NDArray[Any], properties: dict[str, Any], what: str, model: Model) -> None:
    """Check an image's number of channels and of dimensions."""
    needed = len(model.configuration.normalization_schemes)
    if len(image) != needed:
        channels = model.dataset.get("channel_names") or model.dataset.get("modality") or {}
        list_of_them = ", ".join(f"{int(k):04d} ({name})" for k, name in channels.items())
        raise InputError(
            f"{what}: {len(image)} channel{'s' * (len(image) != 1)}, but the model needs {needed}: "
            f"{list_of_them}."
        )
    spacing = [float(mm) for mm in properties["spacing"]]
    is_flat = image.shape[1] == 1 and spacing[0] >= FLAT * max(spacing[1:])
    if is_flat and len(model.patch_size) == 3:  # noqa: PLR2004 - dimensions
        raise InputError(f"{what}: 2-D {image.shape[2:]}, but the model needs 3-D images.")


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

    Raises
    ------
    InputError
        If the prepared image has values that are NaN or infinite: the network would return NaN for
        each tile that contains one.
    """
    properties = dict(properties)  # programs may give the same one with several images
    if _is_default(model) and previous_stage is None:
        spacing = [float(mm) for mm in properties["spacing"]]
        prepared = to_network_image(image, spacing_mm=spacing, model=model)
        properties["shape_before_cropping"] = prepared.full_shape
        properties["bbox_used_for_cropping"] = [[part.start, part.stop] for part in prepared.box]
        properties["shape_after_cropping_and_before_resampling"] = prepared.cropped_shape
        return _case(prepared.voxels.numpy(), properties, output)
    preprocessor = model.configuration.preprocessor_class(verbose=False)
    data, labels, properties = prepare(preprocessor, image, previous_stage, properties, model)
    return _case(_stacked(data, labels, previous_stage, model), properties, output)


def _case(data: NDArray[Any], properties: dict[str, Any], output: str | None) -> dict[str, Any]:
    import torch

    tensor = torch.from_numpy(data).to(torch.float32, memory_format=torch.contiguous_format)
    # A finite sum means that all values are finite, and takes a fraction of the time.
    if not torch.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
        raise InputError(
            "the image that the network would get has NaN or infinite values. Replace such voxels "
            "of the image first, for example by the intensity of air."
        )
    return {"data": tensor, "data_properties": properties, "ofile": output}


def _is_default(model: Model) -> bool:
    """Whether the plans use nnU-Net's default preprocessor, which ``to_network_image`` equals."""
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor

    kind = model.configuration.preprocessor_class
    return (
        kind is DefaultPreprocessor
        and changed_methods(kind, ("run_case_npy", "_normalize")) is None
        and changed_functions(PREPARING_FUNCTIONS) is None
    )


def _stacked(
    data: NDArray[Any], labels: NDArray[Any], previous_stage: object, model: Model
) -> NDArray[Any]:
    """Add the labels of a cascade's previous stage, one channel per label."""
    from nnunetv2.utilities.label_handling.label_handling import convert_labelmap_to_one_hot

    if previous_stage is None:
        return data
    one_hot = convert_labelmap_to_one_hot(labels[0], model.labels.foreground_labels, data.dtype)
    return np.vstack((data, one_hot))


def network_image(case: dict[str, Any], model: Model) -> NetworkImage:
    """Convert a case and its nnU-Net properties to a ``NetworkImage``."""
    import torch

    properties = case["data_properties"]
    spacing = [float(properties["spacing"][axis]) for axis in model.plans.transpose_forward]
    plans_mm = [float(mm) for mm in model.configuration.spacing]
    if len(plans_mm) < len(spacing):
        plans_mm = [spacing[0], *plans_mm]
    z, y, x = (slice(int(start), int(stop)) for start, stop in properties["bbox_used_for_cropping"])
    return NetworkImage(
        voxels=torch.from_numpy(np.asarray(case["data"], dtype=np.float32)),
        box=(z, y, x),
        cropped_shape=tuple(properties["shape_after_cropping_and_before_resampling"]),
        full_shape=tuple(properties["shape_before_cropping"]),
        spacing_mm=tuple(spacing),
        network_spacing_mm=tuple(plans_mm),
    )
