"""The command for programs that start ``TotalSegmentator``, started as they do."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import version

import nibabel as nib
import pytest
from totalsegmentator.map_to_binary import class_map
from totalsegmentator.registry import format_classes_table

from totalfast.cli.main import main
from totalfast.cli.shim import write_shims

from ..parity.matrix import compare_folders, synthetic_scan
from ..parity.nnunet_models import SyntheticModel


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_shims(tmp_path_factory.mktemp("shim") / "bin")[0].parent


@pytest.fixture
def environment(folder, standin_home):
    path = os.pathsep.join((str(folder), os.environ["PATH"]))
    return {**os.environ, "PATH": path, "TOTALSEG_HOME_DIR": str(standin_home)}


def lines_of(command, environment, cwd):
    """Start a program and read its output and errors line by line, as 3D Slicer does."""
    process = subprocess.Popen(
        [str(word) for word in command],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines = []
    while line := process.stdout.readline():
        lines.append(line.rstrip())
    process.stdout.close()
    return process.wait(), lines


ROI = ("--roi_subset", "lung_lower_lobe_right", "lung_upper_lobe_left", "heart")
SLICER_CALLS = [
    ("--ml", "--task", "total", "--fast"),
    ("--ml", "--task", "total"),
    ("--ml", "--task", "total", "--fastest"),
    ("--ml", "--task", "total_mr"),
    ("--ml", "--task", "total", "--fast", "--remove_small_blobs"),
    ("--ml", "--task", "total", "--fast", *ROI),
    ("--ml", "--task", "total", *ROI),
    ("--task", "body"),
    ("--task", "pleural_pericard_effusion", "--robust_crop"),
]
"""Flags that 3D Slicer's extension adds to its input and output. Its output has no ending, even
with --ml; then the extension reads ``segmentation.nii``. (It may add
``--higher_order_resampling``, which is in the table of differences.)"""
IN_CI = SLICER_CALLS[:1]


@pytest.mark.parametrize(
    "call",
    [pytest.param(c, marks=() if c in IN_CI else pytest.mark.slow) for c in SLICER_CALLS],
    ids=" ".join,
)
def test_lines_and_files_of_slicers_calls_equal_upstreams(call, folder, environment, tmp_path):
    scan = synthetic_scan("oblique").slicer[20:60, 20:60, 10:40]
    nib.save(scan, tmp_path / "total-segmentator-input.nii")
    programs = {"upstream": ["-m", "totalsegmentator.bin.TotalSegmentator"]}
    programs["ours"] = [folder / "TotalSegmentator"]  # given to Python as upstream's script is
    lines = {}
    for name, program in programs.items():
        (tmp_path / name).mkdir()
        command = [sys.executable, *program, "-i", tmp_path / "total-segmentator-input.nii"]
        command += ["-o", tmp_path / name / "segmentation", *call, "--device", "cpu"]
        command += ["-ns", "1"] if name == "upstream" else []
        code, lines[name] = lines_of(command, environment, tmp_path)
        assert code == 0, lines[name]
    result = compare_folders(" ".join(call), tmp_path / "upstream", tmp_path / "ours")
    assert (result.problems, result.differing_voxels) == ([], 0)
    assert result.classes > 0
    if "--ml" in call:
        assert (tmp_path / "ours" / "segmentation.nii").exists()
    else:
        names = class_map[call[call.index("--task") + 1]].values()
        assert all((tmp_path / f"ours/segmentation/{name}.nii.gz").exists() for name in names)
    our_lines = {re.sub(r"\d+\.\d+s", "", line) for line in lines["ours"]}
    progress = re.compile(r"\d+%\||\d+it |^$|^If the cropped image|Warning|warn")
    for line in lines["upstream"]:
        assert progress.search(line) or re.sub(r"\d+\.\d+s", "", line) in our_lines, line


def test_version_and_lists_of_the_command_on_the_path_equal_upstreams(environment, tmp_path):
    def answer(*words):
        return lines_of(["TotalSegmentator", *words], environment, tmp_path)

    assert answer("--version") == (0, [version("TotalSegmentator")])
    assert answer("-lc", "body") == (0, format_classes_table("body").splitlines())


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["-i", "x.nii"], 2, "are required for segmentation: -o"),
        (["-i", "x.nii", "-o", "y", "--save_lowres"], 1, "only works together with fast"),
        (["-i", "x.nii", "-o", "y", "-ta", "breasts", "-f"], 1, "does not work with"),
        (["-i", "x.nii", "-o", "y"], 1, "x.nii does not exist"),
    ],
)
def test_exit_codes_of_errors_equal_upstreams(environment, tmp_path, words, code, message):
    exit_code, lines = lines_of(["TotalSegmentator", *words], environment, tmp_path)
    assert exit_code == code
    assert message in lines[-1]


def test_shim_overwrites_a_shim_but_no_other_file(tmp_path, capsys):
    path = tmp_path / "a folder" / "TotalSegmentator"
    assert main(["shim", str(path.parent)]) == main(["shim", str(path.parent)]) == 0
    assert f"Put {path.parent} first on PATH" in capsys.readouterr().out
    assert os.access(path, os.X_OK)
    path.write_text("#!/usr/bin/python\n# upstream's\n")
    assert main(["shim", str(path.parent)]) == 1
    assert "was not written by totalfast; move it away" in capsys.readouterr().err
    assert path.read_text().endswith("upstream's\n")
    names = {"TotalSegmentator", "nnUNetv2_predict", "nnUNetv2_predict_from_modelfolder"}
    assert {file.name for file in path.parent.iterdir()} == names
    assert main(["shim", str(path.parent), "--only", "nnUNetv2_predict"]) == 0


@pytest.mark.parametrize("by", ["folder", "dataset"])
def test_nnunets_commands_on_the_path(environment, tmp_path, by):
    model = SyntheticModel()
    results = tmp_path / "results/Dataset004_X"
    folder, images = model.write(results), model.write_images(tmp_path / "images")
    command = "nnUNetv2_predict"
    words = ["-d", "4", "-c", model.configuration, "-f", "0"]
    if by == "folder":
        command, words = "nnUNetv2_predict_from_modelfolder", ["-m", folder, "-f", "0"]
    environment = environment | {"nnUNet_results": str(tmp_path / "results")}
    output = tmp_path / "out"
    call = [command, "-i", images, "-o", output, *words, "-device", "cpu", "--disable_tta"]
    code, lines = lines_of(call, environment, tmp_path)
    assert (code, lines[-1].split(":")[1]) == (0, f" 2 cases in {output}")
    assert sorted(path.name for path in output.glob("*.nii.gz")) == ["case0.nii.gz", "case1.nii.gz"]
