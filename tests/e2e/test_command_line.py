"""The command as a user types it: printed lines, files, errors and exit codes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from importlib.metadata import version

import nibabel as nib
import numpy as np
import pytest

import totalfast


@pytest.fixture
def run(standin_home):
    def run_command(*arguments, **environment):
        return subprocess.run(
            [sys.executable, "-m", "totalfast", *map(str, arguments)],
            env={**os.environ, "TOTALSEG_HOME_DIR": str(standin_home), **environment},
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )

    return run_command


@pytest.mark.parametrize("flags", [["--help"], ["--version"], ["-lt"], ["-lc"], ["-lc", "body"]])
def test_help_and_lists_import_no_large_packages(flags):
    code = (
        "import sys\nfrom totalfast.cli.main import main\n"
        "try:\n    code = main(sys.argv[1:])\nexcept SystemExit as stop:\n    code = stop.code\n"
        "heavy = {'torch', 'numpy', 'nibabel', 'scipy', 'nnunetv2'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *flags], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_version_names_totalfast_and_totalsegmentator(run):
    expected = f"totalfast {version('totalfast')} (TotalSegmentator {version('TotalSegmentator')})"
    assert run("--version").stdout == f"{expected}\n"
    assert totalfast.__version__ == totalfast.about.version() == version("totalfast")


def test_lists_equal_upstreams(run):
    from totalsegmentator.registry import format_classes_table, format_tasks_table

    assert run("--list-tasks").stdout == format_tasks_table() + "\n"
    assert run("--list-classes", "body").stdout == format_classes_table("body") + "\n"


def test_masks_are_written_and_all_lines_printed(run, scan, tmp_path):
    done = run("-i", scan, "-o", tmp_path / "seg", "--fast", "-d", "cpu")
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "seg").glob("*.nii.gz"))) == 117
    assert [path.name for path in tmp_path.iterdir()] == ["seg"]
    lines = done.stdout.splitlines()
    for expected in (
        "If you use this tool please cite: https://pubs.rsna.org/doi/10.1148/ryai.230024",
        "Using 'fast' option: resampling to lower resolution (3mm)",
        "Resampling...",
        "  Resampled in",
        "Predicting...",
        "  Predicted in",
        "Saving segmentations...",
        "  Saved in",
    ):
        assert any(line.startswith(expected) for line in lines), expected
    assert lines[-1].startswith("Done in ")
    assert lines[-1].endswith(f"117 masks in {tmp_path / 'seg'}")
    assert "Predicting 1/1" in done.stderr
    assert "100%" in done.stderr


def test_quiet_prints_nothing(run, scan, tmp_path):
    done = run("-i", scan, "-o", tmp_path / "s.nii.gz", "-ml", "--fastest", "-q", "-d", "cpu")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "s.nii.gz").exists()


def test_lines_of_parts_equal_upstreams(run, scan, tmp_path):
    done = run("-i", scan, "-o", tmp_path / "s.nii.gz", "-ml", "-ta", "total_mr", "-d", "cpu")
    assert "Predicting part 1 of 2 ...\n" in done.stdout
    assert "Predicting part 2 of 2 ...\n" in done.stdout


def test_skip_saving_writes_no_files(run, scan, tmp_path):
    done = run("-i", scan, "-o", tmp_path / "seg", "--fastest", "-ss", "-d", "cpu")
    assert done.returncode == 0
    assert list(tmp_path.iterdir()) == []
    assert "nothing was saved" in done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["-i", "{scan}"], 2, "arguments are required for segmentation: -o"),
        (["-i", "{folder}/none.nii.gz", "-o", "{folder}/s"], 1, "none.nii.gz does not exist"),
        (["-i", "{scan}", "-o", "{folder}/s", "-ta", "nonsense"], 2, "invalid choice"),
        (["-i", "{scan}", "-o", "{folder}/s.nii", "-ml", "-r"], 2, "Radiomics not supported for"),
        (["-i", "{scan}", "-o", "{folder}/s", "-sl"], 2, "only works together with fast"),
        (["-i", "{scan}", "-o", "{folder}/s", "-d", "tpu"], 2, "Invalid device type: 'tpu'"),
        (["-i", "{scan}", "-o", "{folder}/s", "-ta", "breasts", "-f"], 2, "does not work with"),
        (["-i", "{scan}", "-o", "{folder}/s", "--test", "1"], 2, "accepts test=0 only"),
        (["-i", "{scan}", "-o", "{folder}/s", "-ot", "dicom_seg"], 2, "use a Dicom image as input"),
        (["-i", "{scan}", "-o", "{folder}/s", "-ot", "nifti,png"], 2, "Invalid output types"),
        (["-i", "{folder}", "-o", "{folder}/s"], 1, "holds no DICOM image slices"),
        (["-i", "{scan}", "-o", "{taken}", "-ml"], 1, "is a directory; "),
        (["-i", "{scan}", "-o", "{folder}/s.txt", "-ml"], 1, "must end in .nii.gz"),
        (["-i", "{scan}", "-o", "{scan}"], 1, "is a file; without --ml"),
        (["-i", "{scan}", "-o", "{scan}/seg"], 1, "ct.nii.gz is no folder."),
    ],
)
def test_errors_have_a_message_an_exit_code_and_leave_no_files(
    run, scan, tmp_path, arguments, code, message
):
    (taken := scan.parent / "taken.nii.gz").mkdir(exist_ok=True)
    done = run(*(text.format(scan=scan, folder=tmp_path, taken=taken) for text in arguments))
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_termination_removes_partial_files(standin_home, scan, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "totalfast", "-i", scan, "-o", tmp_path / "s", "-ff", "-d", "cpu"],
        env={**os.environ, "TOTALSEG_HOME_DIR": str(standin_home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("Predicting"):
            break
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    process.stdout.close()
    assert list(tmp_path.rglob("*")) == []


INTERRUPTED_COMMAND = """
import importlib, itertools, os, signal, sys
from totalfast.cli.main import main
module, name = sys.argv[1].split(":")
module = importlib.import_module(module)
done, calls, numbers = getattr(module, name), [], itertools.count(1)

