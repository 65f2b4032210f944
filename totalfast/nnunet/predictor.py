"""``ArgmaxPredictor``: nnU-Net's predictor with this package's sliding window and export.

Importing this module imports nnU-Net's inference package, which takes seconds. totalfast's own
pipeline does not import it.
"""

from __future__ import annotations

import copy
import logging
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from tqdm import tqdm

from totalfast.backends import choose_backend
from totalfast.engine.predict import predict_network_image
from totalfast.engine.sliding_window import inference_settings, predict_labels, predict_logits
from totalfast.engine.tiles import Tiling, plan_tiles
from totalfast.errors import OutputError
from totalfast.models.loading import load_model, tile_shape
from totalfast.models.model import Model
from totalfast.models.nnunet_calls import call_quietly
from totalfast.models.weights import CHECKPOINT_NAME
from totalfast.nnunet.cases import (
    ahead,
    case_from_array,
    case_from_files,
    check_channel_numbers,
    list_cases,
    network_image,
)
from totalfast.nnunet.export import write_segmentation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from typing import TypeAlias

    import numpy as np
    from numpy.typing import NDArray

    Untyped: TypeAlias = Any
    """nnU-Net's arguments and tqdm's bars, which have no types."""

    Labels: TypeAlias = NDArray[np.unsignedinteger]
    Result: TypeAlias = Labels | tuple[Labels, NDArray[np.floating]]
    """A segmentation (z, y, x), or a segmentation and its probabilities (classes, z, y, x)."""

logger = logging.getLogger(__name__)


