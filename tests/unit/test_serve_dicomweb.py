"""A DICOMweb server as a client of it sees it: series, faults, limits, what it confirms."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import subprocess
import time

import numpy as np
import pytest

pytest.importorskip("aiohttp")

from aiohttp import web
from aiohttp.test_utils import TestServer

from tests.dicom_series import write_multi_frame, write_series
from tests.dicomweb_double import BOUNDARY, ROOT, Double, multipart, status, store_answer
from totalfast.errors import OptionError
from totalfast.files.dicom.instances import is_uid, read_instance
from totalfast.serve import dicomweb, dicomweb_fetch
from totalfast.serve.dicomweb import DicomWebError
from totalfast.serve.dicomweb_servers import DicomWebServer
from totalfast.serve.storage import FullError, Storage
from totalfast.serve.studies import Studies, StudyOrder

STUDY, SERIES = "1.2.3", "1.2.3.4"
LOGIN = "Basic YWxpY2U6c2VjcmV0"
VOXELS = np.arange(5 * 6 * 7, dtype=np.int16).reshape(5, 6, 7)


@pytest.fixture
def double(tmp_path):
    found = Double()
    found.add(write_series(tmp_path / "volume", VOXELS))
    return found


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(dicomweb, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(dicomweb, "STALL_S", 0.5)


def order(series=None, push=None):
    return StudyOrder(server="pacs", study=STUDY, series=series, push=push)


def with_studies(
    double, folder, work, *, series_bytes=1 << 20, login=LOGIN, limit=1 << 20, certificate=None
):
    """Await ``work(studies, storage)`` in a loop with the server."""

    async def main():
        server = TestServer(double.app(), scheme="http" if certificate is None else "https")
        await server.start_server(ssl=certificate)
        pacs = DicomWebServer(name="pacs", url=str(server.make_url(ROOT)), authorization=login)
        storage = Storage(folder, limit_bytes=limit, free_bytes=0)
        try:
            async with dicomweb.open_client() as http:
                studies = Studies(http, {"pacs": pacs}, storage=storage, series_bytes=series_bytes)
                return await work(studies, storage)
        finally:
            await server.close()

    return asyncio.run(main())


def fetched(double, tmp_path, *, series=None, **settings):
    """Fetch the series of the study; return its UID, the files' bytes, and the events."""
    notes = []

    async def work(studies, storage):
        folder = storage.new_folder()
        uid = await studies.fetch(order(series), folder, notes.append)
        files = [path.read_bytes() for path in sorted((folder / "scan").iterdir())]
        assert storage.used_bytes == sum(map(len, files))
        return uid, files

    (tmp_path / "runs").mkdir(exist_ok=True)
    return *with_studies(double, tmp_path / "runs", work, **settings), notes


def test_a_series_is_fetched_byte_by_byte(double, tmp_path):
    uid, files, notes = fetched(double, tmp_path)
    assert uid == SERIES
    assert files == double.series[STUDY, SERIES]
    assert notes[0] == {"event": "fetching", "instances": 0, "of": None}
    assert notes[-1] == {"event": "fetching", "instances": 5, "of": 5}
    assert double.headers["retrieve"][0]["Accept"].endswith("transfer-syntax=*")


def test_scouts_and_other_modalities_are_not_chosen(double, tmp_path):
    double.add(write_series(tmp_path / "scout", VOXELS[:3], SeriesInstanceUID="1.5"))
    double.add(write_series(tmp_path / "pet", VOXELS, SeriesInstanceUID="1.6", Modality="PT"))
    assert fetched(double, tmp_path)[0] == SERIES
    assert fetched(double, tmp_path, series="1.6")[0] == "1.6"


def test_a_multi_frame_file_is_a_volume(double, tmp_path):
    double.series.clear()
    write_multi_frame(tmp_path / "multi" / "one.dcm", VOXELS, SeriesInstanceUID="1.7")
    double.add(tmp_path / "multi")
    double.add(write_series(tmp_path / "scout", VOXELS[:3], SeriesInstanceUID="1.5"))
    assert fetched(double, tmp_path)[0] == "1.7"


