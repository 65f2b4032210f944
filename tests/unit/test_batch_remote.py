"""Scans and results elsewhere: addresses, finding, downloads, uploads, the manifest."""

from __future__ import annotations

import errno
import json
import pickle
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.object_store import CREDENTIALS, Fault, moto_server, proxy_to, web_server
from totalfast.batch import attempts as attempts_module
from totalfast.batch.finding.cases import Case, find_cases
from totalfast.batch.finding.left_out import Counted
from totalfast.batch.finding.remote_search import scan_at, scans_below
from totalfast.batch.remote import calls as remote_calls
from totalfast.batch.remote.calls import TransferError
from totalfast.batch.remote.files import files_below, look_at
from totalfast.batch.remote.place import Remote, address_of, place_of
from totalfast.batch.results.entries import DONE, FAILED, Entry
from totalfast.batch.results.remote_manifest import opened_manifest
from totalfast.batch.shared_queue import SharedQueue
from totalfast.batch.transfers import STAMP, local_copy, on_this_disk, publish
from totalfast.batch.work_folders import PREFIX, work_folder
from totalfast.errors import InputError, OptionError, OutputError
from totalfast.run.many import StageClock
from totalfast.system.disk import is_disk_full

fsspec = pytest.importorskip("fsspec")

PREAMBLE = bytes(128) + b"DICM" + bytes(20)

SIGNED = "https://host/scans/ct.nii.gz?X-Amz-Signature=0123&X-Amz-Date=2026"


def nothing() -> None:
    pass


@pytest.fixture
def memory():
    """An empty store in this process."""
    files = fsspec.filesystem("memory")
    files.store.clear()
    yield files
    files.store.clear()


def put(memory, **content: bytes) -> None:
    for name, data in content.items():
        memory.pipe_file(name, data)


def fill(memory, *names: str) -> None:
    for name in names:
        memory.pipe_file(f"/{name}", name.encode())


def find(*inputs: str, **options):
    return find_cases(list(inputs), **options)


def sources(found) -> dict[str, str]:
    return {case.name: str(case.source) for case in found.cases}


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("s3://bucket/a/ct.nii.gz", "s3://bucket/a/ct.nii.gz"),
        (SIGNED, "https://host/scans/ct.nii.gz"),
        ("https://user:pw@host:8080/ct.nii.gz", "https://host:8080/ct.nii.gz"),
        ("https://token@host/ct.nii.gz#part", "https://host/ct.nii.gz"),
        ("https://host/ct.nii.gz?access_token=abc&sig=x", "https://host/ct.nii.gz"),
        ("sftp://user:pw@host/ct.nii.gz", "sftp://user@host/ct.nii.gz"),
        ("abfs://container@account.net/a", "abfs://container@account.net/a"),
    ],
)
def test_the_text_of_an_address_has_no_password_and_no_signature(url, text):
    assert str(Remote(url)) == text
    assert text in repr(Remote(url))
    assert Remote(url).has_secrets == (url != text)
    assert pickle.loads(pickle.dumps(Remote(url))).url == url  # noqa: S301 - our own bytes


def test_parameters_that_name_a_file_tell_addresses_apart_without_being_shown():
    one, other = Remote("https://host/get?id=secret5&sig=a"), Remote("https://host/get?id=secret6")
    assert str(one) != str(other)
    assert str(one) == str(Remote("https://host/get?sig=b&id=secret5"))
    assert "secret" not in str(one)


def test_places_are_paths_or_addresses(tmp_path):
    assert place_of(str(tmp_path)) == tmp_path
    assert place_of("C:\\scans\\ct.nii") == Path("C:\\scans\\ct.nii")
    assert place_of("file:///scans/ct.nii") == Path("/scans/ct.nii")
    assert place_of("S3://bucket/Key") == Remote("s3://bucket/Key")
    assert address_of(place_of(SIGNED)) == SIGNED
    with pytest.raises(OptionError, match="chain"):
        place_of("zip://a.nii.gz::s3://bucket/a.zip")


