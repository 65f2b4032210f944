"""A batch goes on where it ended, whatever ended it, and never mixes options."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest

from totalfast.batch.results import manifest as module
from totalfast.batch.results.entries import (
    DONE,
    FAILED,
    Entry,
    last_entries,
    read_content,
    read_entries,
)
from totalfast.batch.results.manifest import Manifest, completed_files, written_files
from totalfast.errors import OptionError, OutputError
from totalfast.files.targets import FILE_MARKER_ENDING, FOLDER_MARKER

OPTIONS = {"task": "total", "fast": True, "crop_path": None, "output_type": ("nifti",)}
needs_posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals and limits")


@dataclass(frozen=True)
class StandIn:
    """Has what the manifest uses of a case."""

    name: str = "a"
    content: str = "1"

    def fingerprint(self) -> str:
        return self.content


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    monkeypatch.setattr(module, "WAIT_S", 0.3)
    monkeypatch.setattr(module, "POLL_S", 0.02)


def opened(folder, options=OPTIONS, **keywords):
    return Manifest(folder, options, **keywords)


def masks(folder, name="a", files=("liver.nii.gz", "spleen.nii.gz")):
    """Write the results of a case, and return the files of its entry."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    for file in files:
        (folder / name / file).write_text("x")
    marker = folder / name / FOLDER_MARKER
    marker.write_text(json.dumps({"files": list(files)}))
    return completed_files(marker, folder)


def entry(manifest, name="a", *, state=DONE, second=0, **fields):
    fields = {
        "options": manifest.options_hash(),
        "fingerprint": "1",
        "finished": f"2026-11-27T10:00:{second:02}+00:00",
        **fields,
    }
    return Entry(name=name, state=state, **fields)


def done(folder, **fields):
    """Finish case "a" in a batch that ends then."""
    with opened(folder) as manifest:
        manifest.add(entry(manifest, files=masks(folder), **fields))


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_first_line_names_the_options_and_further_lines_are_entries(tmp_path):
    with opened(tmp_path / "out", {"task": "total", "path": Path("/x"), "b": (1, 2)}) as manifest:
        manifest.add(entry(manifest, second=1))
        digest = manifest.options_hash()
    header, line = lines(tmp_path / "out" / "manifest.jsonl")
    options = {"task": "total", "path": os.fspath(Path("/x")), "b": [1, 2]}
    assert header == {"manifest": 1, "options": options, "hash": digest}
    assert (line["name"], line["state"], line["part"]) == ("a", "done", [0, 1])


def test_entry_survives_json_with_fields_of_newer_versions():
    full = Entry(
        name="\udcff<é>",
        state=FAILED,
        options="h",
        fingerprint="f",
        source="s",
        series="1.2",
        attempt=2,
        seconds={"Reading": 1.5},
        total_s=2.0,
        peak_bytes=None,
        versions={"totalfast": "1"},
        error="e",
        warnings=("w",),
        files=("a/b",),
        host="h",
        part=(1, 3),
        extra={"gpu": [1]},
    )
    content = json.loads(json.dumps(full.to_json()))
    assert content["gpu"] == [1]
    assert Entry.from_json(content) == full


@pytest.mark.parametrize(
    "wrong", [{"name": 1}, {"files": "a"}, {"part": [1]}, {"attempt": True}, {"seconds": []}]
)
def test_entry_with_a_field_of_another_type_is_refused_and_ignored_in_a_file(tmp_path, wrong):
    content = {"name": "a", "state": DONE, **wrong}
    with pytest.raises((TypeError, ValueError)):
        Entry.from_json(content)
    good = json.dumps(Entry(name="b", state=DONE).to_json())
    (tmp_path / "manifest.jsonl").write_text(f"{json.dumps(content)}\n[]\n7\n{good}\n")
    assert list(read_entries(tmp_path)) == ["b"]


