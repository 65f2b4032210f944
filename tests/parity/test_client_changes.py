"""What programs do with nnU-Net's predictor has the same effect on ``ArgmaxPredictor``."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
import shutil
import warnings
from argparse import Namespace
from collections import defaultdict
from datetime import datetime, timezone
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from batchgenerators.dataloading.multi_threaded_augmenter import MultiThreadedAugmenter
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.inference import export_prediction, predict_from_raw_data
from nnunetv2.inference.data_iterators import PreprocessAdapterFromNpy
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.preprocessing.preprocessors import default_preprocessor
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.preprocessing.resampling import default_resampling
from nnunetv2.utilities.label_handling.label_handling import LabelManager

import totalfast.nnunet
from totalfast import ArgmaxPredictor, WeightsError
from totalfast.models.nnunet_versions import FINDERS
from totalfast.nnunet import prediction as prediction_module
from totalfast.nnunet.cases import case_from_array

from .nnunet_models import SyntheticModel

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a model with two folds and mirroring, an image, its properties, a folder."""
    synthetic, folder = SyntheticModel(folds=2, mirroring=(2,)), tmp_path_factory.mktemp("model")
    images = synthetic.write_images(folder / "images")
    path = synthetic.write(folder)
    reader = loaded(nnUNetPredictor, path).plans_manager.image_reader_writer_class()
    image, properties = reader.read_images((str(images / "case0_0000.nii.gz"),))
    return path, image[:, :18, :28, :24], properties, images


def loaded(kind, folder, folds=(0, 1), **settings):
    predictor = kind(device=CPU, allow_tqdm=False, **settings)
    predictor.initialize_from_trained_model_folder(str(folder), folds)
    return predictor


def labels(predictor, model):
    _, image, properties, _ = model
    return predictor.predict_single_npy_array(image, dict(properties), None, None, False)  # noqa: FBT003


def network_input(model):
    _, image, *_ = model
    return torch.from_numpy(image[:, :24, :30, :20].astype(np.float32) / 100)


def equal_for_both(change, model, *, folds=(0, 1)):
    """Apply a change to a predictor of each kind; both must give the same labels."""
    results = []
    for kind in (nnUNetPredictor, ArgmaxPredictor):
        predictor = loaded(kind, model[0], folds)
        unchanged = labels(predictor, model)
        changed = change(predictor)
        results.append((unchanged, labels(changed or predictor, model)))
    (theirs, theirs_changed), (ours, ours_changed) = results
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(ours_changed, theirs_changed)
    assert (theirs != theirs_changed).any(), "the change has no effect, so nothing was tested"


def test_logits_of_folds_do_not_change_later_labels(model):
    theirs, ours = (loaded(kind, model[0]) for kind in (nnUNetPredictor, ArgmaxPredictor))
    data = network_input(model)
    for _ in range(2):
        logits = [p.predict_logits_from_preprocessed_data(data) for p in (theirs, ours)]
        torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=0)
        np.testing.assert_array_equal(labels(ours, model), labels(theirs, model))


def test_parameters_can_be_loaded_into_the_network_one_after_another(model):
    theirs, ours = (loaded(kind, model[0]) for kind in (nnUNetPredictor, ArgmaxPredictor))
    expected, data = labels(ours, model), network_input(model)
    for index in (1, 0):
        logits = []
        for predictor in (theirs, ours):
            predictor.network.load_state_dict(predictor.list_of_parameters[index])
            logits.append(predictor.predict_sliding_window_return_logits(data))
        torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=0)
    np.testing.assert_array_equal(labels(ours, model), expected)