class ArgmaxPredictor(nnUNetPredictor):  # type: ignore[misc] # nnU-Net is untyped
    """nnU-Net's predictor with safe loading, in one process, without all logits in memory.

    Has nnU-Net's constructor, methods and results. Threads prepare and write the cases; numbers of
    processes are accepted and ignored.

    Parameters
    ----------
    export
        How labels are resampled to the image: "auto" gives nnU-Net's labels for all plans;
        "nearest" and "linear" work as in ``totalfast.export.export_labels``.
    backend
        The backend that runs the networks, one of ``totalfast.backends.BACKENDS``; "torch"
        gives nnU-Net's labels.
    trust_model
        Whether plans.json may name any class and function; see
        ``totalfast.models.loading.load_model``.
    on_failure
        Called with a case's name and the error if the case can't be read or predicted; the other
        cases follow, and the results are without this one. After an ``OutputError``, which would
        hit the other cases too, the function is called and the error is raised.
        None: the first error is raised, as nnU-Net does.
    """

    def __init__(
        self,
        *arguments: Untyped,
        export: str = "auto",
        backend: str = "torch",
        trust_model: bool = False,
        on_failure: Callable[[str, Exception], None] | None = None,
        **keywords: Untyped,
    ) -> None:
        call_quietly(super().__init__, *arguments, **keywords)
        self.export = export
        self.trust_model = trust_model
        self.on_failure = on_failure
        self.backend = choose_backend(backend, self.device)
        self._model: Model | None = None

    def initialize_from_trained_model_folder(
        self,
        model_training_output_dir: str,
        use_folds: Sequence[int | str] | str | None,
        checkpoint_name: str = CHECKPOINT_NAME,
    ) -> None:
        """Load a model folder with ``weights_only=True``.

        Parameters
        ----------
        model_training_output_dir
            A folder with plans.json, dataset.json and the folds.
        use_folds
            Folds to load; None loads all folds in the folder except "all".
        checkpoint_name
            File in each fold's folder.

        Raises
        ------
        WeightsError
            If a file is missing or damaged, a checkpoint holds objects other than weights, or the
            plans name unknown parts and are not trusted.
        """
        folds = [use_folds] if isinstance(use_folds, str) else use_folds
        model = load_model(
            Path(model_training_output_dir),
            folds=folds,
            device=self.device,
            checkpoint_name=checkpoint_name,
            backend=self.backend,
            trust_model=self.trust_model,
        )
        self._model = model
        self.plans_manager = model.plans
        self.configuration_manager = model.configuration
        self.dataset_json = model.dataset
        self.label_manager = model.labels
        self.trainer_name = model.trainer_name
        self.allowed_mirroring_axes = model.mirroring_axes
        self.network = model.networks[0]
        self.list_of_parameters = [network.state_dict() for network in model.networks]

    def manual_initialization(self, *arguments: Untyped, **keywords: Untyped) -> None:
        """Use an existing network, like nnU-Net's trainer; see nnU-Net for the parameters."""
        call_quietly(super().manual_initialization, *arguments, **keywords)
        self._model = None

    @property
    def model(self) -> Model:
        """The model that nnU-Net's attributes describe, with one network per fold."""
        if self._model is None:
            networks = []
            for parameters in self.list_of_parameters or [self.network.state_dict()]:
                network = copy.deepcopy(self.network)
                network.load_state_dict(parameters)
                networks.append(network.to(self.device).eval())
            shape = tile_shape(self.plans_manager, self.configuration_manager, self.dataset_json)
            self._model = Model(
                folder=Path(self.plans_manager.dataset_name),
                plans=self.plans_manager,
                configuration=self.configuration_manager,
                labels=self.label_manager,
                dataset=self.dataset_json,
                networks=tuple(networks),
                forwards=tuple(self.backend(network, shape) for network in networks),
                trainer_name=self.trainer_name,
                mirroring_axes=self.allowed_mirroring_axes,
                device=self.device,
            )
        return self._model

    @property
    def tiling(self) -> Tiling:
        """How tiles are placed, mirrored and weighted, from nnU-Net's attributes."""
        axes = self.allowed_mirroring_axes if self.use_mirroring else None
        return Tiling(
            step=self.tile_step_size,
            gaussian=self.use_gaussian,
            mirror_axes=tuple(axes or ()),
            on_device=self.perform_everything_on_device,
        )

    def predict_labels_from_preprocessed_data(self, data: torch.Tensor) -> torch.Tensor:
        """Predict labels at network resolution, without all logits in memory.

        Equals the argmax (for regions: the thresholded sigmoid) of
        ``predict_logits_from_preprocessed_data``, in a fraction of its memory.

        Parameters
        ----------
        data
            float32, (channels, z, y, x), preprocessed.

        Returns
        -------
            uint8 (uint16 for 255 or more labels), (z, y, x), on the CPU.
        """
        return predict_labels(self.model, data, self.tiling)

    def get_data_iterator_from_raw_npy_data(
        self,
        image_or_list_of_images: NDArray[Any] | list[NDArray[Any]],
        segs_from_prev_stage_or_list_of_segs_from_prev_stage: NDArray[Any]
        | list[NDArray[Any]]
        | None,
        properties_or_list_of_properties: dict[str, Any] | list[dict[str, Any]],
        truncated_ofname: str | list[str] | None,
        num_processes: int = 0,
    ) -> Iterator[dict[str, Any]]:
        """Yield cases for ``predict_from_data_iterator``; a thread prepares the next case."""
        images = _as_list(image_or_list_of_images)
        previous = _as_list(segs_from_prev_stage_or_list_of_segs_from_prev_stage, len(images))
        properties = _as_list(properties_or_list_of_properties)
        outputs = _as_list(truncated_ofname, len(images))
        cases = zip(images, previous, properties, outputs, strict=True)
        return ahead(case_from_array(*case, self.model) for case in cases)

    def _manage_input_and_output_lists(
        self,
        list_of_lists_or_source_folder: str | list[list[str]],
        *arguments: Untyped,
        **keywords: Untyped,
    ) -> Untyped:
        """nnU-Net's method, but it checks names, and forks no processes to list a folder."""
        source, ending = list_of_lists_or_source_folder, self.dataset_json["file_ending"]
        cases = list_cases(source, ending) if isinstance(source, str) else source
        manage = super()._manage_input_and_output_lists
        lists = call_quietly(manage, cases, *arguments, **keywords)
        numbered = [True] * len(lists[0])
        for place, files in enumerate(lists[0] if isinstance(source, str) else []):
            numbered[place] = False
            with self._attempt(Path(files[0]).name):
                check_channel_numbers(files, ending)
                numbered[place] = True
        return tuple(values and list(compress(values, numbered)) for values in lists)

    def _internal_get_data_iterator_from_lists_of_filenames(
        self,
        input_list_of_lists: list[list[str]],
        seg_from_prev_stage_files: list[str | None] | None,
        output_filenames_truncated: list[str] | None,
        num_processes: int,
    ) -> Iterator[dict[str, Any]]:
        count = len(input_list_of_lists)
        cases = zip(
            input_list_of_lists,
            _as_list(seg_from_prev_stage_files, count),
            _as_list(output_filenames_truncated, count),
            strict=True,
        )
        return ahead(self._prepared(cases))

    def _prepared(
        self, cases: Iterable[tuple[list[str], str | None, str | None]]
    ) -> Iterator[dict[str, Any]]:
        for files, previous, output in cases:
            case = None
            with self._attempt(_name(output) or _name(files[0])):
                case = case_from_files(files, previous, output, self.model)
            if case is not None:
                yield case

    @contextmanager
    def _attempt(self, case: str) -> Iterator[None]:
        """Hand an error of one case to ``on_failure``, if there is such a function."""
        try:
            yield
        except OutputError:
            raise
        except Exception as error:
            if self.on_failure is None:
                raise
            self.on_failure(case, error)

    def predict_from_data_iterator(
        self,
        data_iterator: Iterable[dict[str, Any]],
        save_probabilities: bool = False,  # noqa: FBT001, FBT002 - nnU-Net's signature
        num_processes_segmentation_export: int = 0,
    ) -> list[Result | None]:
        """Predict prepared cases; a thread writes each case while the next one is predicted.

        Parameters
        ----------
        data_iterator
            Dicts of ``data``, ``data_properties`` and ``ofile``; see nnU-Net.
        save_probabilities
            Also compute probabilities, with nnU-Net's own export.
        num_processes_segmentation_export
            Ignored.

        Returns
        -------
            Per case: None if it was written, else its segmentation (z, y, x), or with
            ``save_probabilities`` the pair of segmentation and probabilities.
        """
        results: list[Result | None] = []
        with ThreadPoolExecutor(1, thread_name_prefix="totalfast-write") as writer:
            writing = []
            for case in data_iterator:
                result = None
                with self._attempt(_name(case["ofile"])):
                    result = self._predict_case(case, save_probabilities=save_probabilities)
                if result is None:
                    continue
                if case["ofile"] is None:
                    results.append(result)
                    continue
                results.append(None)
                writing.append(writer.submit(self._write, result, case))
                for earlier in writing[:-1]:  # at most one waits; errors are raised early
                    earlier.result()
            for last in writing:
                last.result()
        return results

    def predict_single_npy_array(
        self,
        input_image: NDArray[Any],
        image_properties: dict[str, Any],
        segmentation_previous_stage: NDArray[Any] | None = None,
        output_file_truncated: str | None = None,
        save_or_return_probabilities: bool = False,  # noqa: FBT001, FBT002 - nnU-Net's signature
    ) -> Result | None:
        """Predict one image, (channels, z, y, x); see nnU-Net for the parameters.

        Returns
        -------
            The result of ``predict_from_data_iterator`` for this case.
        """
        case = case_from_array(
            input_image,
            segmentation_previous_stage,
            image_properties,
            output_file_truncated,
            self.model,
        )
        (result,) = self.predict_from_data_iterator([case], save_or_return_probabilities)
        return result

    def predict_from_files_sequential(
        self, *arguments: Untyped, **keywords: Untyped
    ) -> list[Result] | None:
        """Like ``predict_from_files``, but return only results that were not written."""
        results = self.predict_from_files(*arguments, **keywords)
        return None if results is None else [result for result in results if result is not None]

    def _predict_case(self, case: dict[str, Any], *, save_probabilities: bool) -> Result:
        predict = self._with_probabilities if save_probabilities else self._labels
        try:
            with self._bar(case) as bar:
                return predict(case, self.tiling, bar.update)
        except torch.OutOfMemoryError:
            if self.device.type == "cpu" or not self.tiling.on_device:
                raise
        # Outside of the except clause, which keeps the failed call's tensors alive.
        logger.warning("WARNING: the GPU's memory is too small; the logits are summed on the CPU.")
        with self._bar(case) as bar:
            return predict(case, replace(self.tiling, on_device=False), bar.update)

    def _labels(self, case: dict[str, Any], tiling: Tiling, on_tile: Callable[[], Any]) -> Labels:
        return predict_network_image(
            network_image(case, self.model),
            self.model,
            tiling,
            on_tile=on_tile,
            method=self.export,
        )

    def _with_probabilities(
        self, case: dict[str, Any], tiling: Tiling, on_tile: Callable[[], Any]
    ) -> tuple[NDArray[np.unsignedinteger], NDArray[np.floating]]:
        from nnunetv2.inference.export_prediction import (
            convert_predicted_logits_to_segmentation_with_correct_shape,
        )

        logits = predict_logits(self.model, case["data"], tiling, on_tile=on_tile)
        with inference_settings(self.device):
            segmentation, probabilities = (
                convert_predicted_logits_to_segmentation_with_correct_shape(
                    logits.numpy(),
                    self.plans_manager,
                    self.configuration_manager,
                    self.label_manager,
                    case["data_properties"],
                    return_probabilities=True,
                )
            )
        return segmentation, probabilities

    def _bar(self, case: dict[str, Any]) -> Untyped:
        shape = tuple(case["data"].shape[1:])
        tiles = plan_tiles(shape, self.model.patch_size, self.tile_step_size)
        name = _name(case["ofile"]) or "image"
        return tqdm(total=tiles.count, desc=name, leave=False, disable=not self.allow_tqdm)

    def _write(self, result: Result, case: dict[str, Any]) -> None:
        segmentation, probabilities = result if isinstance(result, tuple) else (result, None)
        try:
            write_segmentation(
                segmentation,
                Path(case["ofile"]),
                case["data_properties"],
                self.plans_manager,
                self.dataset_json,
                probabilities=probabilities,
            )
        except OutputError as error:
            if self.on_failure is not None:
                self.on_failure(_name(case["ofile"]), error)
            raise


def _name(path: str | None) -> str:
    return "" if path is None else Path(path).name


def _as_list(one_or_more: Untyped, count: int = 1) -> list[Any]:
    """Return a list unchanged, a single value as a list, and None as a list of ``count`` Nones."""
    if one_or_more is None:
        return [None] * count
    return one_or_more if isinstance(one_or_more, list) else [one_or_more]
