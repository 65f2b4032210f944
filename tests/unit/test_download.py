"""Downloads from a server on this machine that breaks off, stalls, lies and changes its mind."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import mmap
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import timeit
import warnings
import zipfile
from dataclasses import replace

import numpy as np
import pytest

from tests.weights_server import (
    MODEL,
    broken_after,
    model_files,
    serve,
    silent_after,
    status,
    whole,
    zipped,
)
from totalfast import LicenseError, WeightsError, upstream
from totalfast.models.weights import ensure_model, find_model
from totalfast.weights import connection, install, manifest, transfer, unpack
from totalfast.weights.condition import Condition, inspect
from totalfast.weights.install import download, import_zip

FILES = model_files()
ZIP = zipped(FILES)
ETAG = {"ETag": '"one"'}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """An empty folder for weights, no proxy, and short times."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("TOTALFAST_OFFLINE", raising=False)
    monkeypatch.setenv("TOTALSEG_WEIGHTS_PATH", str(tmp_path / "home"))
    monkeypatch.setenv("TOTALFAST_DOWNLOAD_STALL_S", "1")
    monkeypatch.setattr(transfer, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(install, "AT_REST_S", 0.0)
    return tmp_path / "home"


@pytest.fixture
def mirror(monkeypatch):
    return lambda server: monkeypatch.setenv("TOTALFAST_WEIGHTS_MIRROR", server.url)


def content_of(folder):
    return {
        path.relative_to(folder.parent).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != manifest.MANIFEST_NAME
    }


def left_in_workshop(home):
    return sorted(p.name for p in (home / ".totalfast").iterdir() if p.suffix != ".lock")


def write(home, files):
    for name, content in files.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_bytes(content)


# ------------------------------------------------------------------------------------ requests


class Asked(Exception):
    pass


@pytest.mark.parametrize("model_id", [k for k in upstream.TASK_ID_WEIGHTS_CONFIGS])
def test_request_of_each_model_equals_upstreams(model_id, tmp_path, monkeypatch):
    import requests
    from totalsegmentator.libs import download_pretrained_weights

    monkeypatch.setenv("TOTALSEG_HOME_DIR", str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"license_number": "a" * 18}))
    asked = []

    def stop(url, *, json=None, **_):
        asked.append((url, json))
        raise Asked

    monkeypatch.setattr(requests, "get", stop)
    monkeypatch.setattr(requests, "post", stop)
    with pytest.raises(Asked):
        download_pretrained_weights(model_id)
    own = upstream.weights_request(model_id)
    if own is None:
        assert asked == [("TODO", None)]
    else:
        assert asked == [(own.url, own.body)]
        assert upstream.is_licensed_model(model_id) == (own.body is not None)
        assert "aaa" not in repr(own)


def test_licensed_model_is_asked_for_with_the_stored_number(tmp_path, monkeypatch):
    model = replace(MODEL, model_id=301)
    files = {k.replace(MODEL.dataset.name, model.dataset.name): v for k, v in FILES.items()}
    monkeypatch.setenv("TOTALSEG_HOME_DIR", str(tmp_path))
    with serve(whole(zipped(files), **ETAG)) as server:
        monkeypatch.setattr(upstream, "LICENSE_SERVER_URL", f"{server.url}/download_weights")
        with pytest.raises(LicenseError, match="needs a TotalSegmentator licence"):
            download(model, quiet=True)
        (tmp_path / "config.json").write_text(json.dumps({"license_number": "a" * 18}))
        assert download(model, quiet=True)
    assert server.requests[0][:2] == ("POST", "/download_weights")
    assert server.bodies[0] == {
        "license_number": "a" * 18,
        "task": "heartchambers_highres",
        "version": upstream.version(),
    }
    assert content_of(model.dataset) == files
    assert "aaa" not in (model.dataset / manifest.MANIFEST_NAME).read_text()


def test_refusal_of_the_licence_server_does_not_show_the_number(tmp_path, monkeypatch):
    monkeypatch.setenv("TOTALSEG_HOME_DIR", str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"license_number": "a" * 18}))
    with serve(status(403)) as server:
        monkeypatch.setattr(upstream, "LICENSE_SERVER_URL", server.url)
        with pytest.raises(WeightsError, match="403") as raised:
            download(replace(MODEL, model_id=301), quiet=True)
    assert "aaa" not in str(raised.value)
    assert len(server.requests) == 1


def test_models_without_a_url_are_an_error():
    with pytest.raises(WeightsError, match="offers no download of model 955"):
        download(replace(MODEL, model_id=955), quiet=True)


# ------------------------------------------------------------------------------ a good download