def test_scans_are_found_by_names_and_results_are_left_out(memory):
    fill(
        memory,
        "in/a/ct.nii.gz", "in/b/ct.nii.gz", "in/b/notes.txt", "in/pair.hdr", "in/pair.img",
        "in/raw.mhd", "in/raw.raw", "in/study.zip", "in/.hidden/x.nii.gz", "in/.y.nii.gz",
        "in/out/c/segmentation.nii.gz", "in/done/totalfast-complete.json", "in/done/liver.nii.gz",
        "in/done/deeper/x.nii.gz", "in/one/seg.nii.gz", "in/one/seg.nii.gz.complete.json",
        "in/masks/liver.nii.gz", "in/masks/spleen.nii.gz", "in/masks/aorta.nii.gz",
        "in/series/1.dcm", "in/series/2.dcm", "in/series/readme",
    )  # fmt: skip
    put(memory, **{"/in/plain/IM1": PREAMBLE, "/in/plain/IM2": PREAMBLE, "/in/other/DATA": b"x"})
    memory.pipe_file("/in/out/manifest.jsonl", b'{"manifest":1}')
    memory.pipe_file("/in/a/manifest.jsonl", b'{"of": "something else"}')
    found = find("memory://in/")
    assert sources(found) == {
        "a_ct": "memory://in/a/ct.nii.gz",
        "b_ct": "memory://in/b/ct.nii.gz",
        "pair": "memory://in/pair.hdr",
        "plain": "memory://in/plain",
        "raw": "memory://in/raw.mhd",
        "series": "memory://in/series",
        "study": "memory://in/study.zip",
    }
    reasons = {each.reason: each.count for each in found.left_out}
    assert reasons["result of totalfast"] == 4
    assert reasons["hidden"] == 2
    assert reasons["folder of masks, named like TotalSegmentator's classes"] == 1
    assert reasons["not DICOM"] == 2
    assert reasons["file whose name is not that of a scan"] == 2
    assert [file.remote.name for file in scan_at(Remote("memory://in/raw.mhd")).files] == [
        "raw.mhd",
        "raw.raw",
    ]
    assert [file.remote.name for file in scan_at(Remote("memory://in/series")).files] == [
        "1.dcm",
        "2.dcm",
    ]


def test_patterns_mean_files_and_folders(memory):
    fill(memory, "in/a/ct.nii.gz", "in/a/mr.nii.gz", "in/b/ct.nii.gz", "in/b/deep/ct.nii.gz")
    assert len(find("memory://in/*/ct.nii.gz").cases) == 2
    assert len(find("memory://in/**/ct.nii.gz").cases) == 3
    assert len(find("memory://in/[b-z]").cases) == 2
    with pytest.raises(InputError, match="pattern without a match"):
        find("memory://in/*/pet.nii.gz")
    with pytest.raises(InputError, match="needs the name of a host"):
        find("memory://*/ct.nii.gz")


def test_the_folder_of_the_results_is_not_searched(memory):
    fill(memory, "in/ct.nii.gz", "in/out/a/x.nii.gz", "in/outer/y.nii.gz")
    assert len(find("memory://in", skip=Remote("memory://in/out")).cases) == 2


def test_lists_name_addresses_and_may_be_elsewhere(memory, tmp_path):
    fill(memory, "in/a.nii.gz", "in/b.nii.gz")
    (tmp_path / "list.csv").write_text(
        "case,path\none,memory://in/a.nii.gz\ntwo,memory://in/missing.nii.gz\nthree,local.nii.gz\n"
    )
    found = find(str(tmp_path / "list.csv"))
    assert sources(found) == {
        "one": "memory://in/a.nii.gz",
        "two": "memory://in/missing.nii.gz",
        "three": str(tmp_path / "local.nii.gz"),
    }
    memory.pipe_file("/in/list.csv", b"path\nb.nii.gz\nmemory://in/a.nii.gz\n")
    assert sorted(sources(find("memory://in/list.csv"))) == ["a", "b"]


def test_a_fingerprint_changes_with_the_content_only(memory):
    fill(memory, "in/a.nii.gz", "in/b.nii.gz")
    before = {case.name: case.fingerprint() for case in find("memory://in").cases}
    memory.pipe_file("/in/a.nii.gz", b"longer than before")
    after = {case.name: case.fingerprint() for case in find("memory://in").cases}
    assert before["b"] == after["b"]
    assert before["a"] != after["a"]