def test_the_network_has_the_weights_that_nnunet_leaves(model):
    data = network_input(model)
    for parameters in (slice(0, 1), slice(0, 2)):
        logits = []
        for kind in (nnUNetPredictor, ArgmaxPredictor):
            predictor = loaded(kind, model[0])
            assert not predictor.network.training or kind is nnUNetPredictor
            for name, tensor in predictor.network.state_dict().items():
                assert torch.equal(tensor, predictor.list_of_parameters[0][name])
            predictor.list_of_parameters = predictor.list_of_parameters[parameters]
            labels(predictor, model)
            assert not predictor.network.training
            logits.append(predictor.predict_sliding_window_return_logits(data))
        torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=0)


def fewer_folds(predictor):
    predictor.list_of_parameters = predictor.list_of_parameters[1:2]


def other_weights(predictor):
    with torch.no_grad():
        for tensor in predictor.list_of_parameters[0].values():
            tensor.mul_(-1)


def other_network(predictor):
    other = copy.deepcopy(predictor.network)
    for part in other.modules():
        if isinstance(part, torch.nn.LeakyReLU):
            part.negative_slope = 0.9
    predictor.network = other


def other_layers(predictor):
    for part in predictor.network.modules():
        if isinstance(part, torch.nn.LeakyReLU):
            part.negative_slope = 0.9


def hooks(predictor):
    predictor.network.register_forward_hook(lambda module, inputs, output: output.flip(1))


def own_forward(predictor):
    forward = predictor.network.forward
    predictor.network.forward = lambda tile: forward(tile).flip(1)


def no_mirroring(predictor):
    predictor.use_mirroring = False


def other_mirroring(predictor):
    predictor.allowed_mirroring_axes = (1,)


def other_steps(predictor):
    predictor.tile_step_size = 0.25


def no_gaussian(predictor):
    predictor.use_gaussian = False


class Reversed(LabelManager):
    """Labels by the lowest logit."""

    def convert_logits_to_segmentation(self, predicted_logits):
        return super().convert_logits_to_segmentation(-predicted_logits)


def dilated(predictor):
    for part in predictor.network.modules():
        if (
            isinstance(part, torch.nn.Conv3d)
            and part.kernel_size == (3, 3, 3)
            and part.stride[0] == 1
        ):
            part.dilation = part.padding = (2, 2, 2)