def test_model_is_downloaded_unpacked_and_found(home, mirror, capsys):
    with serve(whole(ZIP)) as server:
        mirror(server)
        folder = ensure_model(MODEL, quiet=True)
        assert ensure_model(MODEL, quiet=True) == find_model(MODEL) == folder
    assert [path for _, path, _ in server.requests] == [f"/v2.0.0-weights/{MODEL.dataset.name}.zip"]
    assert content_of(MODEL.dataset) == FILES
    assert left_in_workshop(home) == []
    recorded = manifest.read_manifest(MODEL.dataset)
    assert recorded.source == f"{server.url}/v2.0.0-weights/{MODEL.dataset.name}.zip"
    assert recorded.folds == {MODEL.folder_name: ["fold_0"]}
    assert manifest.find_damage(MODEL.dataset, recorded) == []
    assert capsys.readouterr() == ("", "")


def test_bar_is_shown_unless_quiet(mirror, capsys):
    with serve(whole(ZIP)) as server:
        mirror(server)
        download(MODEL, quiet=False)
    assert "Downloading model 297" in capsys.readouterr().err


def test_chunked_answer_without_a_length_is_accepted(mirror):
    def chunked(handler):
        handler.close_connection = True
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for at in range(0, len(ZIP), 100_000):
            part = ZIP[at : at + 100_000]
            handler.wfile.write(b"%x\r\n%b\r\n" % (len(part), part))
        handler.wfile.write(b"0\r\n\r\n")

    with serve(chunked) as server:
        mirror(server)
        assert download(MODEL, quiet=True)
    assert content_of(MODEL.dataset) == FILES


def test_download_goes_through_the_proxy_of_the_environment(monkeypatch):
    monkeypatch.setenv("TOTALFAST_WEIGHTS_MIRROR", "http://models.invalid/tree")
    monkeypatch.setenv("NO_PROXY", "")
    with serve(whole(ZIP)) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        assert download(MODEL, quiet=True)
    assert [path for _, path, _ in proxy.requests] == [
        f"http://models.invalid/tree/v2.0.0-weights/{MODEL.dataset.name}.zip"
    ]


def test_proxy_that_does_not_answer_is_named_as_the_cause(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    with pytest.raises(WeightsError, match=r"the proxy gives no connection \(Failed to est"):
        download(MODEL, quiet=True)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://127.0.0.1:9", r"no connection \(Failed to establish a new connection"),
        ("file:///folder", "is no http or https address"),
        ("user:secret@folder", "is no http or https address"),
    ],
)
def test_unreachable_server_is_one_line(url, reason, monkeypatch):
    monkeypatch.setenv("TOTALFAST_WEIGHTS_MIRROR", url)
    with pytest.raises(WeightsError, match=reason) as raised:
        ensure_model(MODEL, quiet=True)
    assert "\n" not in str(raised.value)
    assert " object at " not in str(raised.value)


def test_certificate_that_is_not_accepted_is_not_tried_again(monkeypatch):
    with serve(whole(ZIP)) as server:
        monkeypatch.setenv("TOTALFAST_WEIGHTS_MIRROR", server.url.replace("http:", "https:"))
        monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("tried again"))
        with pytest.raises(WeightsError, match="REQUESTS_CA_BUNDLE"):
            download(MODEL, quiet=True)


def test_credentials_in_the_mirrors_url_are_not_shown(mirror, monkeypatch):
    with serve(status(404)) as server:
        address = server.url.removeprefix("http://")
        monkeypatch.setenv("TOTALFAST_WEIGHTS_MIRROR", f"http://user:secret@{address}")
        with pytest.raises(WeightsError, match=f"from http://{address}/v2") as raised:
            download(MODEL, quiet=True)
    assert "secret" not in str(raised.value)


# --------------------------------------------------------------------------- broken connections


@pytest.mark.parametrize("validator", [ETAG, {"Last-Modified": "Fri, 01 May 2026 10:00:00 GMT"}])
def test_broken_download_is_continued(mirror, validator):
    with serve(broken_after(300_000, ZIP, **validator), whole(ZIP, **validator)) as server:
        mirror(server)
        assert download(MODEL, quiet=True)
    assert [headers.get("Range") for _, _, headers in server.requests] == [None, "bytes=299999-"]
    assert {headers["Accept-Encoding"] for _, _, headers in server.requests} == {"identity"}
    assert server.requests[1][2]["If-Range"] in validator.values()
    assert content_of(MODEL.dataset) == FILES


def test_next_run_continues_the_download_of_a_failed_one(home, mirror):
    with serve(broken_after(300_000, ZIP, **ETAG), status(404), whole(ZIP, **ETAG)) as server:
        mirror(server)
        with pytest.raises(WeightsError, match="404"):
            download(MODEL, quiet=True)
        assert left_in_workshop(home) == ["model-297.zip.part", "model-297.zip.part.json"]
        assert download(MODEL, quiet=True)
    assert server.requests[2][2]["Range"] == "bytes=299999-"
    assert content_of(MODEL.dataset) == FILES
    assert left_in_workshop(home) == []


