"""Files of a run appear together or not at all, whatever happens at any step."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import filelock
import pytest

from totalfast.errors import InterruptedAfterSaving, OutputError
from totalfast.system import pending_files, staging
from totalfast.system.pending_files import PendingFiles
from totalfast.system.signals import signals_held
from totalfast.system.staging import PREFIX, Staging, recover

NAMES = ("a", "b", "c")
needs_posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals and rights")


@pytest.fixture(autouse=True)
def rescue(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("rescue")
    monkeypatch.setenv("TOTALFAST_RESCUE_DIR", str(folder))
    return folder


def write(files, folder, text, names=NAMES):
    for name in names:
        files.write(folder / name, lambda path: path.write_text(text))


def contents(folder):
    """All files below a folder, hidden ones too."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_text() for path in paths}


def save(folder, text, **keywords):
    with PendingFiles(**keywords) as files:
        write(files, folder, text)
        files.commit()


@pytest.fixture
def old(tmp_path):
    """A folder with the results of another run."""
    folder = tmp_path / "out"
    folder.mkdir()
    for name in NAMES:
        (folder / name).write_text("old")
    return folder


@pytest.mark.parametrize("exists", [True, False])
def test_files_get_their_names_together(tmp_path, exists):
    folder = tmp_path / "new" / "out"
    if exists:
        folder.mkdir(parents=True)
    with PendingFiles() as files:
        write(files, folder, "new")
        visible = [path for path in tmp_path.rglob("*") if PREFIX not in str(path)]
        assert not [path for path in visible if path.is_file()]
        files.commit()
    assert contents(tmp_path / "new") == {f"out/{name}": "new" for name in NAMES}
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_a_new_folder_appears_by_one_rename(tmp_path):
    with PendingFiles() as files:
        write(files, tmp_path / "x" / "out", "new")
        (stage,) = files._stagings.values()
        assert [move.name for move in stage.moves()] == ["x"]


def test_files_that_are_not_committed_disappear(old):
    with pytest.raises(RuntimeError, match="stop"), PendingFiles() as files:
        write(files, old, "new")
        raise RuntimeError("stop")
    assert contents(old) == dict.fromkeys(NAMES, "old")


def renames_that_fail_at(monkeypatch, number, error):
    """Let the rename with this number raise an error; return the list of all renames."""
    calls, real = [], Path.rename

    def rename(self, target):
        calls.append(target)
        if len(calls) == number:
            raise error
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    return calls


def test_a_rename_that_fails_at_any_step_changes_nothing(old, monkeypatch):
    with monkeypatch.context() as patch:
        calls = renames_that_fail_at(patch, 0, None)
        save(old, "old")
    assert len(calls) >= 2 * len(NAMES)
    for number in range(1, len(calls) + 1):
        with monkeypatch.context() as patch:
            renames_that_fail_at(patch, number, PermissionError(13, "Permission denied"))
            with pytest.raises(OutputError, match="Permission denied"):
                save(old, "new")
        assert contents(old) == dict.fromkeys(NAMES, "old"), number


def test_results_that_can_not_be_renamed_are_rescued(old, monkeypatch, rescue):
    with monkeypatch.context() as patch:
        renames_that_fail_at(patch, 4, OSError(5, "Input/output error"))
        with pytest.raises(OutputError, match=r"Input/output error\. They are complete in") as told:
            save(old, "new", rescue_from=old.parent)
    assert contents(old) == dict.fromkeys(NAMES, "old")
    (kept,) = rescue.iterdir()
    assert str(kept) in str(told.value)
    assert contents(kept) == {f"out/{name}": "new" for name in NAMES}
    assert stat.S_IMODE(kept.stat().st_mode) == 0o700 or os.name != "posix"


