"""``totalfast batch`` with scans and results in an S3 store: labels, resuming, kills, refusals."""

from __future__ import annotations

import os

import pytest

from tests.object_store import CREDENTIALS, moto_server
from tests.parity.matrix import script

pytest.importorskip("s3fs")
pytest.importorskip("moto.server")

CASES = 2


@pytest.fixture(scope="module")
def check(standin_home, tmp_path_factory):
    """A store with scans, and the results of the same scans on this disk."""
    checks = script("check_remote")
    scratch = tmp_path_factory.mktemp("remote")
    before = dict(os.environ)
    try:
        with (
            moto_server(scratch / "log") as port,
            checks.opened(standin_home, scratch, CASES, port) as check,
        ):
            yield check
    finally:
        for name in (*CREDENTIALS, "AWS_ENDPOINT_URL"):
            os.environ.pop(name, None)
            if name in before:
                os.environ[name] = before[name]


def test_results_equal_those_of_a_batch_on_this_disk_and_nothing_is_downloaded_twice(check):
    report = script("check_remote").check_whole(check)
    assert not check.wrong
    assert report["downloads_of_a_scan"] == 1
    assert (
        report["requests"]["PUT"] == 3 * CASES + 3
    )  # the table, and the manifest at the start and the end


def test_results_that_the_store_refuses_are_kept_and_only_they_are_done_again(check):
    report = script("check_remote").check_refused(check)
    assert not check.wrong
    assert report == {"copies_kept": 1, "downloads_of_a_scan": 1}


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_batch_that_is_killed_while_it_uploads_loses_no_case_and_does_none_twice(check):
    report = script("check_remote").check_kills(check, 1, 0.0)
    assert not check.wrong
    assert report["ended_before"] == 0
    assert report["done_when_killed"][0] < CASES


@pytest.mark.slow
def test_the_processes_of_a_ray_cluster_download_and_upload_themselves(check):
    pytest.importorskip("ray")
    report = script("check_remote").check_ray(check)
    assert not check.wrong
    assert report["downloads"] == CASES


@pytest.mark.slow
def test_a_batch_survives_faults_of_its_store(check):
    script("check_remote").check_faults(check)
    assert not check.wrong


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_batch_killed_at_many_moments_loses_no_case_and_does_none_twice(check):
    report = script("check_remote").check_kills(check, 10, 4.0)
    assert not check.wrong
    assert report["half_uploaded_cases_seen"]


@pytest.mark.slow
def test_scans_of_a_web_server_give_the_same_results(check):
    script("check_remote").check_web(check)
    assert not check.wrong