def test_complete_download_of_a_killed_run_is_only_compared_with_the_server(home, mirror):
    with serve(whole(ZIP, **ETAG)) as server:
        mirror(server)
        url = f"{server.url}/v2.0.0-weights/{MODEL.dataset.name}.zip"
        facts = {"url": url, "validator": '"one"', "total": len(ZIP)}
        write(
            home / ".totalfast",
            {"model-297.zip.part": ZIP, "model-297.zip.part.json": json.dumps(facts).encode()},
        )
        assert download(MODEL, quiet=True)
    assert server.requests[0][2]["Range"] == f"bytes={len(ZIP) - 1}-"
    assert content_of(MODEL.dataset) == FILES


def test_file_that_changed_meanwhile_is_downloaded_anew(mirror):
    other = zipped(model_files(checkpoint=b"other weights" * 50_000))
    with serve(broken_after(300_000, ZIP, **ETAG), whole(other, ETag='"two"')) as server:
        mirror(server)
        assert download(MODEL, quiet=True)
    assert content_of(MODEL.dataset) == model_files(checkpoint=b"other weights" * 50_000)


def test_rest_of_another_file_is_not_appended(mirror):
    """A server that does not know If-Range sends the rest of a changed file."""
    other = zipped(model_files(checkpoint=bytes(512_000)))
    assert len(other) == len(ZIP)

    def rest(handler):
        place = f"bytes 299999-{len(other) - 1}/{len(other)}"
        handler.send(other[299_999:], status=206, Content_Range=place, ETag='"two"')

    with serve(broken_after(300_000, ZIP, **ETAG), rest, whole(other, ETag='"two"')) as server:
        mirror(server)
        assert download(MODEL, quiet=True)
    assert content_of(MODEL.dataset) == model_files(checkpoint=bytes(512_000))
    assert "Range" not in server.requests[2][2]


def test_other_range_than_the_one_asked_for_is_not_appended(mirror):
    def other_range(handler):
        place = f"bytes 299000-{len(ZIP) - 1}/{len(ZIP)}"
        handler.send(ZIP[299_000:], status=206, Content_Range=place, **ETAG)

    with serve(broken_after(300_000, ZIP, **ETAG), other_range, whole(ZIP, **ETAG)) as server:
        mirror(server)
        assert download(MODEL, quiet=True)
    assert len(server.requests) == 3
    assert "Range" not in server.requests[2][2]
    assert content_of(MODEL.dataset) == FILES


def test_range_that_the_server_refuses_is_downloaded_anew(mirror):
    with serve(broken_after(300_000, ZIP, **ETAG), status(416), whole(ZIP, **ETAG)) as server:
        mirror(server)
        assert download(MODEL, quiet=True)
    assert "Range" not in server.requests[2][2]


def test_parts_that_do_not_fit_in_spite_of_equal_etags_are_downloaded_anew(home, mirror):
    other = zipped(model_files(checkpoint=bytes(512_000)))
    with serve(
        broken_after(300_000, ZIP, **ETAG), status(404), whole(other, **ETAG), whole(other, **ETAG)
    ) as server:
        mirror(server)
        with pytest.raises(WeightsError):
            download(MODEL, quiet=True)
        assert download(MODEL, quiet=True)
    assert content_of(MODEL.dataset) == model_files(checkpoint=bytes(512_000))


def test_download_that_always_breaks_off_is_given_up_and_leaves_nothing(home, mirror):
    with serve(broken_after(1000, ZIP)) as server:
        mirror(server)
        with pytest.raises(WeightsError, match="the download of model 297 .* broke off") as raised:
            ensure_model(MODEL, quiet=True)
        assert len(server.requests) == transfer.TRIES
    assert "\n" not in str(raised.value)
    assert "totalfast weights import" in str(raised.value)
    assert left_in_workshop(home) == []
    assert not MODEL.dataset.exists()


def test_download_goes_on_as_long_as_it_makes_progress(mirror):
    content = zipped(model_files(checkpoint=os.urandom(1_500_000)))

    def piece(handler):
        start = int(handler.headers.get("Range", "bytes=0-")[6:-1])
        end = start + 150_000
        if start:
            handler.send(
                content[start:end],
                length=len(content) - start,
                status=206,
                Content_Range=f"bytes {start}-{len(content) - 1}/{len(content)}",
                **ETAG,
            )
        else:
            handler.send(content[:end], length=len(content), **ETAG)

    with serve(piece) as server:
        mirror(server)
        assert download(MODEL, quiet=True)
    assert len(server.requests) > 2 * transfer.TRIES