class Flipped(torch.nn.Module):
    """Flips the output of another network."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, tile):
        return self.network(tile).flip(1)


class OwnLoading(Flipped):
    """Loads weights in a way of its own."""

    def load_state_dict(self, state, *arguments, **keywords):
        return self.network.load_state_dict(state)

    def state_dict(self, *arguments, **keywords):
        return self.network.state_dict()


class ChangesItsInput(OwnLoading):
    """Changes its input in place."""

    def forward(self, tile):
        return self.network(tile.mul_(-1))


def wrapped(predictor):
    predictor.network = OwnLoading(predictor.network)


def input_changed(predictor):
    predictor.network = ChangesItsInput(predictor.network)


def other_class(predictor):
    predictor.network.__class__ = type(
        "Other",
        (type(predictor.network),),
        {"forward": lambda self, x: super(type(self), self).forward(x).flip(1)},
    )


def weights_changed_in_secret(predictor):
    """As moving averages of weights do: torch does not count such changes."""
    predictor.list_of_parameters = [
        {name: tensor.double() for name, tensor in fold.items()}
        for fold in predictor.list_of_parameters
    ]
    labels_of_any_image(predictor)
    for fold in predictor.list_of_parameters:
        for tensor in fold.values():
            tensor.data.mul_(-1)


def autocast_for_bfloat16(predictor):
    predict = predictor.predict_single_npy_array

    def with_autocast(*arguments):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return predict(*arguments)

    predictor.predict_single_npy_array = with_autocast


def average_of_weights(predictor):
    """Names of tied layers get tensors of their own."""
    one, two = predictor.list_of_parameters
    predictor.list_of_parameters = [{k: (one[k] + two[k]) / 2 for k in one}, two]


class Shift:
    """An object of a layer that may be changed in place."""

    value = 0.0


def object_of_a_layer(predictor):
    block = predictor.network.encoder.stages[0]
    forward = type(block).forward

    def shifted(self, x):
        return forward(self, x + self.shift.value)

    block.shift = Shift()
    block.__class__ = type("Shifted", (type(block),), {"forward": shifted})
    labels_of_any_image(predictor)
    block.shift.value = 3.0


def eval_without_result(predictor):
    kind = type(predictor.network)
    predictor.network.__class__ = type("NoResult", (kind,), {"eval": lambda self: None})
    predictor.use_mirroring = False


def shared_memory(predictor):
    first = predictor.network.state_dict()
    second = {name: tensor * 0.5 for name, tensor in first.items()}
    predictor.list_of_parameters = [first, second]


def proxy(predictor):
    class Proxy:
        def __init__(self, function):
            self.function = function
            for name in ("__module__", "__qualname__", "__globals__"):
                setattr(self, name, getattr(function.__func__, name))

        def __call__(self, tile):
            return self.function(tile).flip(1)

    name = "_internal_maybe_mirror_and_predict"
    setattr(predictor, name, Proxy(getattr(predictor, name)))


def labels_of_any_image(predictor):
    image = np.random.default_rng(0).normal(size=(1, 18, 28, 24)).astype(np.float32)
    spacing = {"spacing": (2.7, 1.3, 1.1)}
    return predictor.predict_single_npy_array(image, spacing, None, None, False)  # noqa: FBT003


def other_label_manager(predictor):
    own = predictor.label_manager
    predictor.label_manager = Reversed(own.label_dict, own.regions_class_order)


def other_patch_size(predictor):
    predictor.configuration_manager.configuration["patch_size"] = [16, 16, 16]


CHANGES = (
    fewer_folds,
    other_weights,
    other_network,
    other_layers,
    hooks,
    own_forward,
    no_mirroring,
    other_mirroring,
    other_steps,
    no_gaussian,
    dilated,
    wrapped,
    input_changed,
    other_class,
    weights_changed_in_secret,
    autocast_for_bfloat16,
    average_of_weights,
    object_of_a_layer,
    eval_without_result,
    shared_memory,
    proxy,
    other_label_manager,
    other_patch_size,
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changed_attributes(change, model):
    equal_for_both(change, model)


OVERRIDES = {
    "_internal_maybe_mirror_and_predict": lambda result: result.flip(1),
    "predict_logits_from_preprocessed_data": lambda result: result.flip(0),
    "predict_sliding_window_return_logits": lambda result: result.flip(0),
    "_internal_predict_sliding_window_return_logits": lambda result: result.flip(0),
    "_internal_get_sliding_window_slicers": lambda result: result + result[:1],
}
"""Name of a method, and what a program makes of its result."""


@pytest.mark.parametrize("name", OVERRIDES)
@pytest.mark.parametrize("by", ["subclass", "instance"])
def test_overridden_methods(model, name, by, caplog):
    def change(predictor):
        method = getattr(type(predictor), name)

        @functools.wraps(method)  # which copies nnU-Net's name and module
        def changed(self, *arguments):
            return OVERRIDES[name](method(self, *arguments))

        if by == "subclass":
            return loaded(type("Own", (type(predictor),), {name: changed}), model[0])
        setattr(predictor, name, changed.__get__(predictor))
        return None

    equal_for_both(change, model)
    assert caplog.text.count("nnU-Net's own code runs") == 1


def test_methods_replaced_in_nnunets_class(model, monkeypatch):
    name = "_internal_maybe_mirror_and_predict"
    before, method = (
        labels(loaded(ArgmaxPredictor, model[0]), model),
        getattr(nnUNetPredictor, name),
    )
    monkeypatch.setattr(nnUNetPredictor, name, lambda *arguments: method(*arguments).flip(1))
    theirs, ours = (
        labels(loaded(kind, model[0]), model) for kind in (nnUNetPredictor, ArgmaxPredictor)
    )
    assert (before != theirs).any()
    np.testing.assert_array_equal(ours, theirs)


def test_replaced_functions(model, monkeypatch):
    def gaussian(tile_size, *_, device, **__):
        weights = torch.rand(tile_size, generator=torch.Generator().manual_seed(1)) + 0.1
        return weights.half().to(device)

    gaussian.cache_clear = lambda: None
    before = labels(loaded(ArgmaxPredictor, model[0]), model)
    monkeypatch.setattr(predict_from_raw_data, "compute_gaussian", gaussian)
    theirs, ours = (
        labels(loaded(kind, model[0]), model) for kind in (nnUNetPredictor, ArgmaxPredictor)
    )
    assert (before != theirs).any()
    np.testing.assert_array_equal(ours, theirs)


def test_replaced_export(model, monkeypatch, tmp_path):
    written = []
    monkeypatch.setattr(
        predict_from_raw_data,
        "export_prediction_from_logits",
        lambda *arguments: written.append(arguments[5]),
    )
    predictor = loaded(ArgmaxPredictor, model[0])
    assert predictor.predict_from_files(str(model[3]), str(tmp_path)) == [None, None]
    assert written == [str(tmp_path / "case0"), str(tmp_path / "case1")]


@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd", ".tif"])
def test_outputs_that_already_have_an_ending(ending, tmp_path):
    """ITK writes x.nii.gz.nii.gz as x.nii.gz, which HD-BET expects; TIFF has a second file."""
    reader = "Tiff3DIO" if ending == ".tif" else "SimpleITKIO"
    folder = SyntheticModel(ending=ending, reader=reader).write(tmp_path)
    (nifti, *_) = sorted(SyntheticModel().write_images(tmp_path / "nifti", cases=1).iterdir())
    image = tmp_path / f"case0_0000{ending}"
    sitk.WriteImage(sitk.ReadImage(nifti), image)
    (tmp_path / "case0.json").write_text('{"spacing": [2.7, 1.3, 1.1]}')  # for TIFF
    found = []
    for kind in (nnUNetPredictor, ArgmaxPredictor):
        output = tmp_path / kind.__name__
        output.mkdir()
        loaded(kind, folder, (0,)).predict_from_files_sequential(
            [[str(image)]], [str(output / f"x{ending}")]
        )
        found.append({path.name: path.read_bytes() for path in output.iterdir()})
    theirs, ours = found
    assert set(ours) == set(theirs)
    for name in set(ours) - {"predict_from_raw_data_args.json"}:
        assert ours[name] == theirs[name], name


def test_one_dict_of_properties_for_several_images(model, tmp_path):
    _, image, properties, _ = model
    images = [image, image[:, 3:, :, 4:], image[:, :, 5:]]
    shared = {"spacing": properties["spacing"]}
    ours = loaded(ArgmaxPredictor, model[0])
    for probabilities in (False, True):
        results = ours.predict_from_list_of_npy_arrays(
            images, None, [shared] * 3, None, save_probabilities=probabilities
        )
        for one, result in zip(images, results, strict=True):
            expected = loaded(nnUNetPredictor, model[0]).predict_single_npy_array(
                one, dict(shared), None, None, probabilities
            )
            np.testing.assert_equal(result, expected)


def test_data_in_a_file(model, tmp_path):
    ours = loaded(ArgmaxPredictor, model[0])
    (case,) = ours.get_data_iterator_from_raw_npy_data(model[1], None, dict(model[2]), None)
    path = tmp_path / "data.npy"
    np.save(path, case["data"].numpy())
    (result,) = ours.predict_from_data_iterator([case | {"data": str(path)}])
    np.testing.assert_array_equal(result, labels(ours, model))
    assert not path.exists()  # as with nnU-Net


@pytest.mark.parametrize("name", ["run_case", "run_case_npy", "_normalize"])
def test_changed_preparation(model, name, monkeypatch, tmp_path):
    before = DefaultPreprocessor.__dict__[name]

    def changed(self, image, *arguments):
        result = before(self, image, *arguments)
        return -result if name == "_normalize" else (-result[0], *result[1:])

    files = [[str(model[3] / "case0_0000.nii.gz")]]
    expected = loaded(ArgmaxPredictor, model[0]).predict_from_files_sequential(files, None)
    monkeypatch.setattr(DefaultPreprocessor, name, changed)
    theirs, ours = (
        loaded(kind, model[0]).predict_from_files_sequential(files, None)
        for kind in (nnUNetPredictor, ArgmaxPredictor)
    )
    assert (expected[0] != theirs[0]).any()
    np.testing.assert_array_equal(ours[0], theirs[0])


FUNCTIONS = {
    "default_preprocessor.crop_to_nonzero": (
        default_preprocessor,
        lambda before, data, *a, **k: before(
            np.where(np.arange(data.shape[1])[:, None, None] < 9, data, 0), *a, **k
        ),
    ),
    "default_resampling.resample_data_or_seg": (
        default_resampling,
        lambda before, data, *a, **k: before(data[:, ::-1], *a, **k),
    ),
    "export_prediction.insert_crop_into_image": (
        export_prediction,
        lambda before, image, crop, box: before(image, crop[::-1], box),
    ),
    "export_prediction.convert_predicted_logits_to_segmentation_with_correct_shape": (
        export_prediction,
        lambda before, *a, **k: before(*a, **k)[::-1],
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_that_preparation_and_export_call(model, name, monkeypatch, tmp_path):
    module, change = FUNCTIONS[name]
    before = getattr(module, name.partition(".")[2])
    image = str(model[3] / "case0_0000.nii.gz")

    def written(kind, folder):
        folder.mkdir()
        loaded(kind, model[0]).predict_from_files_sequential([[image]], [str(folder / "x")])
        return np.asarray(nib.load(folder / "x.nii.gz").dataobj)

    expected = written(ArgmaxPredictor, tmp_path / "before")
    changed = functools.wraps(before)(lambda *a, **k: change(before, *a, **k))
    monkeypatch.setattr(module, before.__name__, changed)
    theirs = written(nnUNetPredictor, tmp_path / "theirs")
    ours = written(ArgmaxPredictor, tmp_path / "ours")
    assert (expected != theirs).any()
    np.testing.assert_array_equal(ours, theirs)


def test_an_iterator_that_uses_its_objects_again(model, tmp_path):
    ours = loaded(ArgmaxPredictor, model[0])
    images = [model[1], model[1][:, ::-1].copy(), model[1][:, 3:]]
    cases = [
        case
        for image in images
        for case in ours.get_data_iterator_from_raw_npy_data(image, None, dict(model[2]), None)
    ]
    expected = [
        result for case in cases for result in ours.predict_from_data_iterator([dict(case)])
    ]

    def iterator():
        item, properties = {}, {}
        for number, case in enumerate(cases):
            properties.update(case["data_properties"])
            item.update(case, data_properties=properties, ofile=str(tmp_path / f"c{number}"))
            yield item
            properties.clear()
            item["ofile"] = str(tmp_path / "other")

    assert ours.predict_from_data_iterator(iterator()) == [None] * 3
    written = [np.asarray(nib.load(tmp_path / f"c{n}.nii.gz").dataobj).T for n in range(3)]
    for one, two in zip(written, expected, strict=True):
        np.testing.assert_array_equal(one, two)
    assert not (tmp_path / "other.nii.gz").exists()


def test_methods_that_call_each_other(model):
    """The usual way to avoid nnU-Net's processes."""

    class Sequential(ArgmaxPredictor):
        def predict_from_files(self, *arguments, **keywords):
            return self.predict_from_files_sequential(*arguments, **keywords)

        def predict_from_data_iterator(self, *arguments):
            return pytest.fail("nnU-Net's sequential method does not call it")

    files = [[str(model[3] / "case0_0000.nii.gz")]]
    (theirs,) = loaded(nnUNetPredictor, model[0]).predict_from_files_sequential(files, None)
    (ours,) = loaded(Sequential, model[0]).predict_from_files(files, None)
    np.testing.assert_array_equal(ours, theirs)


