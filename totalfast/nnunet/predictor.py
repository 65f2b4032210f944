"""``ArgmaxPredictor``: nnU-Net's predictor with this package's sliding window and export.

Importing this module imports nnU-Net's inference package, which takes seconds. totalfast's own
pipeline does not import it.

The methods in ``METHODS`` also work as methods of nnU-Net's own class: they call no ``super()`` and
use only nnU-Net's attributes and the predictor's ``companion``.
"""

from __future__ import annotations

import copy
import inspect
import logging
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from batchgenerators.dataloading.multi_threaded_augmenter import MultiThreadedAugmenter
from batchgenerators.utilities.file_and_folder_operations import save_json
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.json_export import recursive_fix_for_json_export

from totalfast.backends import choose_backend, keeps_weights
from totalfast.engine.sliding_window import predict_labels
from totalfast.errors import MissingModelError, WeightsError
from totalfast.models.loading import load_model
from totalfast.models.nnunet_calls import call_quietly
from totalfast.models.nnunet_versions import check_version
from totalfast.models.weights import CHECKPOINT_NAME
from totalfast.nnunet.cases import ahead, case_from_array, check_channel_numbers, list_cases
from totalfast.nnunet.client_changes import ITERATING_FUNCTIONS, changed_functions
from totalfast.nnunet.client_model import Companion, companion, description
from totalfast.nnunet.originals import original
from totalfast.nnunet.prediction import (
    attempt,
    case_logits,
    predict_case,
    predict_cases,
    prepared,
    tiling,
    write_case,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from typing import TypeAlias

    import torch
    from numpy.typing import NDArray

    from totalfast.backends import Backend
    from totalfast.engine.tiles import Tiling
    from totalfast.models.model import Model
    from totalfast.nnunet.prediction import Result

    Untyped: TypeAlias = Any
    """nnU-Net's arguments, which have no types."""

logger = logging.getLogger(__name__)

Value = TypeVar("Value")

METHODS = (
    "initialize_from_trained_model_folder",
    "predict_logits_from_preprocessed_data",
    "get_data_iterator_from_raw_npy_data",
    "predict_from_data_iterator",
    "predict_single_npy_array",
    "predict_from_files_sequential",
    "_manage_input_and_output_lists",
    "_internal_get_data_iterator_from_lists_of_filenames",
)
"""Methods of nnU-Net's predictor that ``ArgmaxPredictor`` replaces."""


class _Readable(Generic[Value]):
    """A property that a subclass may replace by an attribute of its own."""

    def __init__(self, function: Callable[[Any], Value]) -> None:
        self._function = function
        self.__doc__ = function.__doc__

    def __get__(self, instance: object, owner: type) -> Value:
        return self._function(instance)


class ArgmaxPredictor(nnUNetPredictor):  # type: ignore[misc] # nnU-Net is untyped
    """nnU-Net's predictor with safe loading, in one process, without all logits in memory.

    Has nnU-Net's constructor, attributes, methods and results. Threads prepare and write the cases;
    numbers of processes are accepted and ignored. What a program changes on the predictor or in a
    subclass changes the results as it changes nnU-Net's. Where totalfast can't follow, nnU-Net's
    own code runs, and one warning gives the reason.

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
        ``totalfast.models.loading.load_model``. A model that totalfast can't load is then loaded
        by nnU-Net, which runs code that its files may contain.
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
        check_version()
        call_quietly(super().__init__, *arguments, **keywords)
        self._totalfast = Companion(
            backend=choose_backend(backend, self.device),
            export=export,
            trust_model=trust_model,
            on_failure=on_failure,
        )

    @_Readable
    def model(self) -> Model:
        """The model that nnU-Net's attributes describe, with one network per fold."""
        return companion(self).model(self)

    @_Readable
    def backend(self) -> Backend:
        """The backend that runs the networks."""
        return companion(self).backend

    @_Readable
    def tiling(self) -> Tiling:
        """How tiles are placed, mirrored and weighted, from nnU-Net's attributes."""
        return tiling(self)

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
        MissingModelError
            If a file is missing; this is a FileNotFoundError too.
        WeightsError
            If a file is damaged, a checkpoint holds objects other than weights, or the plans name
            unknown parts, and the model is not trusted.
        """
        own = companion(self)
        folder = Path(model_training_output_dir)
        try:
            model = load_model(
                folder,
                folds=[use_folds] if isinstance(use_folds, str) else use_folds,
                device=self.device,
                checkpoint_name=checkpoint_name,
                backend=own.backend,
                trust_model=own.trust_model,
            )
        except MissingModelError:
            raise
        except WeightsError as error:
            if not own.trust_model:
                raise
            if own.is_new(str(folder)):
                logger.warning(
                    "WARNING: nnU-Net loads %s, because totalfast can't: %s", folder, error
                )
            load = original(self, "initialize_from_trained_model_folder")
            load(model_training_output_dir, use_folds, checkpoint_name)
            return
        self.plans_manager = model.plans
        self.configuration_manager = model.configuration
        self.dataset_json = model.dataset
        self.label_manager = model.labels
        self.trainer_name = model.trainer_name
        self.allowed_mirroring_axes = model.mirroring_axes
        # As in nnU-Net, the network and each fold's parameters have memory of their own, because
        # programs load the parameters into the network, and the network has the first fold's.
        *others, self.network = model.networks
        can_share = keeps_weights(own.backend) and self.device.type == "cpu"
        shared = [network.state_dict() for network in others] if can_share else []
        self.list_of_parameters = shared + [
            {name: tensor.to("cpu", copy=True) for name, tensor in network.state_dict().items()}
            for network in model.networks[len(shared) :]
        ]
        first = self.list_of_parameters[0]
        if keeps_weights(own.backend):
            self.network.load_state_dict(first)
        else:  # its weights are mapped from the file
            own_memory = {name: tensor.clone() for name, tensor in first.items()}
            self.network.load_state_dict(own_memory, assign=True)
        own.keep(model, self)

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

    def predict_logits_from_preprocessed_data(self, data: torch.Tensor) -> torch.Tensor:
        """Predict logits, float16, (classes, z, y, x), from an image (channels, z, y, x)."""
        return case_logits(self, data)

    def get_data_iterator_from_raw_npy_data(
        self,
        image_or_list_of_images: NDArray[Any] | list[NDArray[Any]],
        segs_from_prev_stage_or_list_of_segs_from_prev_stage: NDArray[Any]
        | list[NDArray[Any]]
        | None,
        properties_or_list_of_properties: dict[str, Any] | list[dict[str, Any]],
        truncated_ofname: str | list[str] | None,
        num_processes: int = 3,
    ) -> Iterable[dict[str, Any]]:
        """Yield cases for ``predict_from_data_iterator``; a thread prepares the next case."""
        if changed_functions(ITERATING_FUNCTIONS):
            return original(self, "get_data_iterator_from_raw_npy_data")(  # type: ignore[no-any-return]
                image_or_list_of_images,
                segs_from_prev_stage_or_list_of_segs_from_prev_stage,
                properties_or_list_of_properties,
                truncated_ofname,
                num_processes,
            )
        images = _as_list(image_or_list_of_images)
        previous = _as_list(segs_from_prev_stage_or_list_of_segs_from_prev_stage, len(images))
        properties = _as_list(properties_or_list_of_properties)
        outputs = _as_list(truncated_ofname, len(images))
        cases = zip(images, previous, properties, outputs, strict=True)
        return ahead(case_from_array(*case, description(self)) for case in cases)

    def _manage_input_and_output_lists(
        self,
        list_of_lists_or_source_folder: str | list[list[str]],
        *arguments: Untyped,
        **keywords: Untyped,
    ) -> Untyped:
        """nnU-Net's method, but it checks names, and forks no processes to list a folder."""
        source, ending = list_of_lists_or_source_folder, self.dataset_json["file_ending"]
        cases = list_cases(source, ending) if isinstance(source, str) else source
        manage = original(self, "_manage_input_and_output_lists")
        lists = call_quietly(manage, cases, *arguments, **keywords)
        numbered = [True] * len(lists[0])
        for place, files in enumerate(lists[0] if isinstance(source, str) else []):
            numbered[place] = False
            with attempt(self, Path(files[0]).name):
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
        if changed_functions(ITERATING_FUNCTIONS):
            name = "_internal_get_data_iterator_from_lists_of_filenames"
            return original(self, name)(  # type: ignore[no-any-return]
                input_list_of_lists,
                seg_from_prev_stage_files,
                output_filenames_truncated,
                num_processes,
            )
        return _from_files(
            self, input_list_of_lists, seg_from_prev_stage_files, output_filenames_truncated
        )

    def predict_from_data_iterator(
        self,
        data_iterator: Iterable[dict[str, Any]],
        save_probabilities: bool = False,  # noqa: FBT001, FBT002 - nnU-Net's signature
        num_processes_segmentation_export: int = 0,
        use_cropped_logits_resampling: bool = False,  # noqa: FBT001, FBT002 - TotalSegmentator's
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
        use_cropped_logits_resampling
            TotalSegmentator's parameter: run its own method, which approximates the labels.

        Returns
        -------
            Per case: None if it was written, else its segmentation (z, y, x), or with
            ``save_probabilities`` the pair of segmentation and probabilities.
        """
        if use_cropped_logits_resampling:
            return original(self, "predict_from_data_iterator")(  # type: ignore[no-any-return]
                data_iterator,
                save_probabilities,
                num_processes_segmentation_export or 1,
                True,  # noqa: FBT003
            )
        results = predict_cases(self, data_iterator, save_probabilities)
        if isinstance(data_iterator, MultiThreadedAugmenter):
            data_iterator._finish()  # ends its processes, as nnU-Net does
        return results

    def predict_single_npy_array(
        self,
        input_image: NDArray[Any],
        image_properties: dict[str, Any],
        segmentation_previous_stage: NDArray[Any] | None = None,
        output_file_truncated: str | None = None,
        save_or_return_probabilities: bool = False,  # noqa: FBT001, FBT002 - nnU-Net's signature
        use_cropped_logits_resampling: bool = False,  # noqa: FBT001, FBT002 - TotalSegmentator's
    ) -> Result | None:
        """Predict one image, (channels, z, y, x); see nnU-Net for the parameters.

        ``image_properties`` also gets nnU-Net's properties of the crop.

        Returns
        -------
            The result of ``predict_from_data_iterator`` for this case.
        """
        image = (
            input_image,
            image_properties,
            segmentation_previous_stage,
            output_file_truncated,
            save_or_return_probabilities,
        )
        if use_cropped_logits_resampling:
            return original(self, "predict_single_npy_array")(*image, True)  # type: ignore[no-any-return] # noqa: FBT003
        if changed_functions(ITERATING_FUNCTIONS):
            return original(self, "predict_single_npy_array")(*image)  # type: ignore[no-any-return]
        case = case_from_array(
            input_image,
            segmentation_previous_stage,
            image_properties,
            output_file_truncated,
            description(self),
        )
        image_properties.update(case["data_properties"])
        result: Any = predict_case(self, case, save_or_return_probabilities)
        if result is None or output_file_truncated is None:
            return result  # type: ignore[no-any-return]
        write_case(self, result, case)
        return None

    def predict_from_files_sequential(
        self,
        list_of_lists_or_source_folder: str | list[list[str]],
        output_folder_or_list_of_truncated_output_files: str | list[str] | None,
        save_probabilities: bool = False,  # noqa: FBT001, FBT002 - nnU-Net's signature
        overwrite: bool = True,  # noqa: FBT001, FBT002 - nnU-Net's signature
        folder_with_segs_from_prev_stage: str | None = None,
        use_cropped_logits_resampling: bool = False,  # noqa: FBT001, FBT002 - TotalSegmentator's
    ) -> list[Result] | None:
        """Like ``predict_from_files``, but return only results that were not written."""
        if use_cropped_logits_resampling:
            return original(self, "predict_from_files_sequential")(  # type: ignore[no-any-return]
                list_of_lists_or_source_folder,
                output_folder_or_list_of_truncated_output_files,
                save_probabilities,
                overwrite,
                folder_with_segs_from_prev_stage,
                True,  # noqa: FBT003
            )
        arguments = {
            "list_of_lists_or_source_folder": list_of_lists_or_source_folder,
            "output_folder_or_list_of_truncated_output_files": (
                output_folder_or_list_of_truncated_output_files
            ),
            "save_probabilities": save_probabilities,
            "overwrite": overwrite,
            "folder_with_segs_from_prev_stage": folder_with_segs_from_prev_stage,
        }
        _write_descriptions(self, output_folder_or_list_of_truncated_output_files, arguments)
        previous = self.configuration_manager.previous_stage_name
        if previous is not None and folder_with_segs_from_prev_stage is None:
            raise AssertionError(  # nnU-Net's error
                f"the model is a cascade's second stage: folder_with_segs_from_prev_stage must be "
                f"the folder of the segmentations of {previous}"
            )
        files, outputs, previous_files = self._manage_input_and_output_lists(
            list_of_lists_or_source_folder,
            output_folder_or_list_of_truncated_output_files,
            folder_with_segs_from_prev_stage,
            overwrite,
            0,
            1,
            save_probabilities,
        )
        if not files:
            return None
        cases = _from_files(self, files, previous_files, outputs)
        results = predict_cases(self, cases, save_probabilities)
        return [result for result in results if result is not None]


def _write_descriptions(
    predictor: Untyped, output: str | list[str] | None, arguments: dict[str, Any]
) -> None:
    """Write the JSON files that nnU-Net puts beside the segmentations."""
    if output is None:
        return
    folder = Path(output if isinstance(output, str) else output[0])
    folder = folder if isinstance(output, str) else folder.parent
    folder.mkdir(parents=True, exist_ok=True)
    arguments = copy.deepcopy(arguments)
    recursive_fix_for_json_export(arguments)
    save_json(arguments, str(folder / "predict_from_raw_data_args.json"))
    save_json(predictor.dataset_json, str(folder / "dataset.json"), sort_keys=False)
    save_json(predictor.plans_manager.plans, str(folder / "plans.json"), sort_keys=False)


def _from_files(
    predictor: Untyped,
    files: list[list[str]],
    previous: list[str | None] | None,
    outputs: list[str] | None,
) -> Iterator[dict[str, Any]]:
    """Read and prepare cases; a thread prepares the next one."""
    count = len(files)
    cases = zip(files, _as_list(previous, count), _as_list(outputs, count), strict=True)
    return ahead(prepared(predictor, cases))


def _signature() -> inspect.Signature:
    """nnU-Net's parameters and those of totalfast; programs look for names of parameters."""
    theirs = inspect.signature(nnUNetPredictor.__init__).parameters.values()
    own = inspect.signature(ArgmaxPredictor.__init__).parameters.values()
    more = (parameter for parameter in own if parameter.kind is parameter.KEYWORD_ONLY)
    return inspect.Signature([*theirs, *more])


ArgmaxPredictor.__init__.__signature__ = _signature()  # type: ignore[attr-defined]


def _as_list(one_or_more: Untyped, count: int = 1) -> list[Any]:
    """Return a list unchanged, a single value as a list, and None as a list of ``count`` Nones."""
    if one_or_more is None:
        return [None] * count
    return one_or_more if isinstance(one_or_more, list) else [one_or_more]