@pytest.mark.parametrize(("headers", "kept"), [({}, False), (ETAG, True)])
def test_interrupted_download_keeps_only_what_can_be_continued(
    headers, kept, home, mirror, monkeypatch
):
    def interrupted(self, response, stream, bar):
        stream.write(self.read(response))
        raise KeyboardInterrupt

    with serve(whole(ZIP, **headers)) as server:
        mirror(server)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(connection.Connection, "copy", interrupted)
            with pytest.raises(KeyboardInterrupt):
                download(MODEL, quiet=True)
        assert bool(left_in_workshop(home)) is kept
        assert download(MODEL, quiet=True)
        assert ("Range" in server.requests[1][2]) is kept
    assert content_of(MODEL.dataset) == FILES


def test_busy_server_is_asked_again_and_a_refusal_is_not(mirror):
    with serve(status(503), status(500), whole(ZIP)) as server:
        mirror(server)
        assert download(MODEL, quiet=True)
    with serve(status(404)) as server:
        mirror(server)
        with pytest.raises(WeightsError, match="HTTP status 404 Not Found"):
            download(MODEL, quiet=True, force=True)
    assert len(server.requests) == 1


# ----------------------------------------------------------------------------------- stalls, lies


def trickle(handler):
    handler.send(ZIP[:4], length=len(ZIP))
    for at in range(4, 400):
        handler.wfile.write(ZIP[at : at + 1])
        if handler.server.ended.wait(0.1):
            return


@pytest.mark.parametrize(
    "answer",
    [silent_after(0, ZIP), silent_after(300, ZIP), lambda h: h.server.ended.wait(30), trickle],
    ids=["no body", "some bytes", "no answer", "a byte now and then"],
)
def test_silent_server_is_given_up(answer, mirror, monkeypatch):
    monkeypatch.setenv("TOTALFAST_DOWNLOAD_STALL_S", "0.4")
    with serve(answer) as server:
        mirror(server)
        began = time.monotonic()
        with pytest.raises(WeightsError, match=r"0\.4 s \(timeout\)"):
            download(MODEL, quiet=True)
        assert time.monotonic() - began < 5  # twice the stall time, and a pause
    assert not MODEL.dataset.exists()


def test_default_stall_time_ends_a_silent_download_within_90_s(monkeypatch):
    monkeypatch.delenv("TOTALFAST_DOWNLOAD_STALL_S")
    longest = transfer.PATIENCE * transfer.STALL_S + transfer.LONGEST_PAUSE_S
    assert longest + connection.CONNECT_S < 90


def test_wrong_stall_time_is_an_option_error(monkeypatch):
    for value in ("x", "0", "-1", "nan", "inf"):
        monkeypatch.setenv("TOTALFAST_DOWNLOAD_STALL_S", value)
        with pytest.raises(ValueError, match="must be a number of seconds above 0"):
            download(MODEL, quiet=True)


def test_length_that_is_too_small_is_found_out_by_the_zip_file(mirror):
    with serve(lambda handler: handler.send(ZIP, length=len(ZIP) - 3000)) as server:
        mirror(server)
        with pytest.raises(WeightsError, match="the downloaded zip file .* is no zip file, or is"):
            download(MODEL, quiet=True)
    assert not MODEL.dataset.exists()


@pytest.mark.parametrize("kind", ["text/html; charset=utf-8", "application/zip"])
def test_web_page_is_explained(kind, mirror):
    page = b"<!DOCTYPE html><html><title>Please log in</title></html>"
    with serve(lambda handler: handler.send(page, Content_Type=kind)) as server:
        mirror(server)
        with pytest.raises(WeightsError, match="a web page came instead of a zip file"):
            download(MODEL, quiet=True)
    assert len(server.requests) == 1


def test_other_content_is_explained(mirror):
    with serve(whole(b"\x1f\x8b" + bytes(100))) as server:
        mirror(server)
        with pytest.raises(WeightsError, match="what came is no zip file"):
            download(MODEL, quiet=True)