def test_several_volumes_are_listed_without_descriptions(double, tmp_path):
    double.add(
        write_series(
            tmp_path / "two", VOXELS, SeriesInstanceUID="1.8", SeriesDescription="Jane Doe"
        )
    )
    with pytest.raises(DicomWebError) as raised:
        fetched(double, tmp_path)
    text = str(raised.value)
    assert "1.2.3.4 (CT, 5 instances); 1.8 (CT, 5 instances)" in text
    assert "Jane" not in text
    assert "synthetic" not in text
    assert fetched(double, tmp_path, series="1.8")[0] == "1.8"


def test_a_study_of_many_pages_is_listed_whole(double, tmp_path):
    for number in range(430):
        double.series[STUDY, f"1.9.{number}"] = double.series[STUDY, SERIES][:1]
    double.series[STUDY, SERIES] = double.series.pop((STUDY, SERIES))  # the last one
    assert fetched(double, tmp_path, series=SERIES)[0] == SERIES
    assert double.requests["series"] == 4


def test_a_study_without_a_volume_is_refused(double, tmp_path):
    del double.series[STUDY, SERIES][3:]
    with pytest.raises(DicomWebError, match=r"no CT or MR series of 4 slices or more"):
        fetched(double, tmp_path)


def test_a_wrong_login_is_told_at_once_and_not_quoted(double, tmp_path):
    with pytest.raises(DicomWebError, match=r"pacs refuses the login \(HTTP status 401\)") as error:
        fetched(double, tmp_path, login="Basic topsecret")
    assert "topsecret" not in str(error.value)
    assert double.requests["series"] == 1


def test_a_busy_server_is_asked_again(double, tmp_path):
    double.faults["series"] = [status(503), status(429, **{"Retry-After": "1"})]
    double.faults["retrieve"] = [status(502)]
    began = time.monotonic()
    assert len(fetched(double, tmp_path)[1]) == 5
    assert time.monotonic() - began >= 1
    assert (double.requests["series"], double.requests["retrieve"]) == (4, 2)


def test_a_server_that_stays_busy_is_given_up(double, tmp_path):
    double.faults["series"] = [status(503)] * 10
    with pytest.raises(DicomWebError, match="HTTP status 503"):
        fetched(double, tmp_path)
    assert double.requests["series"] == dicomweb.TRIES


def truncated(double, *, closed):
    """A fault: an answer that ends in an instance."""

    async def answer(request):
        files = double.series[STUDY, SERIES]
        if not closed:
            return await multipart(request, [*files[:2], files[2][:100]], whole=False)
        response = web.StreamResponse()
        response.headers["Content-Type"] = f"multipart/related; boundary={BOUNDARY}"
        await response.prepare(request)
        await response.write(f"--{BOUNDARY}\r\n\r\n".encode() + files[0][:100])
        request.transport.close()
        return response

    return answer


@pytest.mark.parametrize("closed", [False, True])
def test_a_broken_answer_is_fetched_again(double, tmp_path, closed):
    double.faults["retrieve"] = [truncated(double, closed=closed)]
    assert fetched(double, tmp_path)[1] == double.series[STUDY, SERIES]


def test_an_answer_that_stays_broken_is_refused(double, tmp_path):
    double.faults["retrieve"] = [truncated(double, closed=False)] * 10
    with pytest.raises(DicomWebError, match="broke off the series after"):
        fetched(double, tmp_path)


def test_another_content_type_is_refused(double, tmp_path):
    async def page(request):
        return web.Response(text="<html>", content_type="text/html")

    double.faults["retrieve"] = [page]
    with pytest.raises(DicomWebError, match="something else than multipart/related"):
        fetched(double, tmp_path)


def test_certificates_are_verified(double, tmp_path, monkeypatch):
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs openssl for a certificate")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    own = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    own.load_cert_chain(certificate, key)
    with pytest.raises(DicomWebError, match="no safe connection to pacs"):
        fetched(double, tmp_path, certificate=own)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert len(fetched(double, tmp_path, certificate=own)[1]) == 5


@pytest.mark.parametrize("service", ["series", "retrieve"])
def test_redirects_are_not_followed(double, tmp_path, service):
    other = Double()

    async def work(studies, storage):
        async with TestServer(other.app()) as elsewhere:
            where = str(elsewhere.make_url(f"{ROOT}/studies/1/series"))
            double.faults[service] = [status(307, Location=where)]
            await studies.fetch(order(), storage.new_folder(), lambda event: None)

    with pytest.raises(DicomWebError, match="redirect"):
        with_studies(double, tmp_path, work)
    assert not other.requests


