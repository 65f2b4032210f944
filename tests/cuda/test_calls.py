"""Calls of one process: equal bits, several threads, no growing memory."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import totalfast

from .device import DEVICE

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("standins_are_used")]

CALLS = 5


def labels_of(session: totalfast.Session, scan, **keywords) -> np.ndarray:
    image = session.segment(scan, None, ml=True, quiet=True, **keywords)
    labels = np.asarray(image.dataobj)
    assert len(np.unique(labels)) > 10
    return labels


def labels_alone(scan, **keywords) -> np.ndarray:
    """Labels of a session of its own."""
    with totalfast.Session(device=DEVICE) as session:
        return labels_of(session, scan, deterministic=True, **keywords)


@pytest.mark.parametrize("fast", [True, False])
def test_deterministic_runs_give_equal_labels(thorax, fast):
    np.testing.assert_array_equal(labels_alone(thorax, fast=fast), labels_alone(thorax, fast=fast))


def test_second_call_of_a_session_gives_the_labels_of_the_first(thorax):
    with totalfast.Session(device=DEVICE) as session:
        first, second = (
            labels_of(session, thorax, fast=True, deterministic=True) for _ in range(2)
        )
    np.testing.assert_array_equal(first, second)


def test_two_sessions_in_two_threads_give_the_labels_of_each_alone(thorax):
    alone = [labels_alone(thorax, fast=True), labels_alone(thorax, fastest=True)]
    with ThreadPoolExecutor(2) as pool:
        together = [
            pool.submit(labels_alone, thorax, **{mode: True}) for mode in ("fast", "fastest")
        ]
        for expected, future in zip(alone, together, strict=True):
            np.testing.assert_array_equal(future.result(), expected)


def test_one_session_in_two_threads_gives_the_labels_of_one_thread(thorax):
    expected = labels_alone(thorax, fast=True)
    with totalfast.Session(device=DEVICE) as session, ThreadPoolExecutor(2) as pool:
        futures = [
            pool.submit(labels_of, session, thorax, fast=True, deterministic=True) for _ in range(2)
        ]
        for future in futures:
            np.testing.assert_array_equal(future.result(), expected)


def test_memory_of_the_device_does_not_grow_over_calls(thorax, device_memory):
    in_use = []
    with totalfast.Session(device=DEVICE) as session:
        for _ in range(CALLS):
            labels_of(session, thorax, fast=True)
            in_use.append(device_memory.memory_allocated())
    assert max(in_use[1:]) <= in_use[0]


def test_closed_session_frees_the_memory_of_the_device(thorax, device_memory):
    left = []
    for _ in range(2):  # libraries keep their workspace after the first session
        with totalfast.Session(device=DEVICE) as session:
            labels_of(session, thorax, fast=True)
            loaded = device_memory.memory_allocated()
        gc.collect()
        left.append(device_memory.memory_allocated())
    assert left[0] < loaded
    assert left[1] <= left[0]