def test_full_disk_is_found_out_before_the_download(home, mirror, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with serve(whole(ZIP)) as server:
        mirror(server)
        with pytest.raises(WeightsError, match=r"needs 1 MB, zip file and content, but .* 0 MB"):
            download(MODEL, quiet=True)
    assert left_in_workshop(home) == []


def test_folder_that_cannot_be_written_is_an_error(home, mirror):
    home.parent.mkdir(exist_ok=True)
    home.write_text("a file")
    with serve(whole(ZIP)) as server:
        mirror(server)
        with pytest.raises(WeightsError, match="can't be written"):
            download(MODEL, quiet=True)
    assert server.requests == []


# ------------------------------------------------------------------------------------- zip files


def unusual(name, *, mode=stat.S_IFREG, flags=0, method=zipfile.ZIP_STORED):
    """The model's zip file with one more entry."""
    target = io.BytesIO(ZIP)
    with zipfile.ZipFile(target, "a") as zip_file, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # duplicate names
        entry = zipfile.ZipInfo(name)
        entry.external_attr, entry.compress_type = mode << 16, method
        zip_file.writestr(entry, b"content")
        zip_file.infolist()[-1].flag_bits |= flags
    return target.getvalue()


TOP = MODEL.dataset.name


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (unusual("../evil"), "leads out of the folder"),
        (unusual(f"{TOP}/../../evil"), "leads out of the folder"),
        (unusual("/evil"), "is absolute"),
        (unusual("C:/evil"), "is absolute"),
        (unusual(f"{TOP}\\..\\evil"), "leads out of the folder"),
        (unusual(f"{TOP}/link", mode=stat.S_IFLNK), "it is a link"),
        (unusual(f"{TOP}/pipe", mode=stat.S_IFIFO), "it is a link or a device"),
        (unusual(f"{TOP}/x", flags=1), "it is encrypted"),
        (unusual(f"{TOP}/x", method=zipfile.ZIP_LZMA), "kind of compression"),
        (unusual(next(iter(FILES))), "it is there twice"),
    ],
)
def test_unsafe_zip_file_is_refused_and_leaves_nothing(content, reason, home, mirror, tmp_path):
    with serve(whole(content)) as server:
        mirror(server)
        with pytest.raises(WeightsError, match=reason):
            download(MODEL, quiet=True)
    assert left_in_workshop(home) == []
    assert sorted(path.name for path in home.iterdir()) == [".totalfast"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home"]


def test_zip_bomb_is_refused_and_a_zip_file_of_many_zeros_is_not(home, tmp_path, monkeypatch):
    monkeypatch.setattr(unpack, "ALWAYS_ALLOWED", 1 << 20)
    files = {f"{TOP}/zeros.bin": bytes(20 << 20), **model_files(checkpoint=b"weights")}
    archive = tmp_path / "model.zip"
    archive.write_bytes(zipped(files, method=zipfile.ZIP_DEFLATED, level=9))
    with pytest.raises(WeightsError, match="a zip bomb"):
        import_zip(MODEL, archive)
    assert left_in_workshop(home) == []
    archive.write_bytes(zipped(files, method=zipfile.ZIP_DEFLATED, level=1))
    assert archive.stat().st_size > (20 << 20) / 300
    assert import_zip(MODEL, archive)


def test_overlapping_entries_are_refused(tmp_path):
    archive = tmp_path / "model.zip"
    archive.write_bytes(ZIP)
    entries = zipfile.ZipFile(archive).infolist() * 2
    with pytest.raises(WeightsError, match="entries overlap"):
        unpack._check_size(entries, archive, tmp_path, "the zip file")


def test_zip_file_of_another_model_or_without_a_checkpoint_is_refused(mirror):
    other = {name.replace(TOP, "Dataset298_x"): content for name, content in FILES.items()}
    with serve(whole(zipped(other)), whole(zipped(model_files(folds=())))) as server:
        mirror(server)
        with pytest.raises(WeightsError, match=f"holds Dataset298_x, not {TOP}"):
            download(MODEL, quiet=True)
        with pytest.raises(WeightsError, match=r"no fold_0/checkpoint_final\.pth"):
            download(MODEL, quiet=True)
    assert not MODEL.dataset.exists()


def test_zip_file_with_a_dot_before_its_names_is_unpacked(tmp_path):
    archive = tmp_path / "model.zip"
    archive.write_bytes(zipped({"./": b"", **{f"./{k}": v for k, v in FILES.items()}}))
    assert import_zip(MODEL, archive)
    assert content_of(MODEL.dataset) == FILES


def test_any_changed_byte_of_a_zip_file_is_refused_or_does_not_matter(home, tmp_path):
    """Damages the names, sizes, checksums, flags and the table of contents."""
    files = model_files(checkpoint=b"weights" * 10)
    content = zipped(files, method=zipfile.ZIP_DEFLATED)
    archive = tmp_path / "model.zip"
    random, refused = np.random.default_rng(0), 0
    for _ in range(150):
        damaged = bytearray(content)
        for at in random.integers(0, len(content), random.integers(1, 4)):
            damaged[at] = random.integers(0, 256)
        archive.write_bytes(damaged)
        try:
            import_zip(MODEL, archive, force=True)
        except WeightsError:
            refused += 1
        else:
            assert content_of(MODEL.dataset) == files
    assert refused > 75
    assert {path.name for path in home.iterdir()} <= {".totalfast", TOP}


def test_damaged_zip_file_is_refused(mirror):
    damaged = bytearray(ZIP)
    damaged[200_000] ^= 1
    with serve(whole(bytes(damaged))) as server:
        mirror(server)
        with pytest.raises(WeightsError, match="is damaged: .*checkpoint_final"):
            download(MODEL, quiet=True)
    assert len(server.requests) == 1


# --------------------------------------------------------------------------- several processes

SCRIPT = """
import logging, sys
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
from tests.weights_server import MODEL
from totalfast.models.weights import ensure_model
ensure_model(MODEL, quiet=True)
"""


def start():
    return subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, text=True)