async def endless(request):
    response = web.StreamResponse()
    response.headers["Content-Type"] = f"multipart/related; boundary={BOUNDARY}"
    await response.prepare(request)
    await response.write(f"--{BOUNDARY}\r\n\r\n".encode())
    while True:
        await response.write(b"0" * 10_000)


def test_an_endless_series_is_broken_off(double, tmp_path):
    double.faults["retrieve"] = [endless]
    with pytest.raises(DicomWebError, match=r"larger than 100000 bytes.*--max-upload"):
        fetched(double, tmp_path, series_bytes=100_000)
    double.faults["retrieve"] = [endless]
    with pytest.raises(FullError, match="--max-storage"):
        fetched(double, tmp_path, limit=100_000)
    written = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert all(path.stat().st_size <= 100_000 for path in written)


def test_a_series_of_endless_instances_is_broken_off(double, tmp_path, monkeypatch):
    monkeypatch.setattr(dicomweb_fetch, "MOST_INSTANCES", 20)

    async def tiny(request):
        return await multipart(request, [b""] * 1000)

    double.faults["retrieve"] = [tiny]
    with pytest.raises(DicomWebError, match="more than 20 instances"):
        fetched(double, tmp_path)
    assert len([path for path in (tmp_path / "runs").rglob("*.dcm")]) == 20


async def stalled(request):
    response = web.StreamResponse()
    response.headers["Content-Type"] = f"multipart/related; boundary={BOUNDARY}"
    await response.prepare(request)
    await response.write(f"--{BOUNDARY}\r\n\r\n1234".encode())
    await asyncio.sleep(60)
    return response


def test_a_server_that_sends_nothing_is_given_up(double, tmp_path):
    double.faults["retrieve"] = [stalled] * dicomweb.TRIES
    with pytest.raises(DicomWebError, match="does not answer, or stopped sending"):
        fetched(double, tmp_path)


def test_a_fetch_that_stalls_can_be_cancelled(double, tmp_path, monkeypatch):
    monkeypatch.setattr(dicomweb, "STALL_S", 60)
    double.faults["retrieve"] = [stalled]

    async def work(studies, storage):
        fetch = studies.fetch(order(), storage.new_folder(), lambda event: None)
        task = asyncio.ensure_future(fetch)
        while not double.requests["retrieve"]:
            await asyncio.sleep(0.01)
        task.cancel()
        began = time.monotonic()
        with pytest.raises(asyncio.CancelledError):
            await task
        return time.monotonic() - began

    assert with_studies(double, tmp_path, work) < 1


def test_what_is_no_dicom_or_another_series_is_refused(double, tmp_path):
    async def text(request):
        return await multipart(request, [b"text"] * 5)

    async def other(request):
        files = write_series(tmp_path / "other", VOXELS, SeriesInstanceUID="1.5")
        return await multipart(request, [path.read_bytes() for path in files.iterdir()])

    double.faults["retrieve"] = [text]
    with pytest.raises(DicomWebError, match="is no DICOM file"):
        fetched(double, tmp_path)
    double.faults["retrieve"] = [other]
    with pytest.raises(DicomWebError, match="another series"):
        fetched(double, tmp_path)


def test_a_series_that_is_still_arriving_is_refused(double, tmp_path):
    async def fewer(request):
        files = double.series[STUDY, SERIES]
        return await multipart(request, [*files[:4], files[0]])

    double.faults["retrieve"] = [fewer]
    with pytest.raises(DicomWebError, match="lists 5 instances of the series and sends 4"):
        fetched(double, tmp_path)


def test_a_server_that_knows_no_transfer_syntax_is_asked_without(double, tmp_path):
    double.faults["retrieve"] = [status(406)]
    assert len(fetched(double, tmp_path)[1]) == 5
    assert "transfer-syntax" not in double.headers["retrieve"][1]["Accept"]


@pytest.mark.parametrize("body", [b"", b"<xml>", b"{}", b"[1]", b"[" * 100_000])
def test_malformed_lists_are_refused(double, tmp_path, body):
    async def answer(request):
        return web.Response(body=body, content_type="application/dicom+json")

    double.faults["series"] = [answer]
    with pytest.raises(DicomWebError, match="answers a query without"):
        fetched(double, tmp_path)