def test_filters_that_need_headers_are_refused(memory):
    fill(memory, "in/a.nii.gz")
    for options in ({"modality": "CT"}, {"min_slices": 9}, {"names": "uid"}):
        with pytest.raises(OptionError, match="names of files only"):
            find("memory://in", **options)


def test_missing_inputs_and_protocols_are_named(memory, monkeypatch):
    with pytest.raises(InputError, match=r"memory://nowhere can't be read: it does not exist"):
        find("memory://nowhere")
    with pytest.raises(OptionError, match="nonsense:// is not known"):
        find("nonsense://a/b")

    def without(name: str) -> None:
        raise ImportError(f"Install {name}")

    monkeypatch.setattr(fsspec, "get_filesystem_class", without)
    with pytest.raises(OptionError, match="hdfs:// needs a package that is missing: Install hdfs"):
        find("hdfs://a/b")
    with pytest.raises(OptionError, match=r"missing: pip install 'totalfast\[remote\]'"):
        remote_calls._file_system("s3a", "")


def test_a_case_elsewhere_can_be_handed_to_other_processes(tmp_path):
    case = Case(name="a", source=Remote(SIGNED), series=None, found="f", size=5)
    assert pickle.loads(pickle.dumps(case)) == case  # noqa: S301 - our own bytes
    SharedQueue(tmp_path).fill([case])
    assert SharedQueue(tmp_path).cases() == (case,)


def test_a_scan_is_on_this_disk_as_long_as_it_is_needed(memory):
    fill(memory, "in/raw.mhd", "in/raw.raw")
    with on_this_disk(Remote("memory://in/raw.mhd"), nothing) as path:
        assert path.read_bytes() == b"in/raw.mhd"
        assert path.with_suffix(".raw").read_bytes() == b"in/raw.raw"
    assert not path.exists()
    error = InputError(f"{path} is damaged.")
    with (
        pytest.raises(InputError, match=r"^memory://in/raw\.mhd is damaged"),
        on_this_disk(Remote("memory://in/raw.mhd"), nothing) as path,
    ):
        raise InputError(str(error).replace(str(error).split()[0], str(path)))


def test_folders_of_killed_processes_are_removed(tmp_path):
    left = Path(tempfile.gettempdir(), f"{PREFIX}left")
    left.mkdir()
    (left / "lock").touch()
    with work_folder() as other:
        assert not left.exists()
        with work_folder():
            assert other.exists()


@dataclass
class Store:
    """A bucket of an S3 server, behind a proxy."""

    proxy: object

    @property
    def files(self):
        return remote_calls.file_system(Remote("s3://bucket"))

    def put(self, name: str, data: bytes) -> Remote:
        self.files.pipe_file(f"bucket/{name}", data)
        return Remote(f"s3://bucket/{name}")

    def names(self) -> list[str]:
        return [each.remote.url.removeprefix("s3://bucket/") for each in files_below(BUCKET)]


BUCKET = Remote("s3://bucket")


@pytest.fixture(scope="module")
def s3_port(tmp_path_factory):
    pytest.importorskip("s3fs")
    pytest.importorskip("moto.server")
    with moto_server(tmp_path_factory.mktemp("moto") / "log") as port:
        yield port


@pytest.fixture
def s3(s3_port, monkeypatch):
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(remote_calls, "WAITS_S", (0.1, 0.1))
    with proxy_to(s3_port) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
        remote_calls._file_system.cache_clear()
        store = Store(proxy)
        store.files.mkdir("bucket")
        yield store
        proxy.forget()
        proxy.is_down = False
        store.files.rm("bucket", recursive=True)
    remote_calls._file_system.cache_clear()


def test_a_prefix_is_listed_with_one_request_and_nothing_is_downloaded(s3):
    for number in range(5):
        s3.put(f"scans/{number}/ct.nii.gz", b"scan")
    s3.proxy.forget()
    found = find("s3://bucket/scans/")
    assert len(found.cases) == 5
    assert {case.size for case in found.cases} == {4}
    assert sum(s3.proxy.requests.values()) <= 4
    assert not [path for path in s3.proxy.bodies if "ct.nii.gz" in path]