def test_processes_at_once_download_once_and_the_others_wait(mirror, monkeypatch):
    go_on = threading.Event()

    def slow(handler):
        handler.send(ZIP[:1000], length=len(ZIP))
        go_on.wait(30)
        handler.wfile.write(ZIP[1000:])

    monkeypatch.setenv("TOTALFAST_DOWNLOAD_STALL_S", "30")
    with serve(slow) as server:
        mirror(server)
        processes = [start()]
        while not server.requests and processes[0].poll() is None:
            time.sleep(0.01)
        processes += [start(), start()]
        for process in processes[1:]:
            line = process.stdout.readline()
            assert line == "waiting for another process that downloads model 297\n"
        go_on.set()
        for process in processes:
            process.communicate(timeout=60)
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len(server.requests) == 1
    assert content_of(MODEL.dataset) == FILES


def test_process_killed_while_unpacking_leaves_nothing_in_the_way(home, mirror):
    zeros = {f"{TOP}/zeros.bin": bytes(400 << 20)}
    big = zipped({**zeros, **FILES}, method=zipfile.ZIP_DEFLATED, level=1)
    with serve(whole(big), whole(ZIP)) as server:
        mirror(server)
        process = start()
        while not any(home.rglob("zeros.bin")) and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert any(home.rglob("zeros.bin"))
        assert not MODEL.dataset.exists()
        assert inspect(MODEL).condition is Condition.MISSING
        assert download(MODEL, quiet=True)
    assert content_of(MODEL.dataset) == FILES
    assert left_in_workshop(home) == []


# --------------------------------------------------------------------- what was there before


CUT_ZIP = b"PK" + bytes(1000)
"""The beginning of a checkpoint."""


@pytest.mark.parametrize(
    "damage",
    [
        {"fold_0/checkpoint_final.pth": None},
        {"plans.json": None},
        {"plans.json": b'{"a'},
        {"dataset.json": b""},
        {"fold_0/checkpoint_final.pth": "cut"},
    ],
)
def test_half_unpacked_model_is_repaired(damage, home, mirror):
    checkpoint = zipped({"archive/data.pkl": bytes(300_000)})
    files = model_files(checkpoint=checkpoint)
    write(home, files)
    for name, content in damage.items():
        (MODEL.folder / name).unlink()
        if content is not None:
            content = checkpoint[:100_000] if content == "cut" else content
            (MODEL.folder / name).write_bytes(content)
    with pytest.raises(WeightsError, match=r"is incomplete \(.*'totalfast weights download 297'"):
        find_model(MODEL)
    with serve(whole(zipped(files))) as server:
        mirror(server)
        assert ensure_model(MODEL, quiet=True) == MODEL.folder
    assert content_of(MODEL.dataset) == files
    assert left_in_workshop(home) == []


def test_folder_that_another_program_fills_is_waited_for(home, monkeypatch):
    monkeypatch.setattr(install, "AT_REST_S", 10.0)
    plans, *rest = FILES.items()
    write(home, dict([plans]))

    def fill(seconds):
        write(home, dict(rest))

    monkeypatch.setattr(install.time, "sleep", fill)
    monkeypatch.setenv("TOTALFAST_WEIGHTS_MIRROR", "http://127.0.0.1:9")
    assert ensure_model(MODEL, quiet=True) == MODEL.folder


def test_other_models_in_an_incomplete_folder_stay_in_it(home, mirror):
    write(home, dict([next(iter(FILES.items()))]))
    own = MODEL.dataset / "mine__plans__3d_fullres"
    write(own, {"plans.json": b"{}", "fold_0/checkpoint_final.pth": b"my weights"})
    with serve(whole(ZIP)) as server:
        mirror(server)
        ensure_model(MODEL, quiet=True)
    assert find_model(MODEL)
    assert (own / "fold_0/checkpoint_final.pth").read_bytes() == b"my weights"
    assert left_in_workshop(home) == []


