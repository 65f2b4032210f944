"""Predict, export and write the cases of one of nnU-Net's predictors.

totalfast's sliding window and export run where a program has left nnU-Net's as they are; else
nnU-Net's methods and functions, in the form that the program has given them.
"""

from __future__ import annotations

import copy
import logging
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from nnunetv2.utilities.helpers import empty_cache
from tqdm import tqdm

from totalfast.engine.ladder import Ladder
from totalfast.engine.predict import predict_network_image
from totalfast.engine.sliding_window import inference_settings, predict_logits
from totalfast.engine.tiles import Tiling, plan_tiles
from totalfast.errors import OutputError
from totalfast.nnunet.cases import case_from_files, network_image
from totalfast.nnunet.client_changes import (
    EXPORT_FUNCTIONS,
    changed_functions,
    changed_loop,
    changed_methods,
    has_ordinary_labels,
)
from totalfast.nnunet.client_model import companion, description
from totalfast.nnunet.export import fits_image, segmentation_from_logits, write_segmentation
from totalfast.nnunet.originals import convert_logits, nnunets_function, original

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import TypeAlias

    from numpy.typing import NDArray

    from totalfast.models.model import Model

    Untyped: TypeAlias = Any
    """nnU-Net's predictors, label managers and tqdm's bars, which have no types."""

    Labels: TypeAlias = NDArray[np.unsignedinteger]
    Result: TypeAlias = Labels | tuple[Labels, NDArray[np.floating]]
    """A segmentation (z, y, x), or a segmentation and its probabilities (classes, z, y, x)."""

logger = logging.getLogger(__name__)

Output = TypeVar("Output")


@contextmanager
def attempt(predictor: Untyped, case: str) -> Iterator[None]:
    """Hand a case's error to ``on_failure``; without this function the error is raised."""
    on_failure = companion(predictor).on_failure
    try:
        yield
    except OutputError:
        raise
    except Exception as error:
        if on_failure is None:
            raise
        on_failure(case, error)


def prepared(
    predictor: Untyped, cases: Iterable[tuple[list[str], str | None, str | None]]
) -> Iterator[dict[str, Any]]:
    """Read and prepare cases: their files, the previous stage's file, the output's path."""
    for files, previous, output in cases:
        case = None
        with attempt(predictor, name_of(output) or name_of(files[0])):
            case = case_from_files(files, previous, output, description(predictor))
        if case is not None:
            yield case


def predict_cases(
    predictor: Untyped,
    cases: Iterable[dict[str, Any]],
    save_probabilities: bool,  # noqa: FBT001 - nnU-Net's flag
) -> list[Result | None]:
    """Predict prepared cases; a thread writes each case while the next one is predicted.

    Returns
    -------
        Per case: None if it was written, else its result.
    """
    results: list[Result | Future[bool] | None] = []
    with ThreadPoolExecutor(1, thread_name_prefix="totalfast-write") as writer:
        writing: list[Future[bool]] = []
        for given in cases:
            # A copy: an iterator may use its objects again.
            properties = copy.deepcopy(given["data_properties"])
            case = given | {"data_properties": properties}
            predicted: list[Any] = []  # stays empty if the case fails
            with attempt(predictor, name_of(case["ofile"])):
                predicted.append(predict_case(predictor, case, save_probabilities))
            if not predicted:
                continue
            (result,) = predicted
            if result is None or case["ofile"] is None:
                results.append(result)
                continue
            writing.append(writer.submit(write_case, predictor, result, case))
            results.append(writing[-1])
            for earlier in writing[:-1]:  # at most one waits; errors are raised early
                earlier.result()
        for last in writing:
            last.result()
    empty_cache(predictor.device)
    return [
        None if isinstance(result, Future) else result
        for result in results
        if not isinstance(result, Future) or result.result()
    ]


def predict_case(
    predictor: Untyped,
    case: dict[str, Any],
    save_probabilities: bool,  # noqa: FBT001 - nnU-Net's flag
) -> Result | Callable[[], Result] | None:
    """Predict a prepared case.

    Returns
    -------
        Its result; of a case that goes to a file perhaps a function that computes the result, so
        that it can run while the next case is predicted. None if the program's own export wrote it.
    """
    data = case["data"]
    if isinstance(data, str):  # a large image, which a data iterator has put into a file
        path = Path(data)
        data = torch.from_numpy(np.load(path))
        path.unlink()
    case = case | {"data": data}
    changed_export = changed_functions(EXPORT_FUNCTIONS)
    if changed_export is not None:
        _tell(predictor, changed_export)
        return _by_changed_export(predictor, case, save_probabilities=save_probabilities)
    # As in nnU-Net: files get the labels of dataset.json.
    labels, to_file = predictor.label_manager, case["ofile"] is not None
    if to_file:
        labels = predictor.plans_manager.get_label_manager(predictor.dataset_json)
    properties = case["data_properties"]
    by_rule = not save_probabilities and has_ordinary_labels(labels) and fits_image(properties)
    heads = predictor.label_manager.num_segmentation_heads
    if by_rule and heads == labels.num_segmentation_heads and _is_ordinary(data):
        model = _own_loop(predictor, ("predict_logits_from_preprocessed_data",))
        if model is not None:
            case["data"] = data.detach().cpu()
            return _labels(predictor, case, replace(model, labels=labels))
    logits = predictor.predict_logits_from_preprocessed_data(data).detach().cpu()
    if by_rule:
        return segmentation_from_logits(
            logits,
            properties,
            predictor.configuration_manager,
            predictor.plans_manager,
            labels,
            method=companion(predictor).export,
        )
    export = partial(_by_nnunets_export, predictor, logits.numpy(), labels, properties)
    finish = partial(export, return_probabilities=save_probabilities)
    return finish if to_file else finish()