def test_readers_and_writers_of_a_program(model, monkeypatch, tmp_path):
    read, paths = SimpleITKIO.read_images, []

    def reader(self, *arguments):
        global READS  # noqa: PLW0603 - what is tested
        READS += 1
        with warnings.catch_warnings():
            return read(self, *arguments)

    monkeypatch.setattr(SimpleITKIO, "read_images", reader)
    monkeypatch.setattr(SimpleITKIO, "write_seg", lambda self, seg, path, _: paths.append(path))
    before = READS
    predictor = loaded(ArgmaxPredictor, model[0])
    predictor.predict_from_files([[str(model[3] / "case0_0000.nii.gz")]], [str(tmp_path / "x")])
    assert (READS, paths) == (before + 1, [str(tmp_path / "x.nii.gz")])


READS = 0


def test_data_that_are_no_plain_float32_and_boxes_outside_of_the_image(model):
    results = []
    for kind in (nnUNetPredictor, ArgmaxPredictor):
        predictor = loaded(kind, model[0], (0,))
        case = case_from_array(
            model[1], None, model[2], None, loaded(ArgmaxPredictor, model[0], (0,)).model
        )
        own = [case["data"].requires_grad_(), case["data"].detach().double()]
        predictor.network.double()
        results.append(_single(predictor, own[1], case["data_properties"]))
        predictor.network.float()
        results.append(_single(predictor, own[0], case["data_properties"]))
        start, stop = case["data_properties"]["bbox_used_for_cropping"][0]
        case["data_properties"]["bbox_used_for_cropping"][0] = [start - 2, stop - 2]
        results.append(_single(predictor, own[0].detach(), case["data_properties"]))
    for one, two in zip(results[:3], results[3:], strict=True):
        np.testing.assert_array_equal(one, two)