def test_hash_does_not_depend_on_order_and_type_of_path(tmp_path):
    first = opened(tmp_path / "1", {"a": 1, "b": Path("x"), "c": {"k": 1, "j": 2}})
    second = opened(tmp_path / "2", {"c": {"j": 2, "k": 1}, "b": "x", "a": 1})
    third = opened(tmp_path / "3", {"a": 2, "b": "x", "c": {"j": 2, "k": 1}})
    for manifest in (first, second, third):
        manifest.close()
    assert first.options_hash() == second.options_hash() != third.options_hash()


def test_done_case_is_done_in_the_next_batch(tmp_path):
    done(tmp_path)
    with opened(tmp_path) as manifest:
        assert manifest.is_done(StandIn())
        assert not manifest.is_done(StandIn(name="b"))


def test_entry_that_names_only_the_marker_is_done_if_the_files_of_the_marker_exist(tmp_path):
    with opened(tmp_path) as manifest:
        files = masks(tmp_path)
        manifest.add(entry(manifest, files=[f"a/{FOLDER_MARKER}"]))
        assert manifest.is_done(StandIn())
        assert written_files(manifest.last_entry("a"), tmp_path) == set(files)
        (tmp_path / "a" / "spleen.nii.gz").unlink()
        assert not manifest.is_done(StandIn())


def test_label_map_with_a_marker_beside_it_is_done(tmp_path):
    (tmp_path / "a.nii.gz").write_text("x")
    marker = tmp_path / f"a.nii.gz{FILE_MARKER_ENDING}"
    marker.write_text(json.dumps({"files": ["a.nii.gz"]}))
    with opened(tmp_path) as manifest:
        manifest.add(entry(manifest, files=completed_files(marker, tmp_path)))
        assert manifest.is_done(StandIn())
        (tmp_path / "a.nii.gz").unlink()
        assert not manifest.is_done(StandIn())


@pytest.mark.parametrize("missing", ["a/liver.nii.gz", f"a/{FOLDER_MARKER}"])
@pytest.mark.parametrize("number", [2, 40], ids=["few files", "many files"])
def test_case_with_a_missing_file_is_not_done(tmp_path, missing, number):
    others = [f"structure_{k}.nii.gz" for k in range(number)]
    with opened(tmp_path) as manifest:
        manifest.add(entry(manifest, files=masks(tmp_path, files=["liver.nii.gz", *others])))
        assert manifest.is_done(StandIn())
        (tmp_path / missing).unlink()
        assert not manifest.is_done(StandIn())


def test_case_whose_marker_lists_more_than_there_is_is_not_done(tmp_path):
    with opened(tmp_path) as manifest:
        files = masks(tmp_path)
        (tmp_path / "a" / FOLDER_MARKER).write_text('{"files": ["liver.nii.gz", "lung.nii.gz"]}')
        manifest.add(entry(manifest, files=files))
        assert not manifest.is_done(StandIn())


@pytest.mark.parametrize("text", ["", '{"files": ["liver', "[]", '{"files": 1}'])
def test_case_whose_marker_is_damaged_is_not_done(tmp_path, text):
    with opened(tmp_path) as manifest:
        manifest.add(entry(manifest, files=masks(tmp_path)))
        (tmp_path / "a" / FOLDER_MARKER).write_text(text)
        assert not manifest.is_done(StandIn())


def test_files_of_a_case_are_relative_to_the_folder_also_through_links(tmp_path):
    (tmp_path / "real").mkdir()
    if os.name == "posix":
        (tmp_path / "out").symlink_to("real")
    assert masks(tmp_path / "real", files=["x"]) == ("a/totalfast-complete.json", "a/x")
    marker = tmp_path / "real" / "a" / FOLDER_MARKER
    marker.write_text('{"files": ["x", "../beside"]}')
    expected = ("a/totalfast-complete.json", "a/x", "beside")
    assert completed_files(marker, tmp_path / "out") == expected or os.name != "posix"
    assert completed_files(tmp_path / "missing", tmp_path) == ()


def test_entry_is_on_the_disk_when_add_returns(tmp_path, monkeypatch):
    synced = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda f: (synced.append(os.fstat(f).st_size), real(f)))
    with opened(tmp_path) as manifest:
        manifest.add(entry(manifest))
        assert synced[-1] == manifest.file.stat().st_size


