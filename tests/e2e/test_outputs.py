"""What a command leaves, and what it prints, when outputs or streams can't be used as usual."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest

from totalfast.system.staging import PREFIX


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    values = np.random.default_rng(0).normal(0, 300, (30, 26, 20)).astype(np.int16)
    path = tmp_path_factory.mktemp("scan") / "ct.nii.gz"
    nib.save(nib.Nifti1Image(values, np.diag([-6.0, 6.0, 6.0, 1.0])), path)
    return path


@pytest.fixture
def run(standin_home, tmp_path):
    def run_command(*arguments, launcher=("-m", "totalfast"), **keywords):
        environment = keywords.pop("environment", {})
        defaults = {"capture_output": True, "text": True, "encoding": "utf-8", "timeout": 300}
        return subprocess.run(
            [sys.executable, *launcher, *map(str, arguments), "-ff", "-d", "cpu"],
            env={
                **os.environ,
                "TOTALSEG_HOME_DIR": str(standin_home),
                "TOTALFAST_RESCUE_DIR": str(tmp_path / "rescue"),
                **environment,
            },
            check=False,
            **(defaults | keywords),
        )

    return run_command


def test_outputs_that_would_replace_the_scan_or_each_other_are_refused(run, scan, tmp_path):
    import shutil

    own = tmp_path / "ct.nii.gz"
    shutil.copy(scan, own)
    (tmp_path / "link.nii.gz").symlink_to(own)
    os.link(own, tmp_path / "hard.nii.gz")
    (tmp_path / "folder").mkdir()
    shutil.copy(scan, tmp_path / "folder/liver.nii.gz")
    before, files = own.read_bytes(), sorted(tmp_path.rglob("*"))
    out = ["-o", tmp_path / "s.nii.gz", "-ml"]
    for source, arguments, message in (
        (own, ["-o", own, "-ml"], "would replace the scan"),
        (own, ["-o", tmp_path / "link.nii.gz", "-ml"], "would replace the scan"),
        (own, ["-o", tmp_path / "hard.nii.gz", "-ml"], "would replace the scan"),
        (tmp_path / "folder/liver.nii.gz", ["-o", tmp_path / "folder"], "would replace the scan"),
        (own, [*out, "-s", own], "would replace the scan"),
        (own, [*out, "-rp", own], "would replace the scan"),
        (own, [*out, "-s", tmp_path / "x", "-rp", tmp_path / "x"], "have the same name"),
        (own, [*out, "-s", tmp_path / "s.nii.gz"], "have the same name"),
        (own, ["-o", tmp_path / "new", "-s", tmp_path / "new"], "is written into a folder"),
    ):
        done = run("-i", source, *arguments)
        assert (done.returncode, "Predicting" in done.stdout) == (1, False), done.stderr
        assert message in done.stderr.splitlines()[-1]
    assert own.read_bytes() == before
    assert sorted(tmp_path.rglob("*")) == files


def test_a_folder_in_the_place_of_a_mask_is_told_before_any_work(run, scan, tmp_path):
    (tmp_path / "out/liver.nii.gz").mkdir(parents=True)
    (tmp_path / "out/aorta.nii.gz").write_bytes(b"old")
    done = run("-i", scan, "-o", tmp_path / "out")
    assert "liver.nii.gz is a folder" in done.stderr
    assert "Predicting" not in done.stdout
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "aorta.nii.gz",
        "liver.nii.gz",
    ]


def test_a_name_with_an_ending_becomes_a_folder_with_a_line_that_says_so(run, scan, tmp_path):
    done = run("-i", scan, "-o", tmp_path / "seg.nii.gz")
    assert done.returncode == 0
    assert len(list((tmp_path / "seg.nii.gz").iterdir())) == 117
    assert "WARNING: without --ml, seg.nii.gz becomes a folder" in done.stdout


@pytest.mark.parametrize("multilabel", [True, False])
def test_the_completion_marker_lists_all_files(run, scan, tmp_path, multilabel):
    output = tmp_path / ("seg.nii.gz" if multilabel else "seg")
    flags = ["-ml"] if multilabel else []
    done = run("-i", scan, "-o", output, "-s", "--completion-marker", *flags)
    assert done.returncode == 0, done.stderr
    marker = tmp_path / (
        "seg.nii.gz.complete.json" if multilabel else "seg/totalfast-complete.json"
    )
    content = json.loads(marker.read_text())
    files = {path.name for path in marker.parent.iterdir()}
    assert set(content["files"]) == files - {marker.name}
    assert content["task"] == "total"


def test_without_the_flag_there_is_no_marker(run, scan, tmp_path):
    assert run("-i", scan, "-o", tmp_path / "seg.nii.gz", "-ml").returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["seg.nii.gz"]


DISK_IS_FULL_LATER = """
import errno, os, runpy, sys
import totalfast.system.staging as staging
def full(self, moves):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
staging.Staging.write_journal = full
sys.argv[0] = "totalfast"
runpy.run_module("totalfast", run_name="__main__", alter_sys=True)
"""


def test_results_that_the_disk_refuses_are_kept_and_the_error_says_where(run, scan, tmp_path):
    arguments = ["-i", scan, "-o", tmp_path / "seg", "-s", tmp_path / "other/s.json"]
    done = run(*arguments, launcher=("-c", DISK_IS_FULL_LATER))
    assert done.returncode == 1
    (kept,) = (tmp_path / "rescue").iterdir()
    last = done.stderr.splitlines()[-1]
    assert "No space left on device. They are complete in" in last
    assert str(kept) in last
    assert len(list((kept / "seg").iterdir())) == 117
    assert (kept / "other/s.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rescue"]


def test_a_reader_that_goes_away_does_not_end_the_run(run, scan, tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    done = run(
        *("-i", scan, "-o", tmp_path / "s.nii.gz", "-ml"),
        capture_output=False,
        stdout=writer,
        stderr=writer,
    )
    os.close(writer)
    assert done.returncode == 0
    assert (tmp_path / "s.nii.gz").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")  # noqa: PTH110
def test_a_full_disk_behind_the_log_does_not_end_the_run(run, scan, tmp_path):
    with open("/dev/full", "w") as full:  # noqa: PTH123
        done = run(
            *("-i", scan, "-o", tmp_path / "s.nii.gz", "-ml"),
            capture_output=False,
            stdout=full,
            stderr=full,
        )
    assert done.returncode == 0
    assert (tmp_path / "s.nii.gz").exists()


@pytest.mark.skipif(os.name != "posix", reason="needs a shell")
def test_closed_streams_do_not_end_the_run(standin_home, scan, tmp_path):
    command = f"exec '{sys.executable}' -m totalfast \"$@\" <&- >&- 2>&-"
    arguments = ["-i", scan, "-o", tmp_path / "s.nii.gz", "-ml", "-ff", "-d", "cpu"]
    done = subprocess.run(
        ["sh", "-c", command, "sh", *arguments],
        env={**os.environ, "TOTALSEG_HOME_DIR": str(standin_home)},
        check=False,
    )
    assert done.returncode == 0
    assert (tmp_path / "s.nii.gz").exists()


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_names_that_the_console_lacks_are_printed_as_escapes(run, scan, tmp_path, encoding):
    output = tmp_path / "患者" / "s.nii.gz"
    done = run(
        *("-i", scan, "-o", output, "-ml"),
        environment={"PYTHONIOENCODING": encoding},
        encoding=encoding,
    )
    assert done.returncode == 0, done.stderr
    assert output.exists()
    assert "\\u60a3\\u8005" in done.stdout.splitlines()[-1]


def test_lines_arrive_completely_and_in_order_while_other_threads_import(run, tmp_path):
    """A scan that is large enough to be read while nnU-Net is imported."""
    values = np.random.default_rng(0).normal(0, 300, (150, 140, 130)).astype(np.int16)
    image = nib.Nifti1Image(values, None)
    image.header.set_zooms((6, 6, 6))
    image.header["qform_code"] = image.header["sform_code"] = 0
    nib.save(image, tmp_path / "bare.nii.gz")
    done = run("-i", tmp_path / "bare.nii.gz", "-o", tmp_path / "s.nii.gz", "-ml", "-s")
    starts = [
        "",
        "If you use this tool please cite: ",
        "",
        "Using 'fastest' option: resampling to lower resolution (6mm)",
        "Export 'nearest': ",
        "WARNING: the scan's voxels are 6 x 6 x 6 mm",
        "WARNING: the scan's header has no orientation",
        "Resampling...",
        "  Resampled in ",
        "Memory: about ",
        "Predicting...",
        "  Predicted in ",
        "Resampling...",
        "  Resampled in ",
        "Saving segmentations...",
        "  Saved in ",
        "Calculating statistics...",
        "  calculated in ",
        "Done in ",
    ]
    lines = done.stdout.splitlines()
    assert len(lines) == len(starts), done.stdout
    for line, start in zip(lines, starts, strict=True):
        assert line.startswith(start)


UNEXPECTED = """
import runpy, sys
import totalfast.run.pipeline as pipeline
def broken(*arguments):
    raise {error}