def _single(predictor, data, properties):
    """Labels of prepared data, without nnU-Net's processes."""
    if isinstance(predictor, ArgmaxPredictor):
        (result,) = predictor.predict_from_data_iterator(
            [{"data": data, "data_properties": properties, "ofile": None}]
        )
        return result
    return export_prediction.convert_predicted_logits_to_segmentation_with_correct_shape(
        predictor.predict_logits_from_preprocessed_data(data).detach().numpy(),
        predictor.plans_manager,
        predictor.configuration_manager,
        predictor.label_manager,
        properties,
    )


def test_shallow_copies_do_not_share_a_model(model):
    one = loaded(ArgmaxPredictor, model[0])
    two = copy.copy(one)
    two.network = copy.deepcopy(one.network)
    two.list_of_parameters = one.list_of_parameters[:1]
    expected = labels(one, model), labels(two, model)
    assert (expected[0] != expected[1]).any()
    assert one.model is not two.model
    np.testing.assert_array_equal(labels(one, model), expected[0])


def test_a_region_that_a_program_switches_off(tmp_path):
    synthetic = SyntheticModel(regions=True)
    folder, images = synthetic.write(tmp_path), synthetic.write_images(tmp_path / "in", cases=1)
    reader = SimpleITKIO()
    image, properties = reader.read_images((str(images / "case0_0000.nii.gz"),))
    results = []
    for kind in (nnUNetPredictor, ArgmaxPredictor):
        predictor = loaded(kind, folder, (0,))
        predictor.label_manager.regions_class_order = [1, 2]
        results.append(predictor.predict_single_npy_array(image, dict(properties)))
    np.testing.assert_array_equal(results[1], results[0])