def interrupted(*arguments):
    calls.append(name)
    number = next(numbers)  # threads call it at the same time; each gets its own
    result = done(*arguments)
    if number == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGTERM)
    return result

setattr(module, name, interrupted)
code = main(sys.argv[3:])
sys.exit(code if calls else "it was not called")
"""


@pytest.mark.parametrize("call", [("totalfast.files.write:compress", "3"), ("nibabel:save", "1")])
def test_termination_while_files_are_open_leaves_no_partial_files(
    standin_home, scan, tmp_path, call
):
    """While masks are written, and while nnU-Net reads a file from a temporary folder."""
    flags = ["-ff", "-d", "cpu", "-sp", tmp_path / "probabilities.npz"]
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            INTERRUPTED_COMMAND,
            *call,
            "-i",
            scan,
            "-o",
            tmp_path / "s",
            *flags,
        ],
        env={**os.environ, "TOTALSEG_HOME_DIR": str(standin_home)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        143,
        "Interrupted; no file is half-written.",
    )
    assert list(tmp_path.iterdir()) == []


FORKING_SUBCOMMAND = """
import multiprocessing, os, signal, sys, time
from totalfast.cli import main as cli

def run(arguments):
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    child.start()
    child.terminate()
    child.join()
    return -child.exitcode

def main():
    import totalfast.cli.preview as command
    command.run = run
    before = signal.getsignal(signal.SIGTERM)
    code = cli.main(["preview", "a", "b", "c"])
    assert signal.getsignal(signal.SIGTERM) is before
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))  # the program's own
    child = os.fork()
    if not child:
        os.kill(os.getpid(), signal.SIGTERM)
        sys.exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    sys.exit(code)

main()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_processes_that_a_library_forks_can_be_terminated():
    """With our handler, a process would sometimes miss the signal, and the pool would wait."""
    done = subprocess.run(
        [sys.executable, "-c", FORKING_SUBCOMMAND], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (signal.SIGTERM, "")


def test_no_file_but_the_results_and_no_child_process(standin_home, scan, tmp_path):
    """An audit hook forbids new processes, network, and files outside of the output."""
    code = (
        "import os, sys\n"
        "def stop(what):\n"
        "    print(what, file=sys.stderr, flush=True)\n"
        "    os._exit(3)  # also from a thread, whose exceptions would go unnoticed\n"
        "def forbid(event, arguments):\n"
        "    if event in {'os.fork', 'os.posix_spawn', 'subprocess.Popen', 'os.exec'}:\n"
        "        # Importing torch's CUDA builds runs ldconfig to locate libdl.\n"
        "        if arguments[0] != '/sbin/ldconfig':\n"
        "            stop(f'started a process: {event} {arguments}')\n"
        "    if event == 'open' and isinstance(arguments[0], str) and arguments[1]:\n"
        "        place = arguments[0].replace(sys.argv[3], '')\n"
        "        inside = place.startswith(('seg/', '.totalfast-'))\n"
        "        if set(arguments[1]) & set('wax+') and not inside:\n"
        "            stop(f'wrote {arguments[0]}')\n"
        "    if event in {'socket.connect', 'socket.getaddrinfo'}:\n"
        "        stop(f'used the network: {arguments}')\n"
        "sys.addaudithook(forbid)\n"
        "import totalfast\n"
        "totalfast.segment(sys.argv[1], sys.argv[2], fast=True, device='cpu', quiet=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-B", "-c", code, scan, tmp_path / "seg", f"{tmp_path}{os.sep}"],
        env={**os.environ, "TOTALSEG_HOME_DIR": str(standin_home)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "seg").iterdir())) == 117


def test_a_guided_command_writes_the_same_files_and_tells_what_it_saved(run, tmp_path):
    values = np.random.default_rng(0).normal(0, 300, (90, 70, 110)).astype(np.int16)
    nib.save(nib.Nifti1Image(values, np.diag([1.5, 1.5, 1.5, 1.0])), tmp_path / "ct.nii.gz")
    names = []
    for flags in ((), ("--guided",)):
        output = tmp_path / f"masks{len(names)}"
        done = run("-i", tmp_path / "ct.nii.gz", "-o", output, "-d", "cpu", *flags)
        assert done.returncode == 0, done.stderr
        names.append(sorted(path.name for path in output.iterdir()))
    assert names[0] == names[1]
    assert len(names[0]) == 117
    assert re.search(r"Generating 3mm segmentation .*Guided: \d+ of \d+ tiles", done.stdout, re.S)
    refused = run("-i", tmp_path / "ct.nii.gz", "-o", tmp_path / "no", "--guided", "--fast")
    assert refused.returncode == 2
    assert "guided" in refused.stderr
    assert not (tmp_path / "no").exists()