def pushed(double, tmp_path, count=2):
    """Store instances of a run; return what was stored."""

    async def work(studies, storage):
        try:
            return await studies.push(order(push="pacs"), tmp_path / "result")
        finally:
            assert studies.failures["push"] == (studies.counts["stored_instances"] == 0)

    write_series(tmp_path / "result", VOXELS[:count])
    return with_studies(double, tmp_path, work)


def uids(tmp_path):
    return [read_instance(path).uid for path in sorted((tmp_path / "result").iterdir())]


def test_results_are_stored_byte_by_byte(double, tmp_path):
    stored = pushed(double, tmp_path)
    assert [each["instance"] for each in stored["instances"]] == uids(tmp_path)
    assert {each["series"] for each in stored["instances"]} == {SERIES}
    files = [path.read_bytes() for path in sorted((tmp_path / "result").iterdir())]
    assert list(double.stored.values()) == files
    assert 'type="application/dicom"' in double.headers["store"][0]["Content-Type"]


def test_a_store_is_tried_again(double, tmp_path):
    double.faults["store"] = [status(503), status(504)]
    assert len(pushed(double, tmp_path)["instances"]) == 2
    assert double.requests["store"] == 3


def test_instances_that_are_not_stored_are_named(double, tmp_path):
    async def partly(request):
        first, second = uids(tmp_path)
        return store_answer([first], [(second, 0xA700)], status=202)

    double.faults["store"] = [partly]
    with pytest.raises(DicomWebError, match="has not stored 1 of 2 instances") as error:
        pushed(double, tmp_path)
    assert f"{uids(tmp_path)[1]} (reason 0xA700)" in str(error.value)
    assert uids(tmp_path)[0] not in str(error.value)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (web.Response, "does not tell what it has stored"),
        (lambda: web.json_response({}), "has not stored 2 of 2"),
        (lambda: web.json_response({"00081199": {"Value": [5]}}), "has not stored 2 of 2"),
        (lambda: web.Response(status=409, text="{}"), "has not stored 2 of 2"),
        (lambda: web.Response(status=400), r"does not store the result \(HTTP status 400\)"),
        (lambda: web.Response(status=403), "refuses the login"),
    ],
)
def test_a_result_counts_as_stored_only_if_the_server_confirms_it(
    double, tmp_path, answer, message
):
    async def fault(request):
        return answer()

    double.faults["store"] = [fault]
    with pytest.raises(DicomWebError, match=message):
        pushed(double, tmp_path)
    assert double.requests["store"] == 1


def test_duplicates_are_stored_only_after_a_try_whose_answer_was_lost(double, tmp_path):
    async def duplicates(request):
        return store_answer([], [(uid, 0x0111) for uid in uids(tmp_path)], status=409)

    double.faults["store"] = [duplicates]
    with pytest.raises(DicomWebError, match="0x0111"):
        pushed(double, tmp_path)
    double.faults["store"] = [status(504), duplicates]
    assert len(pushed(double, tmp_path)["instances"]) == 2


def test_orders_name_known_servers_and_valid_uids():
    pacs = DicomWebServer(name="pacs", url="http://127.0.0.1:9")
    studies = Studies(None, {"pacs": pacs}, storage=None, series_bytes=0)
    good = {"dicomweb": "pacs", "study": STUDY}
    assert studies.order(good) == order()
    assert studies.order({**good, "series": SERIES, "push": True}) == order(SERIES, "pacs")
    assert studies.order({**good, "push": False}) == order()
    for wrong in (
        {"dicomweb": "other"},
        {"dicomweb": ["pacs"]},
        {"push": "other"},
        {"push": 1},
        {"push": ""},
        {"study": ""},
        {"study": "1.2/"},
        {"study": None},
        {"series": "1..2"},
        {"url": "http://127.0.0.1"},
    ):
        with pytest.raises(OptionError):
            studies.order({**good, **wrong})


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ("1.2.840.10008", True),
        ("1" * 64, True),
        ("1" * 65, False),
        ("", False),
        ("1.", False),
        (".1", False),
        ("1..2", False),
        ("1.2\n", False),
        ("1.2/../3", False),
        ("١.٢", False),
    ],
)
def test_uids_are_numbers_with_dots(text, valid):
    assert is_uid(text) == valid