def test_no_parameters_at_all(model):
    for kind in (nnUNetPredictor, ArgmaxPredictor):
        predictor = loaded(kind, model[0])
        predictor.list_of_parameters = []
        with pytest.raises(AttributeError):
            labels(predictor, model)


def test_weights_of_own_tensors_stay_in_totalfasts_loop(model, caplog):
    predictor = loaded(ArgmaxPredictor, model[0])
    average_of_weights(predictor)
    labels(predictor, model)
    assert "nnU-Net's own code" not in caplog.text


def test_threads_that_a_program_allows(model, monkeypatch):
    predictor, seen = loaded(ArgmaxPredictor, model[0]), []
    monkeypatch.setattr(
        torch.nn.LeakyReLU, "forward", lambda self, x: seen.append(torch.get_num_threads()) or x
    )
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        labels(predictor, model)
    finally:
        torch.set_num_threads(before)
    assert set(seen) == {1}


def test_names_and_signature_of_a_subclass(model):
    class Own(ArgmaxPredictor):
        def __init__(self, size=3):
            super().__init__(device=CPU, allow_tqdm=False)
            self.model = self.backend = size

    assert list(inspect.signature(Own).parameters) == ["size"]
    assert "device" in inspect.signature(ArgmaxPredictor).parameters
    predictor = Own()
    predictor.initialize_from_trained_model_folder(str(model[0]), (0, 1))
    np.testing.assert_array_equal(
        labels(predictor, model), labels(loaded(ArgmaxPredictor, model[0]), model)
    )
    assert predictor.model == 3


