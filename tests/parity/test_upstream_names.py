"""The names, tables and flags that totalfast takes from upstream still exist and mean the same."""

from __future__ import annotations

import argparse
import inspect
import json
import os
import subprocess
import sys

import pytest

from totalfast import upstream
from totalfast.tasks import BROKEN_TASKS, COARSE_STEP_TASKS, resolve_task

OUR_FLAGS = {
    "export": "--export",
    "backend": "--backend",
    "tile_step_size": "--tile_step_size",
    "max_memory_gb": "--max-memory",
    "completion_marker": "--completion-marker",
    "offline": "--offline",
    "trust_model": "--trust-model",
    "series": "--series",
    "deterministic": "--deterministic",
    "precision": "--precision",
    "guided": "--guided",
}
"""Keywords and flags that only totalfast has: keyword to flag."""


@pytest.mark.parametrize("name", upstream.__all__)
def test_every_name_of_the_upstream_module_exists(name):
    assert hasattr(upstream, name)


def test_names_that_are_imported_lazily_exist():
    from dynamic_network_architectures.architectures.unet import (  # noqa: F401
        PlainConvUNet,
        ResidualEncoderUNet,
    )
    from nnunetv2.inference.export_prediction import (  # noqa: F401
        convert_predicted_logits_to_segmentation_with_correct_shape,
    )
    from nnunetv2.inference.sliding_window_prediction import (  # noqa: F401
        compute_gaussian,
        compute_steps_for_sliding_window,
    )
    from nnunetv2.preprocessing.normalization import default_normalization_schemes
    from nnunetv2.utilities.find_class_by_name import recursive_find_python_class  # noqa: F401
    from nnunetv2.utilities.find_objects import (  # noqa: F401
        recursive_find_trainer_class_by_name,
    )
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans  # noqa: F401
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager  # noqa: F401
    from totalsegmentator import custom_trainers
    from totalsegmentator.dicom_io import (  # noqa: F401
        dcm_to_nifti,
        save_mask_as_dicomseg,
        save_mask_as_rtstruct,
        tqdm,
    )
    from totalsegmentator.libs import download_pretrained_weights  # noqa: F401
    from totalsegmentator.nifti_ext_header import add_label_map_to_nifti  # noqa: F401

    assert default_normalization_schemes.CTNormalization
    for trainer in upstream.CUSTOM_TRAINERS:
        assert hasattr(custom_trainers, trainer)