def _is_ordinary(data: torch.Tensor) -> bool:
    """Whether data are what nnU-Net's preprocessor returns: float32 (channels, z, y, x)."""
    return data.ndim == _DIMENSIONS and data.dtype == torch.float32


_DIMENSIONS = 4


def case_logits(predictor: Untyped, data: torch.Tensor) -> torch.Tensor:
    """Predict logits, float16, (classes, z, y, x), on the CPU; equal to nnU-Net's method."""
    model = _own_loop(predictor) if _is_ordinary(data) else None
    if model is None:
        logits: torch.Tensor = original(predictor, "predict_logits_from_preprocessed_data")(data)
        return logits
    return _tile_by_tile(
        predictor,
        tuple(data.shape[1:]),
        "image",
        lambda tiling, on_tile: predict_logits(model, data, tiling, on_tile=on_tile),
    )


def write_case(
    predictor: Untyped, result: Result | Callable[[], Result], case: dict[str, Any]
) -> bool:
    """Write a case's segmentation, and its probabilities if there are some.

    Returns
    -------
        False if the result could not be computed and ``on_failure`` was told.
    """
    computed: list[Result] = []
    with attempt(predictor, name_of(case["ofile"])):
        computed.append(result() if callable(result) else result)
    if not computed:
        return False
    (result,) = computed
    segmentation, probabilities = result if isinstance(result, tuple) else (result, None)
    try:
        write_segmentation(
            segmentation,
            Path(case["ofile"]),
            case["data_properties"],
            predictor.plans_manager,
            predictor.dataset_json,
            probabilities=probabilities,
        )
    except OutputError as error:
        on_failure = companion(predictor).on_failure
        if on_failure is not None:
            on_failure(name_of(case["ofile"]), error)
        raise
    return True


def tiling(predictor: Untyped) -> Tiling:
    """How tiles are placed, mirrored and weighted, from nnU-Net's attributes."""
    axes = predictor.allowed_mirroring_axes if predictor.use_mirroring else None
    return Tiling(
        step=predictor.tile_step_size,
        gaussian=predictor.use_gaussian,
        mirror_axes=tuple(axes or ()),
        on_device=predictor.perform_everything_on_device,
    )


def name_of(path: str | None) -> str:
    """Name of a file; empty for None."""
    return "" if path is None else Path(path).name


def _own_loop(predictor: Untyped, more_methods: tuple[str, ...] = ()) -> Model | None:
    """Return the model for totalfast's sliding window, or None if nnU-Net's must run."""
    remark = changed_methods(predictor, more_methods) or changed_loop(predictor)
    if remark is None:
        try:
            return companion(predictor).model(predictor)
        except (AttributeError, NotImplementedError, RuntimeError, TypeError) as error:
            # Such as networks that can't be copied: nnU-Net uses the one that there is.
            remark = f"totalfast can't run the network ({type(error).__name__}: {error})"
    _tell(predictor, remark)
    return None


def _tell(predictor: Untyped, remark: str) -> None:
    """Say once that a program's change is obeyed."""
    if companion(predictor).is_new(remark):
        logger.warning("nnU-Net's own code runs in part instead of totalfast's: %s.", remark)


def _labels(predictor: Untyped, case: dict[str, Any], model: Model) -> Labels:
    image = network_image(case, model)
    return _tile_by_tile(
        predictor,
        tuple(case["data"].shape[1:]),
        name_of(case["ofile"]) or "image",
        lambda tiling, on_tile: predict_network_image(
            image, model, tiling, on_tile=on_tile, method=companion(predictor).export
        ),
    )


def _tile_by_tile(
    predictor: Untyped,
    shape: tuple[int, ...],
    name: str,
    predict: Callable[[Tiling, Callable[[], Any]], Output],
) -> Output:
    """Predict with a progress bar; if the device's memory is too small, with less on it."""
    choice = tiling(predictor)
    count = plan_tiles(shape, predictor.configuration_manager.patch_size, choice.step).count

    def attempted(choice: Tiling) -> Output:
        with tqdm(total=count, desc=name, leave=False, disable=not predictor.allow_tqdm) as shown:
            return predict(choice, shown.update)

    return Ladder(choice, predictor.device).run(attempted)


def _by_nnunets_export(
    predictor: Untyped,
    logits: NDArray[np.floating],
    labels: Untyped,
    properties: dict[str, Any],
    *,
    return_probabilities: bool,
) -> Result:
    with inference_settings(predictor.device):
        result: Result = convert_logits(
            logits,
            predictor.plans_manager,
            predictor.configuration_manager,
            labels,
            properties,
            return_probabilities,
        )
    return result


def _by_changed_export(
    predictor: Untyped, case: dict[str, Any], *, save_probabilities: bool
) -> Result | None:
    """Export by the functions with which a program has replaced nnU-Net's."""
    logits = predictor.predict_logits_from_preprocessed_data(case["data"]).cpu().detach().numpy()
    if case["ofile"] is not None:
        nnunets_function("export_prediction_from_logits")(
            logits,
            case["data_properties"],
            predictor.configuration_manager,
            predictor.plans_manager,
            predictor.dataset_json,
            case["ofile"],
            save_probabilities,
        )
        return None
    result: Result = nnunets_function(
        "convert_predicted_logits_to_segmentation_with_correct_shape"
    )(
        logits,
        predictor.plans_manager,
        predictor.configuration_manager,
        predictor.label_manager,
        case["data_properties"],
        save_probabilities,
    )
    return result