def test_odd_keys_are_scans_and_keys_that_stand_for_folders_are_not(s3):
    keys = ("in/a b#c %20[1].nii.gz", "in/x?y.nii.gz", "in/\u00fcml\u00e4ut.nii.gz")
    for key in keys:
        s3.put(key, key.encode())
    s3.put("in/", b"")
    s3.put("in/sub/", b"")
    found = find("s3://bucket/in")
    assert found.left_out == ()
    assert {str(case.source) for case in found.cases} == {f"s3://bucket/{key}" for key in keys}
    for case in found.cases:
        with on_this_disk(case.source, nothing) as path:
            assert f"in/{case.source.name}" == path.read_bytes().decode()


@pytest.mark.parametrize("kind", ["status", "cut", "hang up"])
def test_a_download_survives_errors_that_pass(s3, kind):
    data = bytes(range(256)) * 4000
    remote = s3.put("ct.nii.gz", data)
    s3.proxy.forget()
    s3.proxy.faults.append(Fault(kind, "GET", r"ct\.nii\.gz", times=2))
    with on_this_disk(remote, nothing) as path:
        assert path.read_bytes() == data
    assert s3.proxy.bodies["/bucket/ct.nii.gz"] == 1


def test_a_list_that_is_not_whole_is_an_error(s3):
    s3.put("scans/ct.nii.gz", b"scan")
    s3.proxy.faults.append(Fault("status", "GET", "list-type", times=1000))
    with pytest.raises(TransferError, match="s3://bucket/scans can't be read now"):
        list(files_below(Remote("s3://bucket/scans")))


def test_a_store_that_stays_down_is_no_fault_of_the_scan(s3):
    remote = s3.put("ct.nii.gz", b"scan")
    s3.proxy.faults.append(Fault("status", "GET", r"ct\.nii\.gz", times=1000))
    with (
        pytest.raises(TransferError, match=r"s3://bucket/ct\.nii\.gz can't be read now"),
        on_this_disk(remote, nothing),
    ):
        pass
    assert not list(Path(tempfile.gettempdir()).glob(f"{PREFIX}*"))


def test_missing_and_refused_objects_are_named(s3):
    with pytest.raises(InputError, match=r"s3://bucket/no can't be read: it does not exist"):
        look_at(Remote("s3://bucket/no"))
    remote = s3.put("ct.nii.gz", b"scan")
    s3.proxy.faults.append(Fault("status", "HEAD", "ct", times=1000, status=403))
    with pytest.raises(InputError, match="access is refused"):
        look_at(remote)


def results(folder: Path, marker: bool = True) -> tuple[Path, list[Path]]:
    """A case's folder with a label map, statistics and a completion marker."""
    place = folder / "case"
    place.mkdir(parents=True, exist_ok=True)
    (place / "segmentation.nii.gz").write_bytes(b"labels" * 1000)
    (place / "statistics.json").write_text('{"liver": {"volume": 1.0}}')
    last = place / "segmentation.nii.gz.complete.json"
    if marker:
        last.write_text('{"files": ["segmentation.nii.gz", "statistics.json"]}')
    return place, [last]


def send(folder: Path) -> tuple[str, ...]:
    place, markers = results(folder)
    return publish(
        place,
        Remote("s3://bucket/out/case"),
        markers=markers,
        stamp=lambda files: {"files": list(files)},
        check=nothing,
    )


MARKER = "out/case/segmentation.nii.gz.complete.json"


def test_the_marker_is_removed_first_and_uploaded_last(s3, tmp_path):
    names = send(tmp_path)
    assert s3.proxy.order[-1] == ("PUT", f"/bucket/{MARKER}")
    assert json.loads(s3.files.cat_file(f"bucket/{MARKER}"))[STAMP] == {"files": list(names)}
    s3.proxy.forget()
    send(tmp_path)
    changed = [path for method, path in s3.proxy.order]
    assert (changed[0], changed[-1]) == (f"/bucket/{MARKER}", f"/bucket/{MARKER}")
    assert s3.proxy.order[0][0] in ("DELETE", "POST")
    assert len(changed) == 4


@pytest.mark.parametrize("kind", ["status", "hang up"])
def test_an_upload_survives_errors_that_pass(s3, tmp_path, kind):
    s3.proxy.faults.append(Fault(kind, "PUT", "segmentation", times=2))
    send(tmp_path)
    assert MARKER in s3.names()
    assert s3.files.cat_file("bucket/out/case/segmentation.nii.gz") == b"labels" * 1000


