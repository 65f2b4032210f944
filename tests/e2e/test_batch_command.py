"""``totalfast batch`` from the command line: results, ends, interruptions, and going on."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from tests.dicom_series import write_series
from tests.parity.matrix import script

FLAGS = ("--fastest", "-d", "cpu", "-ml")

INTERRUPTED = "Interrupted; no file is half-written."


class Commands:
    """Runs batches with the stand-ins."""

    def __init__(self, home: Path, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "TOTALSEG_HOME_DIR": str(home)}

    def start(self, *words, flags=FLAGS, stdin=subprocess.DEVNULL) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-m", "totalfast", "batch", *map(str, words), *flags],
            env=self.environment,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.folder,
        )

    def run(self, *words, code=0, flags=FLAGS, stdin=None) -> tuple[list[str], list[str]]:
        """Return the lines of stdout, and those of stderr without the bar."""
        process = self.start(*words, flags=flags, stdin=subprocess.PIPE)
        stdout, stderr = process.communicate(stdin, timeout=120)
        assert process.returncode == code, (stdout, stderr)
        lines = stderr.replace("\r", "\n").splitlines()
        return stdout.splitlines(), [line for line in lines if line.strip() and "%|" not in line]


@pytest.fixture
def batch(standin_home, tmp_path):
    return Commands(standin_home, tmp_path)


def write_scan(path: Path, seed: int = 0, shape=(24, 22, 20), spacing=(2.0, 2.0, 3.0)) -> Path:
    values = np.random.default_rng(seed).normal(0, 300, shape).astype(np.int16)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values, np.diag([*spacing, 1.0])), path)
    return path


def write_scans(folder: Path, count: int) -> Path:
    for seed in range(count):
        write_scan(folder / f"scan{seed}.nii.gz", seed)
    return folder


def entries(output: Path) -> list[dict]:
    lines = [
        json.loads(line)
        for file in sorted(output.glob("manifest*.jsonl"))
        for line in file.read_text().splitlines()
    ]
    return [line for line in lines if "name" in line]


def hidden(output: Path) -> list[str]:
    return [path.name for path in output.rglob(".*") if path.suffix != ".lock"]


def labels(output: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in output.glob("*/segmentation.nii.gz")}


def test_a_folder_becomes_label_maps_a_manifest_and_a_table(batch, tmp_path):
    write_scans(tmp_path / "scans", 4)
    printed, errors = batch.run("-i", "scans", "-o", "out", "--statistics")
    assert printed[0] == "4 cases"
    assert printed[-1] == f"Done: 4 of 4 cases, results in {tmp_path / 'out'}"
    assert not errors
    assert sorted(labels(tmp_path / "out")) == [f"scan{number}" for number in range(4)]
    assert {entry["state"] for entry in entries(tmp_path / "out")} == {"done"}
    with (tmp_path / "out/statistics.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 4 * 117
    assert {row["case"] for row in rows} == {f"scan{number}" for number in range(4)}

    before = (tmp_path / "out/manifest.jsonl").read_bytes()
    printed, errors = batch.run("-i", "scans", "-o", "out", "--statistics")
    assert printed[0] == "4 cases, 4 of them already done"
    assert printed[-1].startswith("Done: 4 of 4 cases")
    assert (tmp_path / "out/manifest.jsonl").read_bytes() == before


def test_results_are_those_of_single_runs(batch, standin_home, tmp_path):
    write_scans(tmp_path / "scans", 2)
    flags = ("--fastest", "-d", "cpu", "-rs", "liver", "spleen", "--statistics")
    batch.run("-i", "scans", "-o", "out", flags=flags)
    single = [sys.executable, "-m", "totalfast", "-i", "scans/scan1.nii.gz", "-o", "single", *flags]
    subprocess.run(single, env=batch.environment, cwd=tmp_path, check=True, capture_output=True)
    for name in ("liver.nii.gz", "spleen.nii.gz", "statistics.json"):
        assert (tmp_path / "out/scan1" / name).read_bytes() == (
            tmp_path / "single" / name
        ).read_bytes()


def test_damaged_and_missing_scans_are_named_last_and_do_not_stop_others(batch, tmp_path):
    write_scan(tmp_path / "good.nii.gz")
    write_scan(tmp_path / "cut.nii.gz")
    data = (tmp_path / "cut.nii.gz").read_bytes()
    (tmp_path / "cut.nii.gz").write_bytes(data[: len(data) // 2])
    (tmp_path / "empty.nii.gz").touch()
    (tmp_path / "list.csv").write_text(
        "case,path\na,good.nii.gz\nb,cut.nii.gz\nc,empty.nii.gz\nd,missing.nii.gz\n"
    )
    printed, errors = batch.run("-i", "list.csv", "-o", "out", code=1)
    assert sorted(line.split(":")[1].strip() for line in printed[-4:-1]) == ["b", "c", "d"]
    assert printed[-1] == f"Done: 1 of 4 cases, results in {tmp_path / 'out'}; 3 failed"
    assert errors == ["ERROR: 3 of 4 cases failed."]
    assert sorted(labels(tmp_path / "out")) == ["a"]
    assert not [name for name in "bcd" if (tmp_path / "out" / name).exists()]

    write_scan(tmp_path / "missing.nii.gz", 1)
    printed, _ = batch.run("-i", "list.csv", "-o", "out", code=1)
    assert printed[0] == "4 cases, 1 of them already done"
    assert sorted(labels(tmp_path / "out")) == ["a", "d"]


def test_only_a_changed_scan_and_a_missing_result_are_computed_again(batch, tmp_path):
    write_scans(tmp_path / "scans", 3)
    batch.run("-i", "scans", "-o", "out", "-q")
    before = labels(tmp_path / "out")
    write_scan(tmp_path / "scans/scan1.nii.gz", 9, shape=(30, 22, 20))
    (tmp_path / "out/scan2/segmentation.nii.gz").unlink()
    printed, _ = batch.run("-i", "scans", "-o", "out")
    assert printed[0] == "3 cases, 1 of them already done"
    after = labels(tmp_path / "out")
    assert [name for name in before if after[name] != before[name]] == ["scan1"]


def test_a_case_that_cannot_be_written_is_tried_again_and_its_reason_is_given(batch, tmp_path):
    write_scans(tmp_path / "scans", 2)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/scan1").touch()
    printed, errors = batch.run("-i", "scans", "-o", "out", "--retries", 2, code=1)
    assert printed.count("Trying again what failed: 1 of the cases ...") == 2
    assert printed[-2] == f"Failed: scan1: File exists: {tmp_path / 'out/scan1'}"
    assert printed[-1].startswith("Done: 1 of 2 cases")
    assert errors == ["ERROR: 1 of 2 cases failed."]
    assert [entry["attempt"] for entry in entries(tmp_path / "out")][-1] == 3


def test_other_options_are_refused_and_named(batch, tmp_path):
    write_scans(tmp_path / "scans", 1)
    batch.run("-i", "scans", "-o", "out", "-q")
    _, errors = batch.run("-i", "scans", "-o", "out", "--remove_small_blobs", code=2)
    assert "remove_small_blobs was not given and is now 200.0" in errors[-1]


def test_paths_come_from_stdin_and_from_a_pattern(batch, tmp_path):
    write_scan(tmp_path / "study 1/ct.nii.gz", 1)
    write_scan(tmp_path / "study 2/ct.nii.gz", 2)
    batch.run("-i", "-", "-o", "a", "-q", stdin="study 1/ct.nii.gz\nmine\tstudy 2/ct.nii.gz\n")
    batch.run("-i", "study*/ct.nii.gz", "-o", "b", "-q")
    from_stdin, from_pattern = labels(tmp_path / "a"), labels(tmp_path / "b")
    assert sorted(from_pattern) == ["study_1_ct", "study_2_ct"]
    assert from_stdin["mine"] == from_pattern["study_2_ct"]


def test_odd_names_give_each_case_a_folder_of_its_own(batch, tmp_path):
    names = ("with space", "ünï 名前", "dots.v1.2", "per%s{0}", "CT", "a/ct", "-dash", "it's")
    for seed, name in enumerate(names):
        write_scan(tmp_path / "scans" / f"{name}.nii.gz", seed)
    write_scan(tmp_path / "scans/.hidden.nii.gz")
    printed, _ = batch.run("-i", "scans", "-o", "out")
    assert printed[-1].startswith("Done: 8 of 8 cases")
    assert len({name.casefold() for name in labels(tmp_path / "out")}) == 8


def test_dicom_series_are_cases(batch, tmp_path):
    for number, modality in enumerate(("CT", "CT", "MR")):
        voxels = np.random.default_rng(number).integers(0, 500, (12, 24, 24)).astype(np.int16)
        write_series(tmp_path / f"archive/{number}", voxels, Modality=modality)
    printed, _ = batch.run("-i", "archive", "-o", "out", "--modality", "CT")
    assert printed[-1].startswith("Done: 2 of 2 cases"), printed
    assert len(labels(tmp_path / "out")) == 2
    assert all(entry["source"].startswith("archive") for entry in entries(tmp_path / "out"))


def test_results_may_be_in_the_folder_of_the_scans_but_not_be_it(batch, tmp_path):
    write_scans(tmp_path / "scans", 2)
    flags = ("--fastest", "-d", "cpu", "-rs", "liver")
    for _ in range(2):
        printed, _ = batch.run("-i", "scans", "-o", "scans/results", flags=flags)
        assert printed[-1].startswith("Done: 2 of 2 cases")
    _, errors = batch.run("-i", "scans", "-o", "scans", code=2)
    assert "-i and -o are the same folder" in errors[-1]
    assert not (tmp_path / "scans/manifest.jsonl").exists()


@pytest.mark.parametrize("scans", ["missing", "empty"])
def test_a_batch_without_scans_leaves_nothing(scans, batch, tmp_path):
    (tmp_path / "empty").mkdir()
    _, errors = batch.run("-i", scans, "-o", "new/out", code=1)
    assert scans in errors[-1]
    assert not (tmp_path / "new/out").exists()


def test_a_table_that_cannot_be_written_does_not_hide_how_the_cases_ended(batch, tmp_path):
    write_scans(tmp_path / "scans", 1)
    (tmp_path / "table.csv").mkdir()
    words = ("-i", "scans", "-o", "out", "-s", "--table", "table.csv")
    printed, errors = batch.run(*words, code=1)
    assert printed[-1].startswith("Done: 1 of 1 case")
    assert "table.csv" in errors[-1]


def test_debug_shows_the_tracebacks_of_failed_cases(batch, tmp_path):
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans/empty.nii.gz").touch()
    _, errors = batch.run("-i", "scans", "-o", "out", "--debug", code=1)
    assert "Traceback (most recent call last):" in errors
    _, errors = batch.run("-i", "scans", "-o", "out", code=1)
    assert "Traceback (most recent call last):" not in errors


def test_json_is_one_object_per_line(batch, tmp_path):
    write_scans(tmp_path / "scans", 2)
    (tmp_path / "scans/empty.nii.gz").touch()
    printed, errors = batch.run("-i", "scans", "-o", "out", "--json", code=1)
    events = [json.loads(line) for line in printed]
    assert events[0] == {"event": "cases", "cases": 3, "done": 0, "left_out": []}
    assert events[-1] == {"event": "end", "cases": 3, "failed": ["empty"]}
    cases = {event["name"]: event["state"] for event in events if event["event"] == "case"}
    assert cases == {"scan0": "done", "scan1": "done", "empty": "failed"}
    assert not errors


def test_quiet_prints_nothing_but_errors(batch, tmp_path):
    write_scans(tmp_path / "scans", 1)
    assert batch.run("-i", "scans", "-o", "out", "-q") == ([], [])
    (tmp_path / "scans/empty.nii.gz").touch()
    printed, errors = batch.run("-i", "scans", "-o", "out", "-q", code=1)
    assert (printed, errors) == ([], ["ERROR: 1 of 2 cases failed."])


def test_parts_at_once_share_a_folder_and_each_case_is_done_once(batch, tmp_path):
    write_scans(tmp_path / "scans", 7)
    parts = [
        batch.start("-i", "scans", "-o", "out", "-s", "-q", "--num-parts", 3, "--part-id", part)
        for part in range(3)
    ]
    ends = [(part.communicate(timeout=120), part.returncode) for part in parts]
    assert [code for _, code in ends] == [0, 0, 0], ends
    assert sorted(entry["name"] for entry in entries(tmp_path / "out")) == [
        f"scan{number}" for number in range(7)
    ]
    table = (tmp_path / "out/statistics.csv").read_bytes()
    printed, _ = batch.run("-i", "scans", "-o", "out", "-s")
    assert printed[0] == "7 cases, 7 of them already done"
    assert (tmp_path / "out/statistics.csv").read_bytes() == table


def wait_for_entries(output: Path, process: subprocess.Popen, count: int) -> None:
    end = time.monotonic() + 60
    while not (output / "manifest.jsonl").exists() or len(whole_lines(output)) < 1 + count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


def whole_lines(output: Path) -> list[str]:
    text = (output / "manifest.jsonl").read_text()
    return text[: text.rfind("\n") + 1].splitlines()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_batch_ends_soon_and_goes_on(batch, tmp_path, number, code):
    write_scans(tmp_path / "scans", 3)
    write_scan(tmp_path / "scans/long.nii.gz", 5, shape=(150, 150, 400), spacing=(3, 3, 3))
    process = batch.start("-i", "scans", "-o", "out", flags=(*FLAGS, "-s"))
    wait_for_entries(tmp_path / "out", process, 1)
    began = time.monotonic()
    process.send_signal(number)
    _, stderr = process.communicate(timeout=30)
    assert time.monotonic() - began < 5
    assert process.returncode == code
    assert stderr.splitlines()[-1] == INTERRUPTED
    assert not hidden(tmp_path / "out")
    done = [entry["name"] for entry in entries(tmp_path / "out")]
    assert labels(tmp_path / "out").keys() >= set(done)
    (tmp_path / "scans/long.nii.gz").unlink()
    printed, _ = batch.run("-i", "scans", "-o", "out", "-s")
    assert printed[-1].startswith("Done: 3 of 3 cases")
    assert [entry["name"] for entry in entries(tmp_path / "out")].count(done[0]) == 1


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_killed_batch_goes_on_and_its_table_is_that_of_an_uninterrupted_one(
    standin_home, tmp_path
):
    kills = script("kill_batch")
    commands = kills.Commands(home=standin_home, scans=tmp_path / "scans")
    kills.make_scans(commands.scans, 4)
    process = commands.start(tmp_path / "killed")
    wait_for_entries(tmp_path / "killed", process, 1)
    process.kill()
    process.communicate()
    assert sum(kills.done_lines(tmp_path / "killed").values()) >= 1
    commands.finish(tmp_path / "killed")
    commands.finish(tmp_path / "whole")
    tally = kills.Tally()
    names = {f"scan{number:02d}" for number in range(4)}
    tally.compare(tmp_path / "killed", tmp_path / "whole", names)
    assert tally == kills.Tally()


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_batch_killed_at_20_moments_loses_no_case_and_does_none_twice(standin_home, tmp_path):
    kills = script("kill_batch")
    commands = kills.Commands(home=standin_home, scans=tmp_path / "scans")
    kills.make_scans(commands.scans, 12)
    commands.finish(tmp_path / "whole")
    tally = kills.kill_at_moments(commands, tmp_path, "KILL", 20, tmp_path / "whole")
    assert not tally.wrong
    assert len(tally.done_when_hit) == 20


@pytest.mark.slow
def test_memory_stays_flat_over_500_scans(batch, tmp_path):
    write_scans(tmp_path / "scans", 1)
    for number in range(1, 500):
        shutil.copy(tmp_path / "scans/scan0.nii.gz", tmp_path / f"scans/scan{number}.nii.gz")
    for number in range(0, 490, 70):
        (tmp_path / f"scans/scan{number}.nii.gz").write_bytes(b"damaged")
    printed, _ = batch.run("-i", "scans", "-o", "out", code=1)
    assert printed[-1].endswith("; 7 failed")
    assert printed[-1].startswith("Done: 493 of 500 cases")
    peaks = [entry["peak_bytes"] for entry in entries(tmp_path / "out")]
    assert peaks[-1] - peaks[99] < 150e6