pipeline.read_image = broken
sys.argv[0] = "totalfast"
runpy.run_module("totalfast", run_name="__main__", alter_sys=True)
"""


def test_an_unexpected_error_is_one_line_below_a_report_without_patient_data(run, scan, tmp_path):
    code = UNEXPECTED.format(error="KeyError('DOE^JANE')")
    output = tmp_path / "Jane" / "s.nii.gz"
    done = run("-i", scan, "-o", output, "-ml", launcher=("-c", code))
    assert done.returncode == 1
    *report, last = [line for line in done.stderr.splitlines() if "%|" not in line]
    assert last.startswith("ERROR: unexpected KeyError. This is a bug")
    text = "\n".join([*report, last])
    assert "totalfast 0." in text
    assert "torch " in text
    assert "KeyError at" in text
    assert "task=total" in text
    for private in ("DOE", "Jane", str(tmp_path), str(scan)):
        assert private not in text
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
    done = run("-i", scan, "-o", output, "-ml", "--debug", launcher=("-c", code))
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1] == last


def test_a_gpu_without_memory_is_one_line_that_says_what_to_do(run, scan, tmp_path):
    code = UNEXPECTED.format(error="__import__('torch').OutOfMemoryError('CUDA out of memory.')")
    done = run("-i", scan, "-o", tmp_path / "s.nii.gz", "-ml", launcher=("-c", code))
    lines = [line for line in done.stderr.splitlines() if "%|" not in line and line.strip()]
    assert lines == [
        "ERROR: OutOfMemoryError: CUDA out of memory. The GPU has too little free memory. Close "
        "other programs on the GPU, use a smaller model or part of the scan (--fast, "
        "--force_split), or use the CPU."
    ]


def test_the_folder_of_a_killed_run_is_removed_by_the_next(run, scan, tmp_path):
    folder = tmp_path / f"{PREFIX}0123456789abcdef"
    (folder / "new").mkdir(parents=True)
    (folder / "lock").touch()
    assert run("-i", scan, "-o", tmp_path / "s.nii.gz", "-ml").returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["s.nii.gz"]


EXTRA_FAILS = """
import runpy, sys
import {module} as module
def broken(*arguments, **keywords):
    raise ValueError("broken")
module.{name} = broken
sys.argv[0] = "totalfast"
runpy.run_module("totalfast", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    ("module", "name", "what"),
    [
        ("totalfast.preview.page", "draw_preview", "preview"),
        ("totalfast.run.results", "measure_classes", "file of statistics"),
        ("totalfast.run.pipeline", "save_report", "report"),
    ],
)
def test_an_extra_output_that_fails_does_not_lose_the_others(
    run, scan, tmp_path, module, name, what
):
    flags = ["-s", "-p", "-rp", tmp_path / "report.json", "--completion-marker"]
    launcher = ("-c", EXTRA_FAILS.format(module=module, name=name))
    done = run("-i", scan, "-o", tmp_path / "s.nii.gz", "-ml", *flags, launcher=launcher)
    assert done.returncode == 1
    assert f"WARNING: the {what} could not be written" in done.stdout
    assert "ERROR: unexpected ValueError" in done.stderr
    assert "Done in" not in done.stdout
    expected = {"s.nii.gz", "statistics.json", "preview_total.png", "report.json"}
    files = {path.name for path in tmp_path.iterdir()}
    assert len(expected - files) == 1
    assert files < expected  # without the marker