def test_results_that_are_not_whole_have_no_marker(s3, tmp_path):
    send(tmp_path)
    s3.proxy.faults.append(Fault("status", "PUT", "statistics", times=1000, status=403))
    with pytest.raises(OutputError, match=r"can't write s3://bucket/out/case/statistics.json"):
        send(tmp_path)
    assert MARKER not in s3.names()


def entry(name: str = "case", **values) -> Entry:
    return Entry(name=name, state=DONE, **values)


def test_a_manifest_is_read_at_the_start_and_uploaded_at_the_end(s3):
    out = Remote("s3://bucket/out")
    case = Case(name="case", source=Remote("s3://bucket/a"), series=None, found="print")
    with opened_manifest(out, {"fast": True}) as manifest:
        assert manifest.waiting([case]) == [case]
        files = ("case/x.nii.gz", "case/x.nii.gz.complete.json")
        for name in files:
            s3.put(f"out/{name}", b"{}")
        manifest.add(entry(options=manifest.options_hash(), fingerprint="print", files=files))
    with opened_manifest(out, {"fast": True}) as manifest:
        assert manifest.waiting([case]) == []
        s3.files.rm_file("bucket/out/case/x.nii.gz")
        assert manifest.waiting([case]) == [case]
    with (
        pytest.raises(OptionError, match=r"^s3://bucket/out has results of a batch with other"),
        opened_manifest(out, {"fast": False}),
    ):
        pass


def test_a_killed_batch_is_known_by_the_markers_of_its_cases(s3, tmp_path):
    out = Remote("s3://bucket/out")
    case = Case(name="case", source=Remote("s3://bucket/a"), series=None, found="print")
    other = Case(name="case", source=Remote("s3://bucket/a"), series=None, found="changed")
    with opened_manifest(out, {"fast": True}) as manifest:
        place, markers = results(tmp_path)
        made = {"options": manifest.options_hash(), "fingerprint": "print"}

        def stamp(files):
            return entry(**made, files=[f"case/{name}" for name in files]).to_json()

        publish(place, out / "case", markers=markers, stamp=stamp, check=nothing)
    assert b"case" not in s3.files.cat_file("bucket/out/manifest.jsonl")
    with opened_manifest(out, {"fast": True}) as manifest:
        assert manifest.waiting([other]) == [other]
        assert manifest.waiting([case]) == []
        assert manifest.entries()["case"].fingerprint == "print"
    assert "out/manifest.jsonl" in s3.names()
    s3.files.rm_file("bucket/out/manifest.jsonl")
    s3.files.rm_file("bucket/out/case/statistics.json")
    with opened_manifest(out, {"fast": True}) as manifest:
        assert manifest.waiting([case]) == [case]


def test_a_manifest_that_cannot_be_uploaded_is_kept(s3, tmp_path, monkeypatch):
    monkeypatch.setenv("TOTALFAST_RESCUE_DIR", str(tmp_path / "rescued"))
    with (
        pytest.raises(OutputError, match="It is kept in") as caught,
        opened_manifest(Remote("s3://bucket/out"), {}) as manifest,
    ):
        s3.proxy.faults.append(Fault("status", "PUT", "manifest", times=1000, status=403))
        manifest.add(Entry(name="a", state=FAILED, error="why"))
    (kept,) = (tmp_path / "rescued").rglob("manifest.jsonl")
    assert str(kept) in str(caught.value)
    assert '"why"' in kept.read_text()


def test_a_place_that_cannot_be_written_to_is_refused_at_the_start(s3):
    with (
        pytest.raises(OutputError, match="there is no such bucket"),
        opened_manifest(Remote("s3://no-bucket/out"), {}),
    ):
        pass


def test_a_batch_that_finds_no_cases_leaves_nothing(s3):
    with (
        pytest.raises(InputError, match="no cases"),
        opened_manifest(Remote("s3://bucket/out"), {}),
    ):
        raise InputError("no cases")
    assert not s3.names()


def test_parts_see_what_other_parts_uploaded(s3):
    out = Remote("s3://bucket/out")
    with (
        opened_manifest(out, {}, part=(0, 2)) as one,
        opened_manifest(out, {}, part=(1, 2)) as two,
    ):
        one.add(entry("a"))
        two.add(entry("b"))
        one._upload()
        assert sorted(two.entries()) == ["a", "b"]
    assert sorted(name for name in s3.names() if "manifest" in name) == [
        "out/manifest-0-of-2.jsonl",
        "out/manifest-1-of-2.jsonl",
    ]


