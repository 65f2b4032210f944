"""A short run of scripts/fuzz_inputs.py, and what its oracle finds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="measures memory by /proc")

CASES = {"nifti": 300, "gzip": 300, "itk": 300, "dicom": 60, "zip": 60, "model": 25}


@pytest.mark.parametrize("kind", CASES)
def test_damaged_inputs_are_read_or_refused(kind, tmp_path):
    report_path = tmp_path / "report.json"
    command = [sys.executable, SCRIPTS / "fuzz_inputs.py", "--kind", kind, "--seed", "7"]
    command += ["--cases", str(CASES[kind]), "--json", report_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(report_path.read_text())["kinds"][kind]
    assert report["findings"] == {}
    assert report["cases"] == CASES[kind] == report["read"] + report["refused"]
    assert min(report["read"], report["refused"], report["must be read"]) > 0


PROGRAM = """
import io, logging, os, pickle, socket, subprocess, sys, tempfile, time
from pathlib import Path
sys.path[:0] = [sys.argv[1], str(Path(sys.argv[1]).parent)]
from fuzzing.case import Case, Place, WrongResultError
from fuzzing.loop import read_cases
from fuzzing.watch import Watch
from totalfast.errors import InputError

root = Path(sys.argv[2])
place = Place.below(root)
tempfile.tempdir = str(place.temporary)


def fail(error):
    raise error

ACTS = {
    "read": lambda: 1,
    "inside": lambda: (place.work / "a").write_text("a") and 1,
    "refused": lambda: fail(InputError("it is damaged")),
    "another result": lambda: 2,
    "file": lambda: (root / "a").write_text("a"),
    "folder": lambda: os.mkdir(root.parent / "b"),
    "removed": lambda: os.remove(root.parent / "kept"),
    "temporary": lambda: tempfile.mkstemp(),
    "program": lambda: subprocess.run(["true"], check=True),
    "shell": lambda: os.system("true"),
    "connection": lambda: socket.create_connection(("127.0.0.1", 9)),
    "import": lambda: __import__("antigravity"),
    "pickle": lambda: pickle.loads(pickle.dumps(io.BytesIO)),
    "error": lambda: fail(KeyError("x")),
    "exit": lambda: sys.exit(1),
    "two lines": lambda: fail(InputError("a\\nb")),
    "name in an error": lambda: fail(InputError("of Nobody")),
    "name in the log": lambda: logging.getLogger("totalfast.x").info("of NEMO") or 1,
    "wrong": lambda: fail(WrongResultError("the shape")),
    "slow": lambda: time.sleep(5),
    "memory": lambda: bytearray(200_000_000) and 1,
}

class Kind:
    slack_mb = 64

    def __init__(self, act, must_read):
        self.act, self.must_read = act, must_read

    def damage(self, chance):
        return Case(source=None, note="", expected=1, must_read=self.must_read)

    def read(self, case):
        return self.act()

    def equal(self, result, expected):
        return result == expected

import json
watch = Watch(place, 0.5)
found = {}
for name, act in ACTS.items():
    tally = read_cases(Kind(act, False), watch, seed="", numbers=[0])
    found[name] = list(tally.findings)
    (root / "a").unlink(missing_ok=True)
    for path in place.temporary.iterdir():
        path.unlink()
tally = read_cases(Kind(ACTS["refused"], True), watch, seed="", numbers=[0])
found["must be read"] = list(tally.findings)
print(json.dumps(found))
"""

FOUND = {
    "read": None,
    "inside": None,
    "refused": None,
    "another result": "not that of the undamaged input",
    "file": "for writing",
    "folder": "os.mkdir",
    "removed": "os.remove",
    "temporary": "left ['tmp",
    "program": "subprocess.Popen",
    "shell": "os.system",
    "connection": "socket",
    "import": "imported antigravity",
    "pickle": "pickle.find_class",
    "error": "KeyError in the fuzzer",
    "exit": "SystemExit in the fuzzer",
    "two lines": "an error of 2 lines",
    "name in an error": "the patient's name",
    "name in the log": "the patient's name",
    "wrong": "wrong result: the shape",
    "slow": "longer than 0.5 s",
    "memory": "more than 64 MB",
    "must be read": "refused, though",
}
"""Act of a reader to a part of the finding; None for acts that are allowed."""


def test_each_forbidden_act_is_found(tmp_path):
    (tmp_path / "kept").write_text("kept")
    (tmp_path / "root").mkdir()
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, program, SCRIPTS, tmp_path / "root"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for act, expected in FOUND.items():
        if expected is None:
            assert found[act] == [], act
        else:
            assert any(expected in finding for finding in found[act]), (act, found[act])
    assert (tmp_path / "kept").exists()
    assert not (tmp_path / "b").exists()
