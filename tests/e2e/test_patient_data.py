"""What the console shows of a patient: nothing, in whichever way a command ends."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys

import numpy as np
import pydicom
import pytest

from ..dicom_series import write_series

SECRETS = {
    "PatientName": "Geheim^Gisela",
    "PatientID": "PID4711",
    "PatientBirthDate": "1.1.1970",
    "PatientSex": "XYZZY",
    "PatientAge": "077Q",
    "AccessionNumber": "ACC9913",
    "InstitutionName": "Klinikum Nirgendwo",
    "ReferringPhysicianName": "Doktor^Dorothea",
    "StudyDescription": "Verdacht",
    "PatientComments": "wohnt am Waldrand",
    "StudyID": "SID7788",
    "OtherPatientIDs": "OID5566",
    "PatientAddress": "Hauptweg 3",
}


@pytest.fixture
def series(tmp_path):
    voxels = np.random.default_rng(0).normal(0, 300, (12, 24, 26)).astype(int)
    with pydicom.config.disable_value_validation():
        folder = write_series(tmp_path / "ct", voxels, spacing_mm=(6.0, 6.0, 6.0), **SECRETS)
    return folder


def printed(standin_home, *arguments):
    done = subprocess.run(
        [sys.executable, "-m", "totalfast", *map(str, arguments), "-ff", "-d", "cpu"],
        env={**os.environ, "TOTALSEG_HOME_DIR": str(standin_home)},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def assert_no_secrets(text):
    words = [word for value in SECRETS.values() for word in re.split(r"[\^ ]", value)]
    assert [word for word in words if len(word) > 2 and word in text] == []


@pytest.mark.parametrize(
    "flags",
    [
        ["-o", "{folder}/s.nii.gz", "-ml"],
        ["-o", "{folder}/s.nii.gz", "-ml", "-v", "-s", "-p"],
        ["-o", "{folder}/s.dcm", "-ot", "dicom_seg"],
        ["-o", "{folder}/s.dcm", "-ot", "dicom_rtstruct"],
        ["-o", "{folder}/s.nii.gz", "-ml", "-ta", "total_mr"],
    ],
)
def test_a_run_prints_nothing_of_the_patient(standin_home, series, tmp_path, flags):
    flags = [flag.format(folder=tmp_path) for flag in flags]
    _, text = printed(standin_home, "-i", series, *flags)
    assert text
    assert_no_secrets(text)


def damage(path, change):
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(bytes(content))


def test_errors_about_damaged_headers_quote_nothing(standin_home, series, tmp_path):
    files = sorted(series.iterdir())
    arguments = ["-i", series, "-o", tmp_path / "s.nii.gz", "-ml"]
    spoilt = 0
    for word, other in (
        (b"Geheim^Gisela", b"\x00\xff\\^^====\\\\\xfe\x01"),
        (b"\x28\x00\x10\x00US", b"\x28\x00\x10\x00\xff\xff"),
        (b"\x20\x00\x32\x00DS", b"\x20\x00\x32\x00Zq"),
        (b"\x28\x00\x30\x00DS", b"\x28\x00\x30\x00UI"),
    ):
        for path in files[:1]:
            before = path.read_bytes()
            assert word in before
            path.write_bytes(before.replace(word, other, 1))
            code, text = printed(standin_home, *arguments)
            spoilt += code != 0 or "Left out" in text
            assert_no_secrets(text)
            assert "Traceback" not in text
            path.write_bytes(before)
    assert spoilt


def test_quiet_is_quiet_for_dicom(standin_home, series, tmp_path):
    code, text = printed(standin_home, "-i", series, "-o", tmp_path / "s.nii.gz", "-ml", "-q")
    assert (code, text) == (0, "")


def test_messages_of_libraries_are_not_printed_by_a_command():
    code = (
        "import logging, warnings\n"
        "from totalfast.cli import main\n"
        "def run():\n"
        "    logging.getLogger('dicom2nifti').warning('Geheim')\n"
        "    warnings.warn('Geheim')\n"
        "    return 0\n"
        "main.command(run)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
    assert logging.lastResort is not None


DICOM_FAILS = """
import runpy, sys
import totalfast.run.results as results
from totalfast.errors import OutputError
def broken(*arguments, **keywords):
    raise OutputError("can't write it")
results.write_dicom = broken
sys.argv[0] = "totalfast"
runpy.run_module("totalfast", run_name="__main__", alter_sys=True)
"""


def test_a_dicom_output_that_fails_leaves_the_labels_as_nifti(standin_home, series, tmp_path):
    arguments = ["-i", series, "-o", tmp_path / "s.dcm", "-ot", "dicom_seg", "-ff", "-d", "cpu"]
    done = subprocess.run(
        [sys.executable, "-c", DICOM_FAILS, *map(str, arguments)],
        env={**os.environ, "TOTALSEG_HOME_DIR": str(standin_home)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "ERROR: can't write it"
    assert f"the labels are written to {tmp_path / 's.dcm.nii.gz'} instead" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"ct", "s.dcm.nii.gz"}