def test_a_disk_that_is_full_in_the_middle_rescues_all_files(old, rescue):
    def full(path):
        if rescue not in path.parents:
            path.write_text("ha")
            raise OSError(28, "No space left on device", str(path))
        path.write_text("new")

    with PendingFiles(rescue_from=old.parent) as files:
        write(files, old, "new", ["a"])
        files.write(old / "b", full)
        write(files, old, "new", ["c"])
        assert contents(files.staged(old)) == dict.fromkeys(NAMES, "new")
        with pytest.raises(OutputError, match="No space left on device"):
            files.commit()
    assert contents(old) == dict.fromkeys(NAMES, "old")
    (kept,) = rescue.iterdir()
    assert contents(kept) == {f"out/{name}": "new" for name in NAMES}


def test_if_nothing_can_be_rescued_the_error_says_so_and_nothing_is_left(old, rescue):
    def full(path):
        path.write_text("ha")
        raise OSError(28, "No space left on device", str(path))

    with (
        pytest.raises(OutputError, match=r"can't be kept elsewhere either: No space"),
        PendingFiles(rescue_from=old.parent) as files,
    ):
        files.write(old / "b", full)
    assert contents(old) == dict.fromkeys(NAMES, "old")
    assert list(rescue.iterdir()) == []


def test_rescued_files_disappear_if_the_run_fails_for_another_reason(old, rescue):
    def full(path):
        if rescue not in path.parents:
            raise OSError(28, "No space left on device")
        path.write_text("new")

    with pytest.raises(RuntimeError), PendingFiles(rescue_from=old.parent) as files:
        files.write(old / "a", full)
        raise RuntimeError
    assert list(rescue.iterdir()) == []


@needs_posix
@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_while_names_change_waits_until_all_have_changed(old, monkeypatch, number):
    received = []
    before = signal.signal(signal.Signals[number], lambda *_: received.append(number))
    real = Path.rename
    monkeypatch.setattr(
        Path,
        "rename",
        lambda self, target: (os.kill(os.getpid(), signal.Signals[number]), real(self, target))[1],
    )
    try:
        save(old, "new")
        assert received == [number]
    finally:
        signal.signal(signal.Signals[number], before)
    assert contents(old) == dict.fromkeys(NAMES, "new")


@needs_posix
def test_an_interruption_while_names_change_tells_that_all_have_changed(old, monkeypatch):
    real = Path.rename
    monkeypatch.setattr(
        Path,
        "rename",
        lambda self, target: (os.kill(os.getpid(), signal.SIGINT), real(self, target))[1],
    )
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may ignore it
    try:
        with pytest.raises(InterruptedAfterSaving):
            save(old, "new")
    finally:
        signal.signal(signal.SIGINT, before)
    assert contents(old) == dict.fromkeys(NAMES, "new")


@needs_posix
def test_held_signals_are_delivered_once_and_ignored_ones_stay_ignored():
    received = []
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    term = signal.signal(signal.SIGTERM, lambda *_: received.append(1))
    try:
        with signals_held():
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGHUP)
            assert received == []
        assert received == [1]
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
        signal.signal(signal.SIGTERM, term)


def test_signals_are_not_touched_in_other_threads():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def hold():
        with signals_held():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=hold)
    thread.start()
    thread.join()
    assert seen == [before]


KILLED = """
import os, pathlib, signal, sys
from totalfast.system.pending_files import PendingFiles
real, count = pathlib.Path.rename, 0
def rename(self, target):
    global count
    if count == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    count += 1
    return real(self, target)
pathlib.Path.rename = rename
folder = pathlib.Path(sys.argv[1])
with PendingFiles() as files:
    for name in "abc":
        files.write(folder / name, lambda path: path.write_text("new"))
    files.commit()
"""


@needs_posix
@pytest.mark.parametrize("step", range(8))
def test_after_a_kill_at_any_rename_nothing_is_mixed_and_the_next_run_restores(old, step):
    done = subprocess.run([sys.executable, "-c", KILLED, old, str(step)], check=False)
    if done.returncode == 0:
        assert contents(old) == dict.fromkeys(NAMES, "new")
        assert step > 2 * len(NAMES)  # the journal, and each name twice
        return
    assert done.returncode == -signal.SIGKILL
    visible = {path.name: path.read_text() for path in old.iterdir() if path.is_file()}
    assert len(set(visible.values())) <= 1
    recover(old)
    assert contents(old) == dict.fromkeys(NAMES, "old")