class Failing:
    """Raises an error at one of the calls that change folders, and counts them."""

    def __init__(self, patch, error, at):
        self.count, self._error, self._at = 0, error, at
        for name in ("mkdir", "rename", "replace", "fsync"):
            patch.setattr(os, name, self._wrap(getattr(os, name)))

    def _wrap(self, call):
        def wrapped(*arguments, **keywords):
            self.count += 1
            if self.count == self._at:
                raise self._error
            return call(*arguments, **keywords)

        return wrapped


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_failure_at_any_step_loses_nothing_and_can_be_repeated(error, home, tmp_path):
    own = f"{TOP}/mine__plans__3d_fullres"
    before = {
        f"{own}/plans.json": b"{}",
        f"{own}/fold_0/checkpoint_final.pth": b"my weights",
        f"{TOP}/{MODEL.folder_name}/plans.json": b'{"cut o',
    }
    (tmp_path / "model.zip").write_bytes(ZIP)
    steps = at = 0  # the first round has no error
    while at <= steps:
        shutil.rmtree(home, ignore_errors=True)
        write(home, before)
        with pytest.MonkeyPatch.context() as patch:
            failing = Failing(patch, error, at)
            with contextlib.suppress(WeightsError, KeyboardInterrupt):
                import_zip(MODEL, tmp_path / "model.zip")
            steps = max(steps, failing.count)
        if inspect(MODEL).condition is Condition.WHOLE:
            assert FILES.items() <= content_of(MODEL.dataset).items()
        else:
            assert content_of(MODEL.dataset) == before
        (weights,) = home.rglob("mine__plans__3d_fullres/fold_0/*.pth")
        assert weights.read_bytes() == b"my weights"
        import_zip(MODEL, tmp_path / "model.zip")
        assert find_model(MODEL)
        at += 1
    assert steps > 15


def test_weights_that_differ_from_the_new_ones_are_kept(home, mirror, caplog):
    write(home, {**FILES, f"{TOP}/{MODEL.folder_name}/fold_0/checkpoint_final.pth": b"mine"})
    with serve(whole(ZIP)) as server:
        mirror(server)
        assert not download(MODEL, quiet=True)
        assert download(MODEL, quiet=True, force=True)
    assert content_of(MODEL.dataset) == FILES
    (kept,) = (home / ".totalfast").glob(f"replaced-{TOP}-*")
    assert (kept / MODEL.folder_name / "fold_0/checkpoint_final.pth").read_bytes() == b"mine"
    assert str(kept) in caplog.text


def test_official_model_is_added_to_a_folder_of_own_models_only_by_the_command(mirror):
    own = MODEL.dataset / "mine__plans__3d_fullres"
    write(own, {"plans.json": b"{}", "fold_0/checkpoint_final.pth": b"my weights"})
    with serve(whole(ZIP)) as server:
        mirror(server)
        with pytest.raises(WeightsError, match=f"has no {MODEL.folder_name}, only mine__plans"):
            ensure_model(MODEL, quiet=True)
        assert server.requests == []
        assert download(MODEL, quiet=True)
    assert find_model(MODEL)
    assert (own / "fold_0/checkpoint_final.pth").read_bytes() == b"my weights"


def test_folder_of_a_containers_image_is_replaced(home, mirror, monkeypatch):
    """Overlay file systems can't rename folders of an image."""
    rename = os.rename

    def refusing(source, target, **keywords):
        if os.fspath(source) == os.fspath(MODEL.dataset):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        rename(source, target, **keywords)

    write(home, dict([next(iter(FILES.items()))]))
    monkeypatch.setattr(os, "rename", refusing)
    with serve(whole(ZIP)) as server:
        mirror(server)
        ensure_model(MODEL, quiet=True)
    assert content_of(MODEL.dataset) == FILES
    assert left_in_workshop(home) == []


def test_symbolic_link_to_an_incomplete_folder_is_replaced_and_its_target_kept(home, mirror):
    elsewhere = home.parent / "elsewhere"
    write(elsewhere, {"plans.json": b"{}"})
    home.mkdir()
    MODEL.dataset.symlink_to(elsewhere)
    with serve(whole(ZIP)) as server:
        mirror(server)
        ensure_model(MODEL, quiet=True)
    assert not MODEL.dataset.is_symlink()
    assert content_of(MODEL.dataset) == FILES
    assert (elsewhere / "plans.json").exists()


def test_model_is_replaced_and_not_written_in_place(mirror):
    with serve(whole(ZIP), whole(zipped(model_files(checkpoint=b"new")))) as server:
        mirror(server)
        download(MODEL, quiet=True)
        assert not download(MODEL, quiet=True)
        path = MODEL.folder / "fold_0/checkpoint_final.pth"
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ) as old:
            assert download(MODEL, quiet=True, force=True)
            assert path.read_bytes() == b"new"
            assert old[:] == FILES[f"{TOP}/{MODEL.folder_name}/fold_0/checkpoint_final.pth"]


