"""Many runs in threads: order of turns, memory, errors, cancellation, what is measured."""

from __future__ import annotations

import logging
import threading
import time

import nibabel as nib
import numpy as np
import pytest

import totalfast
from totalfast.run.many import THREAD_NAME, StageClock, run_many
from totalfast.system import turns as turns_module
from totalfast.system.turns import MemoryGate, Turns


def start(function, *arguments):
    thread = threading.Thread(target=function, args=arguments)
    thread.start()
    return thread


def wait_until(condition):
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.005)
    pytest.fail("waited for five seconds")


def test_turns_are_taken_in_the_order_of_asking():
    turns, order = Turns(), []

    def take(number):
        with turns.turn():
            order.append(number)

    threads = []
    with turns.turn():
        assert turns.taken
        assert not turns.take_if_free()
        for number in range(5):
            threads.append(start(take, number))
            wait_until(lambda: len(turns._waiting) == len(threads) + 1)
    for thread in threads:
        thread.join()
    assert order == list(range(5))
    assert not turns.taken
    assert turns.take_if_free()
    turns.give_back()


def test_a_thread_that_stops_waiting_blocks_nobody(monkeypatch):
    monkeypatch.setattr(turns_module, "WAIT_S", 0.01)
    turns, gate, entered = Turns(), MemoryGate(), []

    def cancelled():
        raise KeyboardInterrupt

    with turns.turn(), gate.passed(10, free=10):
        with pytest.raises(KeyboardInterrupt), turns.turn(cancelled):
            entered.append("never")
        with pytest.raises(KeyboardInterrupt), gate.passed(1, free=10, on_wait=cancelled):
            entered.append("never")
    with turns.turn(), gate.passed(10, free=10):
        entered.append("later")
    assert entered == ["later"]


def test_runs_wait_for_memory_and_large_ones_are_not_overtaken():
    gate, log = MemoryGate(), []
    leave = {name: threading.Event() for name in "abcd"}

    def run(name, need, free):
        with gate.passed(need, free=free) as may_take:
            log.append((name, may_take))
            leave[name].wait()

    threads = [start(run, "a", 40, 100)]
    wait_until(lambda: len(log) == 1)
    threads.append(start(run, "b", 50, 999))  # what is free now counts for the first only
    wait_until(lambda: len(log) == 2)
    threads.append(start(run, "c", 30, 999))
    wait_until(lambda: gate._door.taken)
    threads.append(start(run, "d", 5, 999))
    time.sleep(0.05)
    assert log == [("a", 100), ("b", 60)]
    leave["a"].set()
    wait_until(lambda: len(log) == 4)
    assert log[2:] == [("c", 50), ("d", 20)]
    for event in leave.values():
        event.set()
    for thread in threads:
        thread.join()
    with gate.passed(10**12, free=1.0) as may_take:  # alone, it begins all the same
        assert may_take == 1.0


def test_outcomes_have_results_errors_stages_and_warnings():
    logger = logging.getLogger("totalfast.test")

    def job(key, clock):
        assert threading.current_thread().name.startswith(THREAD_NAME)
        clock.expect(2.0)
        clock.stage("Reading")
        logger.warning("WARNING: %s is odd.", key)
        time.sleep(0.02)
        clock.stage("Predicting 1/5")
        clock.stage("Predicting 2/5")
        if key == "b":
            raise ValueError(key)
        return key.upper()

    outcomes = {outcome.key: outcome for outcome in run_many("abc", job, threads=2)}
    assert {key: outcome.value for key, outcome in outcomes.items()} == {
        "a": "A",
        "b": None,
        "c": "C",
    }
    assert isinstance(outcomes["b"].error, ValueError)
    for key, outcome in outcomes.items():
        assert outcome.warnings == (f"{key} is odd.",)
        assert set(outcome.seconds) == {"Preparing", "Reading", "Predicting"}
        assert 0.02 <= outcome.seconds["Reading"] <= outcome.total_s
    assert not logging.getLogger("totalfast").filters


def test_keys_are_taken_when_a_thread_is_free():
    taken = []

    def keys():
        for key in range(10):
            taken.append(key)
            yield key

    for outcome in run_many(keys(), lambda key, clock: key, threads=3):
        assert len(taken) <= outcome.value + 4


def test_a_closed_generator_ends_its_runs():
    ended, began = [], threading.Event()

    def job(key, clock):
        try:
            while key:  # the first one ends at once
                began.set()
                clock.advance(0.01)
                time.sleep(0.001)
        finally:
            ended.append(key)

    outcomes = run_many(range(3), job, threads=3)
    next(outcomes)
    began.wait()
    outcomes.close()
    assert sorted(ended) == [0, 1, 2]


@pytest.mark.usefixtures("standins_are_used")
def test_many_scans_give_the_labels_of_single_calls(tmp_path):
    rng = np.random.default_rng(0)
    scans = [
        nib.Nifti1Image(
            rng.normal(0, 300, (20 + n, 22, 24)).astype(np.int16), np.diag([6, 6, 6, 1])
        )
        for n in range(4)
    ]
    keywords = {"fastest": True, "quiet": True, "device": "cpu", "ml": True}
    with totalfast.Session() as session:
        expected = [session.segment(scan, **keywords) for scan in scans]
        cases = [(scan, tmp_path / f"{n}.nii.gz") for n, scan in enumerate(scans)]
        cases.insert(2, (tmp_path / "missing.nii.gz", tmp_path / "never.nii.gz"))
        outcomes = list(session.segment_many(cases, **keywords))
    assert len(outcomes) == 5
    (failed,) = [outcome for outcome in outcomes if outcome.error]
    assert isinstance(failed.error, totalfast.InputError)
    assert failed.key[1].name == "never.nii.gz"
    for outcome in outcomes:
        if outcome is failed:
            continue
        number = int(outcome.key[1].name[0])
        assert outcome.key[0] is scans[number]
        np.testing.assert_array_equal(outcome.value.dataobj, expected[number].dataobj)
        written = nib.load(outcome.key[1])
        np.testing.assert_array_equal(written.dataobj, expected[number].dataobj)
        assert outcome.seconds["Predicting"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{n}.nii.gz" for n in range(4)]


def test_the_last_stage_is_measured_also_if_all_runs_are_cancelled():
    cancelled = threading.Event()
    clock = StageClock(cancelled)
    clock.stage("Saving 1/2")
    cancelled.set()
    clock.end()
    assert set(clock.seconds) == {"Preparing", "Saving"}
    with pytest.raises(BaseException, match="^$"):
        clock.stage("Another")


def test_a_corrected_total_is_of_the_same_task():
    clock = StageClock(threading.Event())
    clock.expect(10.0)
    clock.advance(3.0)
    clock.correct(6.0)  # as a guided run does when it knows its tiles
    assert clock.fraction == 0.5
    clock.advance(3.0)
    assert clock.fraction == 1.0