@pytest.mark.parametrize(
    "fields",
    [{"state": FAILED}, {"fingerprint": "2"}, {"options": "0"}, {"files": ("a/liver.nii.gz",)}],
    ids=["failed", "other input", "other options", "no marker"],
)
def test_case_is_not_done(tmp_path, fields):
    with opened(tmp_path) as manifest:
        manifest.add(entry(manifest, **{"files": masks(tmp_path), **fields}))
        assert not manifest.is_done(StandIn())


def test_other_options_are_refused_and_named_with_both_values(tmp_path):
    done(tmp_path)
    before = (tmp_path / "manifest.jsonl").read_bytes()
    other = {**OPTIONS, "fast": False, "export": "linear"}
    with pytest.raises(OptionError) as refused:
        opened(tmp_path, other)
    message = str(refused.value)
    assert "fast was True and is now False" in message
    assert "export was not given and is now 'linear'" in message
    assert "-o" in message
    assert "task" not in message
    assert (tmp_path / "manifest.jsonl").read_bytes() == before
    opened(tmp_path).close()  # and the lock is free


def test_other_options_of_another_part_are_refused(tmp_path):
    with opened(tmp_path, part=(1, 2)) as manifest:
        manifest.add(entry(manifest))
    with pytest.raises(OptionError, match="fast was True"):
        opened(tmp_path, {**OPTIONS, "fast": False}, part=(0, 2))
    assert not (tmp_path / "manifest-0-of-2.jsonl").exists()


@pytest.mark.parametrize("part", [(0, 1), (1, 2)])
def test_batch_that_ended_before_its_first_case_leaves_the_options_free(tmp_path, part):
    opened(tmp_path, part=part).close()
    other = {**OPTIONS, "fast": False}
    with opened(tmp_path, other) as manifest:
        manifest.add(entry(manifest))
    opened(tmp_path, other).close()
    with pytest.raises(OptionError):
        opened(tmp_path)


def test_running_batch_without_a_finished_case_binds_the_options(tmp_path):
    with opened(tmp_path, part=(1, 2)), pytest.raises(OptionError, match="fast was True"):
        opened(tmp_path, {**OPTIONS, "fast": False}, part=(0, 2))


def test_of_two_batches_started_together_with_other_options_one_is_refused(tmp_path, monkeypatch):
    listed = module.manifest_files
    others = []

    def list_then_start_another(folder):
        files = listed(folder)
        if not others:
            others.append(None)
            others.append(opened(folder, {**OPTIONS, "fast": False}, part=(1, 2)))
        return files

    monkeypatch.setattr(module, "manifest_files", list_then_start_another)
    with pytest.raises(OptionError, match="fast was False and is now True"):
        opened(tmp_path, part=(0, 2))
    others[1].close()
    assert [path.name for path in listed(tmp_path)] == ["manifest-1-of-2.jsonl"]


def test_second_process_of_a_part_is_refused_until_the_first_ends(tmp_path):
    first, second = opened(tmp_path, part=(0, 2)), opened(tmp_path, part=(1, 2))
    with first, second, pytest.raises(OutputError, match=r"another process .*manifest-1-of-2"):
        opened(tmp_path, part=(1, 2))
    opened(tmp_path, part=(1, 2)).close()


@pytest.mark.parametrize("part", [(2, 2), (-1, 2), (0, 0)])
def test_part_that_does_not_exist_is_refused(tmp_path, part):
    with pytest.raises(OptionError, match="part"):
        opened(tmp_path, part=part)


def test_parts_merge_and_a_later_number_of_parts_sees_what_is_done(tmp_path):
    for number, name in enumerate("ab"):
        with opened(tmp_path, part=(number, 2)) as manifest:
            manifest.add(entry(manifest, name, files=masks(tmp_path, name)))
    with opened(tmp_path) as manifest:
        assert manifest.is_done(StandIn("a"))
        assert manifest.is_done(StandIn("b"))
        assert list(manifest.entries()) == ["a", "b"]


