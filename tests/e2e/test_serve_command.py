"""Commands that a server runs, as a user types them: what they print and write stays the same."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel as nib
import numpy as np
import psutil
import pytest

from totalfast.serve.places import HAS_UNIX_SOCKETS

pytestmark = pytest.mark.skipif(not HAS_UNIX_SOCKETS, reason="needs Unix sockets")

FLAGS = ("--fastest", "-d", "cpu")


class Server:
    """A server's process, and commands with and without it."""

    def __init__(self, home: Path, folder: Path, *flags: str) -> None:
        self.folder = folder
        self.place = folder / "s.sock"
        self.environment = {**os.environ, "TOTALSEG_HOME_DIR": str(home)}
        self.log = folder / "log.txt"
        self.process = self.start("serve", "--socket", self.place, "-d", "cpu", *flags)
        first = self.process.stdout.readline()
        assert f"export TOTALFAST_SERVER={self.place}" in first, first
        self._lines = threading.Thread(target=self._drain)
        self.lines: list[str] = []
        self._lines.start()

    def _drain(self) -> None:
        for line in self.process.stdout:
            self.lines.append(line)

    def start(self, *words, served=False, **environment) -> subprocess.Popen:
        extra = {"TOTALFAST_SERVER": str(self.place)} if served else {}
        return subprocess.Popen(
            [sys.executable, "-m", "totalfast", *map(str, words)],
            env={**self.environment, **extra, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if served else subprocess.STDOUT,
            text=True,
        )

    def run(self, *words, served=True, cwd=None, **environment) -> subprocess.CompletedProcess:
        extra = {"TOTALFAST_SERVER": str(self.place)} if served else {}
        return subprocess.run(
            [sys.executable, "-m", "totalfast", *map(str, words)],
            env={**self.environment, **extra, **environment},
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
            cwd=cwd,
        )

    def wait_for(self, text: str) -> None:
        end = time.monotonic() + 60
        while not any(text in line for line in self.lines):
            assert time.monotonic() < end, (text, self.lines)
            time.sleep(0.02)

    def end(self) -> int:
        self.process.terminate()
        code = self.process.wait(30)
        self._lines.join(10)
        self.process.stdout.close()
        return code


@pytest.fixture(scope="module")
def place_for_sockets():
    folder = Path(tempfile.mkdtemp(prefix="tf", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def shared(standin_home, place_for_sockets):
    """A server for the tests that do not end it."""
    server = Server(standin_home, place_for_sockets, "--preload", "fastest")
    yield server
    assert server.end() == 0
    assert not server.place.exists()


@pytest.fixture
def own(standin_home):
    """A server for one test."""
    folder = Path(tempfile.mkdtemp(prefix="tf", dir="/tmp"))
    server = Server(standin_home, folder)
    yield server
    if server.process.poll() is None:
        server.end()
    else:
        server._lines.join(10)
        server.process.stdout.close()
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def long_scan(tmp_path_factory):
    """A scan whose networks run for some seconds: many tiles of the stand-in."""
    values = np.random.default_rng(0).normal(0, 300, (150, 150, 300)).astype(np.int16)
    path = tmp_path_factory.mktemp("scan") / "long.nii.gz"
    nib.save(nib.Nifti1Image(values, np.diag([-3.0, 3.0, 3.0, 1.0])), path)
    return path


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def printed(text: str) -> list[str]:
    """Lines without times, and without those of -v about a model that is being loaded."""
    lines = re.sub(r"\d+\.\d+", "N", text).splitlines()
    return [line for line in lines if "nnU-Net: Detected old nnU-Net plans format" not in line]


@pytest.mark.parametrize("flags", [(), ("-v", "-ml", "-s", "own.json"), ("-q",), ("-p", "-s")])
def test_a_served_command_prints_and_writes_the_same(shared, scan, tmp_path, flags):
    output = "seg.nii.gz" if "-ml" in flags else "seg"
    done = {}
    for served in (False, True):
        folder = tmp_path / "run"
        folder.mkdir()
        shutil.copy(scan, folder)
        words = ("-i", scan.name, "-o", output, *FLAGS, *flags)
        command = shared.run(*words, served=served, cwd=folder)
        folder.rename(tmp_path / f"served {served}")
        done[served] = command
    assert done[True].returncode == done[False].returncode == 0, done[True].stderr
    assert contents(tmp_path / "served True") == contents(tmp_path / "served False")
    assert printed(done[True].stdout) == printed(done[False].stdout)
    for line in ("Predicting 1/1", "Saving", "100%"):
        assert (line in done[True].stderr) == (line in done[False].stderr) == ("-q" not in flags)
    assert len(shared.lines) > 1


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["-i", "{scan}"], 2),
        (["-i", "{folder}/none.nii.gz", "-o", "{folder}/s"], 1),
        (["-i", "{scan}", "-o", "{folder}/s", "-ta", "nonsense"], 2),
        (["-i", "{scan}", "-o", "{folder}/s", "-sl"], 2),
        (["-i", "{scan}", "-o", "{folder}/s", "--test", "1"], 2),
        (["-i", "{scan}", "-o", "{folder}/s.txt", "-ml"], 1),
        (["-i", "{scan}", "-o", "{scan}/seg"], 1),
    ],
)
def test_a_failing_command_fails_the_same(shared, scan, tmp_path, arguments, code):
    words = [text.format(scan=scan, folder=tmp_path) for text in arguments]
    alone, served = shared.run(*words, served=False), shared.run(*words)
    assert alone.returncode == served.returncode == code
    assert (alone.stdout, alone.stderr) == (served.stdout, served.stderr)
    assert list(tmp_path.iterdir()) == []


