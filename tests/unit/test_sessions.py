"""What a process and its sessions share: torch's settings, forks, loaded models."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import nibabel as nib
import numpy as np
import pytest
import torch

import totalfast
from totalfast.engine import torch_settings
from totalfast.engine.torch_settings import inference_settings
from totalfast.errors import SessionError
from totalfast.models import store
from totalfast.models.store import ModelStore
from totalfast.options import Options

CPU = torch.device("cpu")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


pytestmark = pytest.mark.usefixtures("standins_are_used")


@pytest.fixture
def scan():
    values = np.random.default_rng(0).normal(0, 300, (24, 20, 16)).astype(np.int16)
    return nib.Nifti1Image(values, np.diag([-6.0, 6.0, 6.0, 1.0]))


@pytest.fixture
def process_threads():
    """Torch's number of threads in this process: another number than a prediction's."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(before)


def threads_of_a_new_thread() -> int:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(torch.get_num_threads).result()


def test_overlapping_predictions_restore_the_settings_from_before_the_first(
    process_threads, monkeypatch
):
    monkeypatch.setattr(torch_settings, "network_threads", lambda: 2)
    first_runs, second_runs, first_ended = (threading.Event() for _ in range(3))
    seen = {}

    def first():
        with inference_settings(CPU):
            first_runs.set()
            assert second_runs.wait(30)
            seen["first inside"] = torch.get_num_threads()
        seen["first after"] = torch.get_num_threads()
        first_ended.set()

    def second():
        assert first_runs.wait(30)
        with inference_settings(CPU):
            second_runs.set()
            assert first_ended.wait(30)
            seen["second inside"] = torch.get_num_threads()
        seen["second after"] = torch.get_num_threads()

    with ThreadPoolExecutor(2) as pool:
        for work in [pool.submit(first), pool.submit(second)]:
            work.result()
    inside, after = 2, process_threads
    assert seen == {
        "first inside": inside,
        "second inside": inside,
        "first after": after,
        "second after": after,
    }
    assert torch.get_num_threads() == process_threads
    assert threads_of_a_new_thread() == process_threads


def test_cudnn_is_deterministic_until_the_last_such_prediction_ends(monkeypatch):
    cuda, cudnn = torch.device("cuda"), torch.backends.cudnn
    monkeypatch.setattr(torch, "autocast", lambda kind: torch.no_grad())
    monkeypatch.setenv(torch_settings.SEARCH_VARIABLE, "1")
    before = (cudnn.benchmark, cudnn.deterministic)
    assert before == (False, False)
    ordinary, exact = inference_settings(cuda), inference_settings(cuda, deterministic=True)
    with ordinary:
        assert (cudnn.benchmark, cudnn.deterministic) == (True, False)
        with pytest.raises(ZeroDivisionError), exact:
            assert (cudnn.benchmark, cudnn.deterministic) == (False, True)
            raise ZeroDivisionError
        assert (cudnn.benchmark, cudnn.deterministic) == (True, False)
    assert (cudnn.benchmark, cudnn.deterministic) == before


def test_cudnn_does_not_search_unless_the_program_or_the_user_wants_it(monkeypatch):
    cuda, cudnn = torch.device("cuda"), torch.backends.cudnn
    monkeypatch.setattr(torch, "autocast", lambda kind: torch.no_grad())
    with inference_settings(cuda):
        assert not cudnn.benchmark
    with monkeypatch.context() as changed:
        changed.setattr(cudnn, "benchmark", True)  # as nnU-Net's predictor sets it
        with inference_settings(cuda):
            assert cudnn.benchmark


def test_nested_settings_stay_set_until_the_outer_context_ends(process_threads, monkeypatch):
    monkeypatch.setattr(torch_settings, "network_threads", lambda: 2)
    with inference_settings(CPU):
        with inference_settings(CPU):
            pass
        assert torch.get_num_threads() == 2
        assert torch.is_inference_mode_enabled()
    assert torch.get_num_threads() == process_threads


FORK = """
import os, sys, threading, time
import nibabel as nib, numpy as np, totalfast
scan = nib.Nifti1Image(np.random.default_rng(0).normal(0, 300, (24, 20, 16)).astype(np.int16),
                       np.diag([-6.0, 6.0, 6.0, 1.0]))
def segment(session=totalfast): return session.segment(scan, fastest=True, device="cpu", quiet=True)
def child():
    process = os.fork()
    if not process:
        try:
            print("labels", segment().shape, flush=True)
        except Exception as error:
            print(type(error).__name__, error, flush=True)
        os._exit(0)
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if os.waitpid(process, os.WNOHANG)[0]:
            return
        time.sleep(0.05)
    os.kill(process, 9)
    print("hangs", flush=True)
"""


def forked(script):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORK + script],
        capture_output=True,
        text=True,
        check=True,
        timeout=200,
    )
    return done.stdout.splitlines()


@needs_fork
def test_a_process_forked_after_a_network_ran_is_told_to_spawn():
    (line,) = forked("segment(); child()")
    assert line.startswith("ForkError")
    assert '"spawn"' in line