def test_entries_of_other_processes_are_read_while_they_run(tmp_path):
    with opened(tmp_path, part=(0, 2)) as first, opened(tmp_path, part=(1, 2)) as second:
        second.add(entry(second, "b"))
        assert list(first.entries()) == ["b"]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize(
    ("states", "seconds", "last"),
    [
        ((FAILED, DONE), (1, 2), DONE),
        ((DONE, FAILED), (1, 2), FAILED),
        ((DONE, FAILED), (1, 1), DONE),
    ],
)
def test_last_entry_by_time_counts_wherever_it_stands(order, states, seconds, last):
    entries = [
        Entry(name="a", state=state, finished=f"2026-11-27T10:00:0{second}+00:00")
        for state, second in zip(states, seconds, strict=True)
    ]
    assert last_entries(entries[k] for k in order)["a"].state == last


def test_times_are_compared_as_times_not_as_text():
    texts = ["2026-11-27T10:00:00Z", "2026-11-27T10:00:00.5+00:00", "2026-11-27T11:00:00.1+01:00"]
    by_time = sorted(texts, key=lambda t: Entry(name="a", state=DONE, finished=t).finished_s)
    assert by_time == [texts[0], texts[2], texts[1]]
    assert Entry(name="a", state=DONE, finished="yesterday").finished_s == 0


def test_line_cut_at_any_byte_is_ignored_and_the_next_one_is_whole(tmp_path):
    done(tmp_path)
    file = tmp_path / "manifest.jsonl"
    whole = file.read_bytes()
    line = json.dumps(Entry(name="cut", state=DONE).to_json()).encode()
    for length in range(len(line)):
        file.write_bytes(whole + line[:length])
        assert list(read_entries(tmp_path)) == ["a"]
        with opened(tmp_path) as manifest:
            manifest.add(entry(manifest, "new"))
        assert list(read_entries(tmp_path)) == ["a", "new"]


@pytest.mark.parametrize("rest", [b"\0" * 64, b"\xff\xfe{", b"[" * 200_000, b'{"name": NaN'])
def test_garbage_after_a_power_failure_is_ignored(tmp_path, rest):
    done(tmp_path)
    file = tmp_path / "manifest.jsonl"
    file.write_bytes(file.read_bytes() + rest)
    with opened(tmp_path) as manifest:
        assert manifest.is_done(StandIn())
        manifest.add(entry(manifest, "b"))
    assert list(read_entries(tmp_path)) == ["a", "b"]


def test_header_cut_at_any_byte_is_written_again(tmp_path):
    opened(tmp_path).close()
    file = tmp_path / "manifest.jsonl"
    header = file.read_bytes()
    for length in range(0, len(header), 7):
        file.write_bytes(header[:length])
        with opened(tmp_path) as manifest:
            manifest.add(entry(manifest))
        content = read_content(file)
        assert len(content.options) == len(content.entries) == 1


def test_file_of_a_newer_format_is_refused(tmp_path):
    (tmp_path / "manifest.jsonl").write_text('{"manifest": 2, "options": {}}\n')
    with pytest.raises(OutputError, match="format 2"):
        opened(tmp_path)