def test_offline_run_downloads_nothing_and_tells_how_to_import(home, mirror, monkeypatch):
    with serve(whole(ZIP)) as server:
        mirror(server)
        with pytest.raises(WeightsError, match="totalfast weights import") as raised:
            ensure_model(MODEL, offline=True)
        monkeypatch.setenv("TOTALFAST_OFFLINE", "1")
        with pytest.raises(WeightsError, match="is not in .*, and downloads are off"):
            ensure_model(MODEL)
    assert f"{TOP}.zip" in str(raised.value)
    assert server.requests == []
    assert not home.exists()


# -------------------------------------------------------------------------------------- manifest


@pytest.fixture
def imported(tmp_path):
    (tmp_path / "model.zip").write_bytes(ZIP)
    import_zip(MODEL, tmp_path / "model.zip")
    return MODEL.folder / "fold_0/checkpoint_final.pth"


def test_finding_a_whole_model_takes_a_few_milliseconds(imported):
    assert min(timeit.repeat(lambda: find_model(MODEL), number=1, repeat=20)) < 0.005


def test_changed_size_is_an_error(imported):
    with imported.open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(WeightsError, match=r"fold_0/checkpoint_final\.pth has 512001 bytes"):
        find_model(MODEL)
    with pytest.raises(WeightsError, match="'totalfast weights download 297' replaces"):
        ensure_model(MODEL)


def test_other_bytes_of_the_same_size_are_an_error(imported):
    imported.write_bytes(bytes(imported.stat().st_size))
    os.utime(imported, (1, 1))
    with pytest.raises(WeightsError, match=r"checkpoint_final\.pth has other bytes"):
        find_model(MODEL)


def test_copied_folder_is_hashed_once_and_gets_the_new_times(imported, monkeypatch):
    os.utime(imported, (1, 1))
    hashed = []
    sha256 = manifest.sha256_of
    monkeypatch.setattr(manifest, "sha256_of", lambda path: hashed.append(path) or sha256(path))
    for _ in range(2):
        assert find_model(MODEL) == MODEL.folder
    recorded = manifest.read_manifest(MODEL.dataset)
    name = imported.relative_to(MODEL.dataset).as_posix()
    assert recorded.files[name].modified_ns == 1_000_000_000
    assert hashed == [imported]


def test_copied_read_only_folder_is_hashed_once_per_process(imported, monkeypatch):
    os.utime(imported, (1, 1))
    hashed = []
    sha256 = manifest.sha256_of

    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(manifest, "sha256_of", lambda path: hashed.append(path) or sha256(path))
    monkeypatch.setattr(manifest, "write_manifest", refuse)
    for _ in range(2):
        assert find_model(MODEL) == MODEL.folder
    assert hashed == [imported]


def test_times_rounded_to_seconds_are_not_hashed(imported, monkeypatch):
    modified = int(imported.stat().st_mtime)
    os.utime(imported, (modified, modified))
    monkeypatch.setattr(manifest, "sha256_of", lambda path: pytest.fail("hashed a file"))
    assert find_model(MODEL) == MODEL.folder


def test_deleted_file_that_no_run_needs_does_not_matter(tmp_path):
    picture = {f"{TOP}/{MODEL.folder_name}/fold_0/progress.png": b"picture"}
    (tmp_path / "model.zip").write_bytes(zipped({**FILES, **picture}))
    import_zip(MODEL, tmp_path / "model.zip")
    (MODEL.folder / "fold_0/progress.png").unlink()
    assert find_model(MODEL) == MODEL.folder


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"version": 1}', '{"version": 99}'])
def test_damaged_manifest_is_an_error(content, imported):
    (MODEL.dataset / manifest.MANIFEST_NAME).write_text(content)
    with pytest.raises(WeightsError, match="its manifest is damaged"):
        find_model(MODEL)


def test_lost_fold_is_an_error(home, tmp_path):
    five = replace(MODEL, folds=(0, 1, 2, 3, 4))
    every = replace(MODEL, folds=None)
    files = model_files(folds=range(5))
    write(home, files)
    assert find_model(every) == find_model(five) == MODEL.folder
    (MODEL.folder / "fold_2/checkpoint_final.pth").unlink()
    for model in (five, every):
        with pytest.raises(WeightsError, match=r"no fold_2/checkpoint_final\.pth"):
            find_model(model)
    (MODEL.folder / "fold_2").rmdir()
    with pytest.raises(WeightsError, match=r"no fold_2/checkpoint_final\.pth"):
        find_model(every)
    (tmp_path / "model.zip").write_bytes(zipped(files))
    import_zip(every, tmp_path / "model.zip")
    shutil.rmtree(MODEL.folder / "fold_4")  # only the manifest knows that it was there
    with pytest.raises(WeightsError, match=r"no fold_4/checkpoint_final\.pth"):
        find_model(every)