def test_a_command_is_handed_over_without_large_packages(shared, scan, tmp_path):
    code = (
        "import sys\nfrom totalfast.cli.main import main\ncode = main(sys.argv[1:])\n"
        "heavy = {'torch', 'numpy', 'nibabel', 'scipy', 'asyncio', 'requests'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "-i", scan, "-o", tmp_path / "s", *FLAGS],
        env={**shared.environment, "TOTALFAST_SERVER": str(shared.place)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"TOTALFAST_SERVER": "/nowhere/s.sock"}, "no server answers at /nowhere/s.sock"),
        ({"TOTALFAST_SERVER": "example.com:80"}, "a server must be on this machine"),
        ({"TOTALFAST_OFFLINE": "1"}, "TOTALFAST_OFFLINE differs from the server's"),
    ],
)
def test_without_a_fitting_server_a_command_runs_by_itself(
    shared, scan, tmp_path, environment, reason
):
    done = shared.run("-i", scan, "-o", tmp_path / "s", *FLAGS, **environment)
    assert done.returncode == 0
    assert len(list((tmp_path / "s").glob("*.nii.gz"))) == 117
    warnings = [line for line in done.stdout.splitlines() if line.startswith("WARNING")]
    assert len(warnings) == 1
    assert reason in warnings[0]


def test_interrupting_a_command_cancels_its_run(own, long_scan, tmp_path):
    command = own.start("-i", long_scan, "-o", tmp_path / "s", *FLAGS[1:], served=True)
    own.wait_for("run 1 begins")
    time.sleep(1.5)
    began = time.monotonic()
    command.send_signal(signal.SIGINT)
    _, stderr = command.communicate(timeout=30)
    assert time.monotonic() - began < 15
    assert command.returncode == 130, stderr
    assert stderr.splitlines()[-1] == "Interrupted; no file is half-written."
    own.wait_for("run 1 is cancelled")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_client_ends_its_run_and_the_server_goes_on(own, scan, long_scan, tmp_path):
    command = own.start("-i", long_scan, "-o", tmp_path / "s", *FLAGS[1:], served=True)
    own.wait_for("run 1 begins")
    command.kill()
    command.communicate()
    own.wait_for("run 1 is cancelled")
    assert list(tmp_path.iterdir()) == []
    assert own.run("-i", scan, "-o", tmp_path / "t", *FLAGS).returncode == 0


def test_a_killed_server_is_an_error_with_advice(own, long_scan, tmp_path):
    command = own.start("-i", long_scan, "-o", tmp_path / "s", *FLAGS[1:], served=True)
    own.wait_for("run 1 begins")
    time.sleep(0.3)
    own.process.kill()
    _, stderr = command.communicate(timeout=30)
    assert command.returncode == 1
    assert "ERROR: the server ended while it ran this command" in stderr
    assert not (tmp_path / "s").exists()


def test_a_stopped_server_cancels_its_runs(own, long_scan, tmp_path):
    command = own.start("-i", long_scan, "-o", tmp_path / "s", *FLAGS[1:], served=True)
    own.wait_for("run 1 begins")
    began = time.monotonic()
    assert own.end() == 0
    assert time.monotonic() - began < 20
    _, stderr = command.communicate(timeout=30)
    assert command.returncode == 1
    assert "the server was stopped, and this run with it" in stderr
    assert list(tmp_path.iterdir()) == []
    assert not own.place.exists()


def test_many_requests_of_which_some_clients_vanish(shared, scan, tmp_path):
    def client(number):
        codes = []
        for repeat in range(5):
            output = tmp_path / f"{number}-{repeat}.nii.gz"
            command = shared.start("-i", scan, "-o", output, *FLAGS, "-ml", served=True)
            if number < 2 and repeat == 2:  # it vanishes
                time.sleep(0.2)
                command.kill()
                command.communicate()
                return codes
            command.communicate(timeout=120)
            codes.append((command.returncode, output))
        return codes

    assert shared.run("-i", scan, "-o", tmp_path / "first.nii.gz", *FLAGS, "-ml").returncode == 0
    process = psutil.Process(shared.process.pid)
    before = process.memory_info().rss
    with ThreadPoolExecutor(6) as pool:
        done = [one for codes in pool.map(client, range(6)) for one in codes]
    assert len(done) == 4 * 5 + 2 * 2
    assert {code for code, _ in done} == {0}
    assert len({hashlib.sha256(path.read_bytes()).hexdigest() for _, path in done}) == 1
    assert process.memory_info().rss < 2e9
    end = time.monotonic() + 10  # memory is returned in a pause
    while process.memory_info().rss - before > 150e6:
        assert time.monotonic() < end, (process.memory_info().rss, before)
        time.sleep(0.2)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