def test_threads_append_whole_lines(tmp_path):
    with opened(tmp_path) as manifest:
        threads = [
            threading.Thread(
                target=lambda t=t: [manifest.add(entry(manifest, f"{t}-{k}")) for k in range(20)]
            )
            for t in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(lines(tmp_path / "manifest.jsonl")) == 1 + 80
    assert len(read_entries(tmp_path)) == 80


def test_folder_that_can_not_be_made_is_an_output_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file"):
        opened(tmp_path / "file" / "out")


APPENDING = """
    import json, sys
    from pathlib import Path
    from totalfast.batch.results.entries import Entry
    from totalfast.batch.results.manifest import Manifest, completed_files
    from totalfast.files.targets import FOLDER_MARKER
    folder = Path(sys.argv[1])
    class Case:
        def __init__(self, number):
            self.name = f"case-{number:04}"
        def fingerprint(self):
            return self.name
    with Manifest(folder, {"task": "total"}) as manifest:
        for case in map(Case, range(5000)):
            if manifest.is_done(case):
                continue
            place = folder / case.name
            place.mkdir(exist_ok=True)
            (place / "mask").write_text("x")
            (place / FOLDER_MARKER).write_text('{"files": ["mask"]}')
            manifest.add(Entry(
                name=case.name, state="done", options=manifest.options_hash(),
                fingerprint=case.name, warnings=["w" * 3000],
                files=completed_files(place / FOLDER_MARKER, folder),
            ))
            print(case.name, flush=True)
"""


def started(program, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@needs_posix
def test_killed_at_twenty_moments_no_case_is_lost_and_none_done_twice(tmp_path):
    acknowledged = []
    for moment in range(20):
        child = started(APPENDING, tmp_path)
        acknowledged += [child.stdout.readline().strip() for _ in range(1 + moment % 4)]
        threading.Event().wait(0.0007 * moment)
        child.kill()
        rest, errors = child.communicate()
        assert not errors
        acknowledged += rest.split()
        known = read_entries(tmp_path)
        assert set(acknowledged) <= known.keys()
        assert all(known[name].state == DONE for name in known)
    assert len(acknowledged) == len(set(acknowledged)) >= 20
    names = [entry.name for entry in read_content(tmp_path / "manifest.jsonl").entries]
    assert len(names) == len(set(names))
    assert sorted(names) == [f"case-{number:04}" for number in range(len(names))]


@needs_posix
def test_lock_of_a_killed_process_is_free(tmp_path):
    child = started(APPENDING, tmp_path)
    child.stdout.readline()
    with pytest.raises(OutputError, match="another process"):
        opened(tmp_path, {"task": "total"})
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    opened(tmp_path, {"task": "total"}).close()


LIMITED = """
    import resource, sys
    from pathlib import Path
    from totalfast.batch.results.entries import Entry
    from totalfast.batch.results.manifest import Manifest
    from totalfast.errors import OutputError
    with Manifest(Path(sys.argv[1]), {"task": "total"}) as manifest:
        size = manifest.file.stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 1000, resource.RLIM_INFINITY))
        try:
            for number in range(100):
                manifest.add(Entry(name=f"{number:03}", state="done"))
        except OutputError as error:
            print(number, error)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        manifest.add(Entry(name="after", state="done"))
"""


@needs_posix
def test_full_disk_is_an_output_error_and_leaves_whole_lines(tmp_path):
    """A limit of the file's size acts as a full disk: the last write is short, the next fails."""
    output, errors = started(LIMITED, tmp_path).communicate()
    assert not errors
    number, message = output.split(" ", 1)
    assert str(tmp_path / "manifest.jsonl") in message
    assert "same command again" in message
    assert int(number) >= 1
    data = (tmp_path / "manifest.jsonl").read_bytes()
    assert data.count(b"\n") == 1 + int(number) + 1 + 1  # header, whole, cut and last line
    assert list(read_entries(tmp_path)) == [*(f"{k:03}" for k in range(int(number))), "after"]


def test_what_is_written_from_all_entries_is_written_by_one_part_at_a_time(tmp_path):
    with opened(tmp_path, part=(0, 2)) as one, opened(tmp_path, part=(1, 2)) as other:
        one.add(entry(one, "a"))
        written, began = [], threading.Event()

        def write_the_other():
            other.add(entry(other, "b"))
            began.set()
            with other.summing_up() as entries:
                written.append(sorted(entries))

        thread = threading.Thread(target=write_the_other)
        with one.summing_up() as entries:
            thread.start()
            assert began.wait(10)
            written.append(sorted(entries))
        thread.join(10)
    assert written == [["a"], ["a", "b"]]


def test_an_error_before_the_first_case_removes_the_file_but_never_entries(tmp_path):
    with pytest.raises(KeyError), opened(tmp_path):
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with opened(tmp_path) as manifest:
        manifest.add(entry(manifest))
    with pytest.raises(KeyError), opened(tmp_path):
        raise KeyError
    assert list(read_entries(tmp_path)) == ["a"]