def test_processes_of_a_data_iterator_are_ended(model):
    ours = loaded(ArgmaxPredictor, model[0])
    adapter = PreprocessAdapterFromNpy(
        [model[1]],
        None,
        [dict(model[2])],
        None,
        ours.plans_manager,
        ours.dataset_json,
        ours.configuration_manager,
    )
    iterator = MultiThreadedAugmenter(adapter, None, 1, 1, None)
    (result,) = ours.predict_from_data_iterator(iterator)
    assert not iterator.was_initialized
    np.testing.assert_array_equal(result, labels(ours, model))


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda predictor: pickle.loads(pickle.dumps(predictor))],  # noqa: S301
)
def test_predictors_can_be_copied_and_pickled(model, copied):
    predictor = loaded(ArgmaxPredictor, model[0])
    expected = labels(predictor, model)
    np.testing.assert_array_equal(labels(copied(predictor), model), expected)


def test_positional_arguments_of_the_sequential_method(model, tmp_path):
    ours = loaded(ArgmaxPredictor, model[0])
    arguments = [[str(model[3] / "case0_0000.nii.gz")]], [str(tmp_path / "x")], False, True, None
    assert ours.predict_from_files_sequential(*arguments) == []
    assert (tmp_path / "x.nii.gz").exists()


def test_a_missing_checkpoint_is_a_missing_file(model):
    with pytest.raises(FileNotFoundError) as caught:
        loaded(ArgmaxPredictor, model[0], folds=(7,))
    assert isinstance(caught.value, WeightsError)
    with pytest.raises(FileNotFoundError):
        loaded(ArgmaxPredictor, model[0] / "nowhere")


def test_a_network_that_cant_be_copied(model):
    class NoCopy(type(loaded(ArgmaxPredictor, model[0]).network)):
        def __deepcopy__(self, memo):
            raise TypeError("can't be copied")

    def change(predictor):
        predictor.network.__class__ = NoCopy
        predictor.list_of_parameters = predictor.list_of_parameters[:1]

    equal_for_both(change, model)


