"""How far a batch is, and when it ends, with a clock and cases of known speed."""

from __future__ import annotations

import numpy as np
import pytest

from totalfast.batch.finding.cases import Case
from totalfast.batch.progress import Meter, duration, typical_first
from totalfast.run.many import Running

SECONDS = {1_000: 1.0, 9_000: 4.0, 50_000: 11.0}
"""Size of a file to the time of its case; not proportional, as with real scans."""


def cases_of(folder, sizes):
    cases = []
    for number, size in enumerate(sizes):
        path = folder / f"{number:03d}.nii.gz"
        path.write_bytes(bytes(size))
        cases.append(Case(name=path.name[:3], source=path, series=None, found=None))
    return cases


def sizes_of(order):
    sizes = [1_000] * 8 + [9_000] * 7 + [50_000] * 5
    if order == "mixed":
        sizes = np.random.default_rng(0).permutation(sizes).tolist()
    return sizes[::-1] if order == "falling" else sizes


@pytest.mark.parametrize("order", ["rising", "falling", "mixed"])
def test_time_left_is_right_after_five_cases(tmp_path, order):
    sizes = sizes_of(order)
    cases = typical_first(cases_of(tmp_path, sizes))
    now = 0.0
    meter = Meter(cases, Running(), clock=lambda: now)
    left = sum(map(SECONDS.get, sizes))
    for number, case in enumerate(cases, 1):
        needed = SECONDS[case.source.stat().st_size]
        loading = 3.0 if number == 1 else 0.0
        now, left = now + needed + loading, left - needed
        meter.end(
            case.name,
            failed=False,
            seconds={"Waiting": 7.0, "Loading": loading, "Predicting": needed},
        )
        if number >= 5 and left:
            assert meter.state().left_s == pytest.approx(left, rel=0.2), number
    state = meter.state()
    assert (state.done, state.failed, state.share, state.left_s) == (20, 0, 1.0, 0.0)


def test_typical_cases_come_first_and_the_others_keep_their_order(tmp_path):
    cases = cases_of(tmp_path, [10, 20, 30, 40, 50, 60, 70, 80, 90])
    order = [case.name for case in typical_first(cases)]
    assert order == ["004", "008", "000", "002", "006", "001", "003", "005", "007"]


def test_few_cases_keep_their_order(tmp_path):
    cases = cases_of(tmp_path, [30, 10, 20])
    assert typical_first(cases) == cases


def test_failed_cases_do_not_make_the_others_look_fast(tmp_path):
    cases = cases_of(tmp_path, [1_000] * 20)
    now = 0.0
    meter = Meter(cases, Running(), clock=lambda: now)
    for number, case in enumerate(cases[:10]):
        is_bad = number % 2 == 0
        now += 0.01 if is_bad else 2.0
        meter.end(case.name, failed=is_bad, seconds={"Reading": 0.01 if is_bad else 2.0})
    state = meter.state()
    assert (state.done, state.failed) == (10, 5)
    assert state.left_s == pytest.approx(20.0, rel=0.01)


def test_before_the_first_case_ends_nothing_is_predicted(tmp_path):
    state = Meter(cases_of(tmp_path, [1, 2]), Running()).state()
    assert (state.share, state.per_hour, state.left_s) == (0.0, None, None)
    assert str(state) == "0/2 cases"


def test_without_cases_all_is_done():
    state = Meter([], Running()).state()
    assert (state.total, state.share, state.left_s) == (0, 1.0, None)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(59.4, "59 s"), (90, "2 min"), (3599, "60 min"), (12_000, "3 h 20 min"), (200_000, "2 d 7 h")],
)
def test_duration_has_two_units(seconds, text):
    assert duration(seconds) == text