def test_a_folder_that_another_process_removes_before_it_is_locked_is_made_anew(
    tmp_path, monkeypatch
):
    removed, acquire = [], filelock.FileLock.acquire

    def acquire_late(self, **keywords):
        if not removed:
            recover(tmp_path)
            removed.append(1)
        return acquire(self, **keywords)

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire_late)
    save(tmp_path, "new")
    assert removed
    assert contents(tmp_path) == dict.fromkeys(NAMES, "new")


def test_a_folder_of_a_running_process_is_left_alone(old):
    with PendingFiles() as files:
        write(files, old, "new")
        recover(old)
        files.commit()
    assert contents(old) == dict.fromkeys(NAMES, "new")


def test_leftovers_without_a_lock_are_removed_when_they_are_empty_or_old(tmp_path, monkeypatch):
    (tmp_path / f"{PREFIX}empty").mkdir()
    folder = tmp_path / f"{PREFIX}0123456789abcdef"
    (folder / "new").mkdir(parents=True)
    recover(tmp_path)
    assert list(tmp_path.iterdir()) == [folder]
    monkeypatch.setattr(staging, "ABANDONED_AFTER_S", -1)
    recover(tmp_path)
    assert not folder.exists()


@needs_posix
def test_a_journal_can_not_reach_outside_of_its_folder(tmp_path):
    """Others may be able to write to the output folder."""
    (tmp_path / "precious").write_text("precious")
    out = tmp_path / "out"
    folder = out / f"{PREFIX}0123456789abcdef"
    for part in ("new", "old"):
        (folder / part).mkdir(parents=True)
    (folder / "lock").touch()
    for name in ("../precious", str(tmp_path / "precious"), ""):
        moves = [{"name": name, "replaces": False}]
        (folder / "journal.json").write_text(json.dumps({"moves": moves}))
        recover(out)
        assert (tmp_path / "precious").read_text() == "precious"
    (folder / "journal.json").write_text("[]")
    recover(out)
    link = out / f"{PREFIX}link"
    link.symlink_to(tmp_path)
    recover(out)
    assert (tmp_path / "precious").exists()


def test_two_processes_with_one_output_do_not_share_a_temporary_file(tmp_path):
    with PendingFiles() as first, PendingFiles() as second:
        write(first, tmp_path, "first")
        write(second, tmp_path, "second")
        first.commit()
        assert {name: (tmp_path / name).read_text() for name in NAMES} == dict.fromkeys(
            NAMES, "first"
        )
        second.commit()
    assert contents(tmp_path) == dict.fromkeys(NAMES, "second")


@needs_posix
def test_an_output_that_is_a_link_is_written_through(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "dangling").symlink_to("target")
    with PendingFiles() as files:
        write(files, tmp_path, "new", ["link", "dangling"])
        files.commit()
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == (tmp_path / "target").read_text() == "new"


@needs_posix
def test_the_staging_folder_is_only_for_this_user_and_is_never_a_link(tmp_path, monkeypatch):
    with PendingFiles() as files:
        write(files, tmp_path, "new", ["a"])
        (hidden,) = [path for path in tmp_path.iterdir() if path.name.startswith(PREFIX)]
        assert stat.S_IMODE(hidden.stat().st_mode) == 0o700
    monkeypatch.setattr(staging.secrets, "token_hex", lambda size: "known")
    (tmp_path / f"{PREFIX}known").symlink_to(tmp_path)
    with pytest.raises(OutputError, match="File exists"), PendingFiles() as files:
        write(files, tmp_path, "new", ["a"])
    assert not (tmp_path / "new").exists()