def test_the_changes_run_without_totalfasts_loop_only_if_needed(model, monkeypatch):
    """A subclass that changes the finished logits still has totalfast's sliding window."""
    calls = []
    predict = prediction_module.predict_logits
    monkeypatch.setattr(
        prediction_module, "predict_logits", lambda *a, **k: calls.append(1) or predict(*a, **k)
    )

    class Own(ArgmaxPredictor):
        def predict_logits_from_preprocessed_data(self, data):
            return super().predict_logits_from_preprocessed_data(data) + 1

    labels(loaded(Own, model[0]), model)
    assert calls == [1]


class OtherNetwork(torch.nn.Module):
    """A network of a trainer, with a value that no checkpoint has, and weights that need one."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.layer = torch.nn.Conv3d(inputs, outputs, 3, padding=1)
        self.register_buffer("scale", torch.linspace(1, 2, outputs), persistent=False)
        self.shift = torch.linspace(0, 1, 3)
        self.power = torch.linspace(0, 2, 3)[1].item()

    def forward(self, tile):
        scaled = self.layer(tile) * self.scale[None, :, None, None, None]
        return (scaled + self.shift[1]) * self.power


@pytest.fixture
def with_trainer(model, tmp_path, monkeypatch):
    """A model of a trainer that only nnU-Net's predictor knows, with other data beside weights."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    class TrainerOfAProgram(nnUNetTrainer):
        @staticmethod
        def build_network_architecture(
            architecture_class_name,
            arch_init_kwargs,
            arch_init_kwargs_req_import,
            num_input_channels,
            num_output_channels,
            enable_deep_supervision=True,
        ):
            return OtherNetwork(num_input_channels, num_output_channels)

    name = TrainerOfAProgram.__name__
    finder = next(finder for finder in FINDERS if hasattr(predict_from_raw_data, finder))
    monkeypatch.setattr(predict_from_raw_data, finder, lambda *_: TrainerOfAProgram)
    folder = shutil.copytree(model[0], tmp_path / "model")
    torch.manual_seed(0)
    checkpoint = {
        "network_weights": OtherNetwork(1, 4).state_dict(),
        "trainer_name": name,
        "init_args": {
            "configuration": "3d_fullres",
            "folder": tmp_path,
            "arguments": Namespace(a=1),
        },
        "logging": {"loss": np.arange(3.0), "times": [datetime.now(timezone.utc)]},
        "options": defaultdict(list, {"a": [np.float16(1)]}),
    }
    torch.save(checkpoint, folder / "fold_0/checkpoint_final.pth")
    return (folder, *model[1:])


def test_a_trainer_that_a_program_registers(with_trainer):
    theirs, ours = (
        labels(loaded(kind, with_trainer[0], (0,)), with_trainer)
        for kind in (nnUNetPredictor, ArgmaxPredictor)
    )
    assert len(np.unique(theirs)) > 1
    np.testing.assert_array_equal(ours, theirs)


class AnyObject:
    """A type that no list of harmless types has."""


def test_a_trusted_model_that_totalfast_refuses_is_loaded_by_nnunet(model, tmp_path, caplog):
    folder = shutil.copytree(model[0], tmp_path / "model")
    path = folder / "fold_0/checkpoint_final.pth"
    torch.save(torch.load(path) | {"more": AnyObject()}, path)
    with pytest.raises(WeightsError, match="holds more than weights"):
        loaded(ArgmaxPredictor, folder, (0,))
    trusted = loaded(ArgmaxPredictor, folder, (0,), trust_model=True)
    assert caplog.text.count("nnU-Net loads") == 1
    changed = (folder, *model[1:])
    expected = labels(loaded(nnUNetPredictor, folder, (0,)), changed)
    np.testing.assert_array_equal(labels(trusted, changed), expected)


def test_readme_lists_everything_that_the_predictor_of_nnunet_has():
    predictor = nnUNetPredictor(device=CPU)
    names = [name for name in (*vars(nnUNetPredictor), *vars(predictor)) if name[:2] != "__"]
    table = (Path(totalfast.nnunet.__file__).parent / "README.md").read_text()
    assert [name for name in names if f"`{name}`" not in table] == []
