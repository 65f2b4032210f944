"""``totalfast batch --engine ray``: on this machine, and on a cluster whose parts are killed."""

from __future__ import annotations

import importlib.util
import ipaddress
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.e2e.test_batch_command import (
    INTERRUPTED,
    Commands,
    entries,
    hidden,
    labels,
    wait_for_entries,
    write_scan,
    write_scans,
)

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed"),
    pytest.mark.skipif(os.name == "nt", reason="Ray's Windows version is experimental"),
]

RAY = ("--engine", "ray")

KILLS = Path(__file__).resolve().parents[2] / "scripts" / "kill_ray.py"


@pytest.fixture
def batch(standin_home, tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return Commands(standin_home, tmp_path)


def test_results_are_those_of_a_local_batch_and_failed_cases_are_named(batch, tmp_path):
    write_scans(tmp_path / "scans", 4)
    (tmp_path / "scans/empty.nii.gz").touch()
    batch.run("-i", "scans", "-o", "local", code=1)
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray/scan1").touch()
    process = batch.start("-i", "scans", "-o", "ray", "--json", *RAY)
    wait_for_entries(tmp_path / "ray", process, 1)
    heard = listening(process.pid)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 1, stderr
    events = [json.loads(line) for line in stdout.splitlines()]
    assert events[-1]["event"] == "end"
    assert sorted(events[-1]["failed"]) == ["empty", "scan1"]
    tries = [entry["attempt"] for entry in entries(tmp_path / "ray") if entry["name"] == "scan1"]
    assert tries == [1, 2]
    assert [entry["name"] for entry in entries(tmp_path / "ray")].count("empty") == 1
    local, ray = labels(tmp_path / "local"), labels(tmp_path / "ray")
    assert ray == {name: data for name, data in local.items() if name != "scan1"}
    assert not hidden(tmp_path / "ray")
    assert heard
    assert all(ipaddress.ip_address(host).is_loopback for host in heard), heard


def listening(process: int) -> set[str]:
    """Addresses on which a process and its children wait for connections."""
    found = set()
    for one in [psutil.Process(process), *psutil.Process(process).children(recursive=True)]:
        try:
            connections = one.net_connections(kind="tcp")
        except psutil.Error:
            continue
        found |= {c.laddr.ip.removeprefix("::ffff:") for c in connections if c.status == "LISTEN"}
    return found


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)],
)
def test_an_interrupted_batch_ends_soon_and_leaves_nothing_half_written(
    batch, tmp_path, number, code
):
    write_scans(tmp_path / "scans", 2)
    write_scan(tmp_path / "scans/long.nii.gz", 5, shape=(150, 150, 400), spacing=(3, 3, 3))
    process = batch.start("-i", "scans", "-o", "out", *RAY)
    wait_for_entries(tmp_path / "out", process, 1)
    children = psutil.Process(process.pid).children(recursive=True)
    began = time.monotonic()
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert time.monotonic() - began < 20
    assert process.returncode == code
    assert stderr.splitlines()[-1] == INTERRUPTED
    assert not hidden(tmp_path / "out")
    assert labels(tmp_path / "out").keys() >= {entry["name"] for entry in entries(tmp_path / "out")}
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--num-parts", "2"), "--num-parts does not work with --engine ray"),
        (("-d", "gpu:0,1"), "chooses the GPUs"),
    ],
)
def test_options_that_ray_decides_are_refused(batch, tmp_path, words, message):
    write_scans(tmp_path / "scans", 1)
    _, errors = batch.run("-i", "scans", "-o", "out", *RAY, flags=("--fastest", *words), code=2)
    assert message in errors[-1]


def test_an_address_without_ray_is_refused(batch, tmp_path):
    write_scans(tmp_path / "scans", 1)
    _, errors = batch.run("-i", "scans", "-o", "out", "--ray-address", "a:1", code=2)
    assert "--ray-address needs --engine ray" in errors[-1]


def test_a_cluster_that_does_not_answer_is_named(batch, tmp_path):
    write_scans(tmp_path / "scans", 1)
    words = ("-i", "scans", "-o", "out", *RAY, "--ray-address", "127.0.0.1:9")
    _, errors = batch.run(*words, code=1)
    assert "no Ray cluster can be used at 127.0.0.1:9" in errors[-1]


def test_killed_processes_and_nodes_lose_no_case_and_none_is_done_twice(standin_home, tmp_path):
    words = ["--kinds", "all", "--moments", "2", "--cases", "12", "--json", tmp_path / "kills.json"]
    run = subprocess.run(
        [sys.executable, KILLS, standin_home, *map(str, words)], capture_output=True, text=True
    )
    assert run.returncode == 0, (run.stdout, run.stderr[-3000:])
    kinds = json.loads((tmp_path / "kills.json").read_text())["kinds"]
    assert kinds["none"]["batches"] == kinds["all"]["batches"] == 1
    assert kinds["all"]["kills"] == 2
    assert kinds["all"]["wrong"] == []