def test_custom_trainers_equal_upstreams():
    code = (
        "from totalsegmentator import nnunet; from totalfast.upstream import CUSTOM_TRAINERS; "
        "raise SystemExit(set(nnunet.custom_trainers) != CUSTOM_TRAINERS)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_thread_limit_equals_nnunets():
    from nnunetv2.configuration import default_num_processes

    from totalfast.system.cores import NNUNET_THREADS

    assert default_num_processes == NNUNET_THREADS


SUPPORTED_TASKS = sorted(set(upstream.TASKS) & set(upstream.TASK_CONFIGS) - BROKEN_TASKS)


@pytest.mark.parametrize("task", SUPPORTED_TASKS)
@pytest.mark.parametrize("mode", [{}, {"fast": True}, {"fastest": True}])
def test_resolved_tasks_equal_upstreams(task, mode, monkeypatch):
    import totalsegmentator.python_api
    from totalsegmentator.python_api import get_task_config

    # The configuration of a task is compared; this needs no licence.
    monkeypatch.setattr(totalsegmentator.python_api, "show_license_info", lambda: None)
    try:
        expected = get_task_config(task, quiet=True, plans="nnUNetPlans", **mode)
    except ValueError:
        with pytest.raises(ValueError, match="does not work with option --fast"):
            resolve_task(task, **mode)
        return
    ours = resolve_task(task, **mode)
    ids = expected["task_id"]
    assert [part.model_id for part in ours.parts] == (ids if isinstance(ids, list) else [ids])
    resample = expected["resample"]
    spacing = resample if isinstance(resample, list) else [resample] * 3
    assert list(ours.spacing_mm or [None] * 3) == spacing
    assert ours.trainer == expected["trainer"]
    assert ours.configuration == expected["model"]
    assert (ours.folds and list(ours.folds)) == expected["folds"]
    assert ours.plans == expected["plans"]
    assert ours.licensed == upstream.TASK_CONFIGS[task].get("commercial", False)
    assert not expected["cascade"]
    regions, outside = expected["crop"], expected["remove_outside"]
    assert (ours.crop is None) == (regions is None)
    if ours.crop is not None:
        names = ours.crop.rough.classes
        of_total = {"total", "total_mr", "body"}
        assert ours.crop.rough.name == expected["crop_model"] or ours.crop.rough.name in of_total
        margin = (20, 20, 20) if expected["crop_model"] is None else tuple(expected["crop_addon"])
        assert ours.crop.margin_mm == margin
        assert {names[label] for label in ours.crop.labels} == set(regions)
        assert ours.crop.robust == expected["robust_crop"]
        assert {names[label] for label in ours.crop.outside or ()} == set(outside or ())
        assert ours.crop.outside_mm == (expected["remove_outside_dilation"] or 0)


ROUGH_CALLS = """
import json, sys
import nibabel, numpy
import totalsegmentator.python_api as api
import totalsegmentator.nnunet as nnunet

class Stop(Exception):
    pass

def stop(image, output, task_id, **keywords):
    raise Stop(dict(keywords, task_id=task_id))

nnunet.nnUNet_predict_image = stop
api.download_pretrained_weights = api.show_license_info = lambda *_: None
image = nibabel.Nifti1Image(numpy.zeros((4, 4, 4), numpy.int16), numpy.eye(4))
calls = {}
for task in json.loads(sys.argv[1]):
    for robust in (False, True):
        try:
            api.totalsegmentator(image, task=task, robust_crop=robust, quiet=True, device="cpu")
        except Stop as call:
            names = ("task_id", "trainer", "resample", "task_name", "folds", "model")
            calls[f"{task} {robust}"] = [call.args[0][name] for name in names]
print("FOUND", json.dumps(calls))
"""


def test_rough_models_equal_those_that_upstream_calls(tmp_path):
    tasks = [
        name
        for name in SUPPORTED_TASKS
        # Upstream's call of the rough model of teeth fails on the CPU (2.18.0).
        if resolve_task(name).crop is not None and name != "teeth"
    ]
    done = subprocess.run(
        [sys.executable, "-c", ROUGH_CALLS, json.dumps(tasks)],
        env={**os.environ, "TOTALSEG_HOME_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    expected = json.loads(done.stdout.partition("FOUND ")[2])
    assert len(expected) == 2 * len(tasks) > 30
    for task in tasks:
        for robust in (False, True):
            rough = resolve_task(task, robust_crop=robust).crop.rough
            assert [
                rough.parts[0].model_id,
                rough.trainer,
                rough.spacing_mm[0],
                rough.name,
                list(rough.folds),
                rough.configuration,
            ] == expected[f"{task} {robust}"]


def test_upstream_uses_the_coarse_tile_step_for_the_same_tasks():
    import totalsegmentator.python_api as api

    source = (api.__file__).replace("python_api.py", "nnunet.py")
    from pathlib import Path

    line = 'if task_name in ["total", "total_v3", "total_mr"]:\n            step_size = 0.8'
    assert line in Path(source).read_text()
    assert {"total", "total_v3", "total_mr"} == COARSE_STEP_TASKS


def test_weights_home_equals_upstreams(monkeypatch, tmp_path):
    from totalsegmentator.config import get_weights_dir

    monkeypatch.delenv("TOTALSEG_HOME_DIR", raising=False)
    monkeypatch.delenv("TOTALSEG_WEIGHTS_PATH", raising=False)
    assert upstream.weights_home() == get_weights_dir()
    monkeypatch.setenv("TOTALSEG_HOME_DIR", str(tmp_path / "home"))
    assert upstream.weights_home() == get_weights_dir()
    monkeypatch.setenv("TOTALSEG_WEIGHTS_PATH", str(tmp_path / "weights"))
    assert upstream.weights_home() == get_weights_dir()


def test_segment_has_upstreams_signature():
    from totalsegmentator.python_api import totalsegmentator as theirs

    import totalfast
    from totalfast.python_api import totalsegmentator

    def parameters(function):
        values = inspect.signature(function).parameters.values()
        return [(parameter.name, parameter.default, parameter.kind) for parameter in values]

    ours = parameters(totalsegmentator)
    count = len(parameters(theirs))
    assert ours[:count] == parameters(theirs)
    assert {(name, kind) for name, _, kind in ours[count:]} == {
        (keyword, inspect.Parameter.KEYWORD_ONLY) for keyword in OUR_FLAGS
    }
    assert totalfast.segment is totalsegmentator


class Refusal(Exception):  # noqa: N818
    """Raised by the parsers in these tests instead of exiting the process."""


@pytest.fixture
def parsers(monkeypatch):
    """Return upstream's parser, taken from its command, and ours."""
    import totalsegmentator.bin.TotalSegmentator as command

    from totalfast.cli.parser import build_parser

    def parse_args(parser, *args, **kwargs):
        raise Refusal(parser)

    def error(parser, message):
        raise Refusal(message)

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        with pytest.raises(Refusal) as caught:
            command.main()
    monkeypatch.setattr(argparse.ArgumentParser, "error", error)
    return caught.value.args[0], build_parser()


def flags(parser):
    return {option: action for action in parser._actions for option in action.option_strings}


def test_flags_and_defaults_equal_upstreams(parsers):
    expected, actual = map(flags, parsers)
    assert actual.keys() - expected.keys() == set(OUR_FLAGS.values())

    def facts(action):
        names = ("option_strings", "dest", "nargs", "const", "default", "required")
        return {"kind": type(action), **{name: getattr(action, name) for name in names}}

    several = {"kind": type(actual["--task"]), "nargs": "+"}  # tasks; one gives upstream's value
    for option, action in expected.items():
        own = several if action.dest == "task" else {}
        assert facts(actual[option]) == facts(action) | own
        if action.choices is not None:
            assert list(actual[option].choices) == list(action.choices)


WORDS = (
    ["0", "1", "3", "5", "6", "-1", "1.5", "nan", "abc", ""]
    + ["cpu", "gpu", "gpu:1", "gpu:x", "tpu", "mps"]
    + ["big", "small", "mean", "median", "body", "total_v3", "heartchambers_highres", "a/b", "a,b"]
)


def test_flags_accept_and_refuse_the_same_values_as_upstreams(parsers):
    """Compares types, choices and numbers of values through the results of parsing."""

    def outcome(parser, words):
        try:
            values = vars(parser.parse_args(words))
        except Refusal:
            return "refused"
        for keyword in OUR_FLAGS:
            values.pop(keyword, None)
        return repr(sorted(values.items()))

    theirs, ours = parsers
    for option in flags(theirs).keys() - {"-h", "--help", "--version"}:
        for words in ([option], *([option, word] for word in WORDS), [option, "a", "b"]):
            assert outcome(ours, words) == outcome(theirs, words), words