def test_permissions_of_results_are_those_of_ordinary_files(tmp_path):
    (tmp_path / "ordinary").write_text("")
    save(tmp_path / "out", "new")
    assert (tmp_path / "out/a").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_prepare_refuses_what_can_not_be_written_and_leaves_nothing(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    for target, message in (
        (tmp_path / "folder", "is a folder"),
        (tmp_path / "file" / "x", "file is no folder"),
        (tmp_path / ("x" * 300), "File name too long|can't write"),
        *(
            [(Path("/proc/x.nii"), "can't write /proc/x.nii")]
            if Path("/proc/self").exists()
            else []
        ),
        *([(Path(os.devnull), "no ordinary file")] if os.name == "posix" else []),
    ):
        with pytest.raises(OutputError, match=message), PendingFiles() as files:
            files.prepare([tmp_path / "new" / "fine", target])
    assert sorted(tmp_path.rglob("*")) == before


@needs_posix
@pytest.mark.skipif(os.name == "posix" and os.geteuid() == 0, reason="root may write anything")
def test_prepare_refuses_write_protected_files_and_folders(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "file").chmod(0o444)
    (tmp_path / "folder").mkdir(mode=0o555)
    for target in (tmp_path / "file", tmp_path / "folder" / "x"):
        with pytest.raises(OutputError, match=r"write-protected|denied"), PendingFiles() as files:
            files.prepare([target])


def test_the_longest_name_needs_no_room_for_a_temporary_ending(tmp_path):
    name = "x" * (255 - len(".nii.gz")) + ".nii.gz"
    with PendingFiles() as files:
        files.prepare([tmp_path / name])
        write(files, tmp_path, "new", [name])
        files.commit()
    assert contents(tmp_path) == {name: "new"}


def test_free_space_is_compared_with_the_expected_size(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(pending_files.shutil, "disk_usage", lambda folder: usage)
    with PendingFiles() as files:
        files.require_space({tmp_path / "a": 600, tmp_path / "new" / "b": 300})
        with pytest.raises(OutputError, match="free space, but the results need"):
            files.require_space({tmp_path / "a": 600, tmp_path / "b": 600})


def test_the_last_file_appears_last_and_its_old_version_goes_first(old, monkeypatch):
    (old / "marker").write_text("old")
    order, real = [], Path.rename

    def rename(self, target):
        order.append(Path(self).name if PREFIX not in str(self) else f"new {Path(target).name}")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with PendingFiles() as files:
        files.write(old / "marker", lambda path: path.write_text("new"), last=True)
        write(files, old, "new")
        files.commit()
    names = [name for name in order if "journal" not in name]
    assert names[0] == "marker"
    assert names[-1] == "new marker"


def test_a_folder_of_files_with_names_of_their_own(tmp_path):
    with PendingFiles() as files:
        files.write(tmp_path, lambda folder: (folder / "uid.dcm").write_text("new"), folder=True)
        assert files.targets == (Path(os.path.realpath(tmp_path)) / "uid.dcm",)
        files.commit()
    assert contents(tmp_path) == {"uid.dcm": "new"}


def test_undo_that_fails_keeps_the_old_files_for_the_next_run(old, monkeypatch, caplog):
    real, calls = Path.rename, []

    def rename(self, target):
        calls.append(target)
        if len(calls) >= 6:  # one of the new files, and all that would undo the renames
            raise OSError(5, "Input/output error")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OutputError):
        save(old, "new")
    monkeypatch.undo()
    assert "can't be restored" in caplog.text
    recover(old)
    assert contents(old) == dict.fromkeys(NAMES, "old")


def test_a_staging_folder_that_was_never_opened_is_removed_without_an_error(tmp_path):
    assert Staging(tmp_path).remove()


def test_threads_that_write_into_one_folder_do_not_disturb_each_other(tmp_path):
    def write(number):
        with PendingFiles() as files:
            files.write(tmp_path / f"{number}.txt", lambda path: path.write_text(str(number)))
            files.commit()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(400)))
    assert {path.name for path in tmp_path.iterdir()} == {f"{n}.txt" for n in range(400)}