def test_tables_are_uploaded(s3):
    with local_copy(Remote("s3://bucket/out/table.csv")) as path:
        path.write_text("case\n")
    assert s3.files.cat_file("bucket/out/table.csv") == b"case\n"


@pytest.mark.parametrize("ranges", [True, False])
def test_web_addresses_are_scans_or_folders(tmp_path, ranges):
    pytest.importorskip("aiohttp")
    (tmp_path / "www" / "sub").mkdir(parents=True)
    for name in ("a.nii.gz", "sub/b c.nii.gz", "notes.txt"):
        (tmp_path / "www" / name).write_bytes(name.encode() * 100)
    with web_server(tmp_path / "www", ranges=ranges) as url:
        found = find(f"{url}/a.nii.gz?token=secret", f"{url}/sub/")
        assert [case.name for case in found.cases] == ["a", "b_c"]
        assert "secret" not in str([str(case.source) for case in found.cases])
        for case, content in zip(found.cases, (b"a.nii.gz", b"sub/b c.nii.gz"), strict=True):
            with on_this_disk(case.source, nothing) as path:
                assert path.read_bytes() == content * 100
        before = found.cases[0].fingerprint()
        assert find(f"{url}/a.nii.gz?token=new").cases[0].fingerprint() == before
        with pytest.raises(InputError, match="it does not exist"):
            find(f"{url}/missing.nii.gz")
        with (
            pytest.raises(OptionError, match="can't be written to"),
            opened_manifest(Remote(f"{url}/out"), {}),
        ):
            pass


def test_errors_of_web_servers_that_pass_are_no_fault_of_the_scan(tmp_path, monkeypatch):
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(remote_calls, "WAITS_S", (0.1,))
    (tmp_path / "a.nii.gz").write_bytes(b"scan" * 1000)
    with (
        web_server(tmp_path, ranges=False) as url,
        proxy_to(int(url.rpartition(":")[2])) as proxy,
    ):
        remote = Remote(f"{proxy.url}/a.nii.gz?sig=hidden")
        proxy.faults.append(Fault("cut", "GET", "a.nii"))
        with on_this_disk(remote, nothing) as path:
            assert path.read_bytes() == b"scan" * 1000
        proxy.faults.append(Fault("status", "GET", "a.nii", times=100))
        with (
            pytest.raises(TransferError, match="status 503") as caught,
            on_this_disk(remote, nothing),
        ):
            pass
        assert "hidden" not in str(caught.value)
        assert caught.value.__cause__ is None


def test_silence_ends_a_call(memory, monkeypatch):
    class Silent:
        async_impl = True

        def __init__(self) -> None:
            from fsspec.asyn import get_loop

            self.loop = get_loop()

        async def _info(self, path: str) -> None:
            import asyncio

            await asyncio.sleep(60)

    monkeypatch.setattr(remote_calls, "file_system", lambda remote: Silent())
    with pytest.raises(TimeoutError):
        remote_calls.call(Remote("s3://a/b"), "info", "b", limit_s=0.3)


def test_left_out_counts_places_elsewhere(memory):
    fill(memory, "in/a.txt")
    left_out = Counted()
    assert scans_below(Remote("memory://in"), left_out) == []
    assert str(left_out.result()[0]).endswith("(for example memory://in/a.txt)")


def test_results_without_any_place_end_the_batch_as_a_full_disk_does(memory, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def refuse(*_: object, **__: object) -> None:
        raise OutputError("can't write memory://out.")

    monkeypatch.setattr(attempts_module, "publish", refuse)
    monkeypatch.setattr(attempts_module, "rescue", full)
    attempts = attempts_module.Attempts(
        session=None, folder=Remote("memory://out"), keywords={}, tasks=["total"], options="hash"
    )
    case = Case(name="case", source=tmp_path / "ct.nii.gz", series=None, found="print")
    clock = StageClock(threading.Event())
    with pytest.raises(OutputError, match=r"can't write .* can't be kept on this") as caught:
        attempts._upload(case, tmp_path, Remote("memory://out/case"), clock, 0.0)
    assert is_disk_full(caught.value)