@needs_fork
def test_a_process_forked_before_the_first_network_works():
    assert forked("child(); segment()") == ["labels (24, 20, 16)"]


@needs_fork
def test_a_process_forked_while_a_thread_loads_a_model_is_told_to_spawn():
    script = """
from totalfast.models import store
from totalfast.options import Options
task = Options(fastest=True).resolved_task()
loading, go = threading.Event(), threading.Event()
def slow(*a, **k):
    with models._lock:  # held at the time of the fork
        loading.set(); go.wait()
    raise totalfast.WeightsError("slow")
store.load_model = slow
from totalfast.session import default_session
models = default_session().models
models.load(task, task.parts[0], device="cpu")
loading.wait(); child(); go.set()
"""
    (line,) = forked(script)
    assert line.startswith("ForkError")


def test_a_closed_session_frees_its_models_and_refuses_calls(scan, monkeypatch):
    alive = weakref.WeakSet()
    load = store.load_model

    def counted(*arguments, **keywords):
        model = load(*arguments, **keywords)
        alive.add(model.forwards[0].body)
        return model

    monkeypatch.setattr(store, "load_model", counted)
    with totalfast.Session(device="cpu") as session:
        session.segment(scan, fastest=True, quiet=True)
        assert len(alive) == 1
    gc.collect()
    assert len(alive) == 0
    with pytest.raises(SessionError, match="closed"):
        session.segment(scan, fastest=True, quiet=True)
    session.close()


def test_the_least_recently_used_model_is_dropped(monkeypatch):
    loads = []
    load = store.load_model
    monkeypatch.setattr(
        store, "load_model", lambda folder, **k: loads.append(folder) or load(folder, **k)
    )
    parts = Options().resolved_task(), Options().resolved_task().parts
    models = ModelStore(keep=True, max_models=2)

    def take(number):
        before = len(loads)
        models.take(parts[0], parts[1][number], device="cpu")
        return len(loads) - before

    assert [take(n) for n in (0, 1, 0, 2, 0, 1, 2)] == [1, 1, 0, 1, 0, 1, 1]
    assert len(models._models) == 2


@pytest.mark.parametrize("max_models", [0, -1])
def test_a_bound_below_one_is_refused(max_models):
    with pytest.raises(totalfast.OptionError, match="max_models must be 1 or more"):
        totalfast.Session(max_models=max_models)


def test_models_of_another_trust_are_loaded_separately(monkeypatch):
    trusts = []
    load = store.load_model
    monkeypatch.setattr(
        store,
        "load_model",
        lambda *a, **k: trusts.append(k["trust_model"]) or load(*a, **k),
    )
    task = Options(fastest=True).resolved_task()
    models = ModelStore(keep=True)
    for trust in (False, True, False, True):
        models.take(task, task.parts[0], device="cpu", trust_model=trust)
    assert trusts == [False, True]


class Checkpoint(list):
    """Stands for the memory of a checkpoint; unlike a list, a weak reference can refer to it."""


def test_a_failed_load_keeps_nothing_in_memory(monkeypatch):
    refs = []

    def broken(folder, **keywords):
        checkpoint = Checkpoint([1])
        refs.append(weakref.ref(checkpoint))
        try:
            {}["weights"]
        except KeyError as error:
            raise totalfast.WeightsError("damaged") from error

    monkeypatch.setattr(store, "load_model", broken)
    task = Options(fastest=True).resolved_task()
    models = ModelStore(keep=True)
    gc.disable()
    try:
        with pytest.raises(totalfast.WeightsError, match="damaged"):
            models.take(task, task.parts[0], device="cpu")
        future = models.load(task, task.parts[0], device="cpu")
        assert future.exception() is not None
        assert [ref() for ref in refs] == [None, None]
    finally:
        gc.enable()


CALLS = """
import os, sys
import nibabel as nib, numpy as np, totalfast
scan = nib.Nifti1Image(np.random.default_rng(0).normal(0, 300, (10, 8, 6)).astype(np.int16),
                       np.diag([-6.0, 6.0, 6.0, 1.0]))
TASKS = [{"fastest": True}, {"fast": True}, {"task": "body"}, {"task": "body", "fast": True},
         {"task": "trunk_cavities"}]
def used():
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    anonymous = int(status["RssAnon"].split()[0]) / 1000
    return anonymous, len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
with totalfast.Session(device="cpu", max_models=2) as session:
    for call in range(100):
        session.segment(scan, quiet=True, **TASKS[call % 5])
        if call in (19, 59, 99):
            print(*used(), flush=True)
"""
FLAT_MB = 30
"""Growth of memory from call 20 to call 100 that counts as none. The five models have 2 MB each;
what the C library keeps between calls varies by some megabytes."""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_hundred_calls_over_five_tasks_use_no_more_memory_files_or_threads():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CALLS], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    early, middle, late = ([float(n) for n in line.split()] for line in done.stdout.splitlines())
    assert late[0] - early[0] < FLAT_MB, (early, middle, late)
    assert late[1] <= early[1]
    assert late[2] <= early[2] + 1  # a thread that has done its work may still be ending
