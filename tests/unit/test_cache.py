"""The cache folder: trust, entries, leftovers, pruning, compiled loops."""

from __future__ import annotations

import copy
import json
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from totalfast.backends.cache import CHECKSUMS, cached_folder, content_key
from totalfast.errors import OptionError
from totalfast.system import cache_folder as places
from totalfast.system.cache_entries import (
    ABANDONED_AFTER_S,
    LIMIT_VARIABLE,
    limit_bytes,
    list_entries,
    remove,
)
from totalfast.system.cache_folder import FOLDER_VARIABLE, distrust, usable_cache

posix = pytest.mark.skipif(os.name != "posix", reason="Windows has other owners and modes")
FILES = ("weights",)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv(FOLDER_VARIABLE, str(folder))
    monkeypatch.delenv(LIMIT_VARIABLE, raising=False)
    places._warn.cache_clear()
    return folder


class Writer:
    """Writes an entry and counts how often."""

    def __init__(self, size=4):
        self.count, self.size = 0, size

    def __call__(self, folder):
        self.count += 1
        (folder / "weights").write_bytes(b"1" * self.size)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have other folders")
def test_the_folder_is_the_environment_variables_or_the_users(cache, monkeypatch, tmp_path):
    assert places.cache_folder() == cache
    monkeypatch.delenv(FOLDER_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert places.cache_folder() == tmp_path / "xdg/totalfast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert places.cache_folder() == tmp_path / "home/.cache/totalfast"


@posix
def test_without_a_home_there_is_no_cache_and_no_folder_named_tilde(monkeypatch, tmp_path, caplog):
    import pwd

    def unknown(number):
        raise KeyError(number)

    for name in (FOLDER_VARIABLE, "HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert cached_folder("openvino-1", FILES, Writer()) is None
    assert len(caplog.messages) == 1
    assert "no home folder" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_key_depends_on_weights_layers_and_settings():
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv3d(1, 2, 3), torch.nn.LeakyReLU(0.01))
    key = content_key(network, {"shape": (16, 16, 16)})
    assert content_key(copy.deepcopy(network), {"shape": (16, 16, 16)}) == key
    other, steeper = copy.deepcopy(network), copy.deepcopy(network)
    other[0].bias.data[0] += 1e-6
    steeper[1].negative_slope = 0.02
    keys = {content_key(changed, {"shape": (16, 16, 16)}) for changed in (network, other, steeper)}
    assert len(keys | {content_key(network, {"shape": (16, 16, 32)})}) == 4


@posix
def test_new_folders_are_private_whatever_the_umask(cache):
    before = os.umask(0)
    try:
        folder = cached_folder("openvino-1", FILES, Writer())
    finally:
        os.umask(before)
    for path in (cache, folder):
        assert path.stat().st_mode & 0o777 == 0o700


def damages(entry):
    manifest = entry / CHECKSUMS
    yield lambda: (entry / "weights").write_bytes(b"1112")
    yield lambda: (entry / "weights").unlink()
    yield lambda: manifest.write_text("{}")
    yield lambda: manifest.write_text("[1]")
    yield lambda: manifest.write_text('{"weights')
    yield lambda: manifest.write_text(json.dumps({"other": 0}))
    yield lambda: manifest.write_bytes(b"\xff\xfe")
    yield lambda: manifest.unlink()
    yield lambda: [(entry / name).unlink() for name in (CHECKSUMS, "weights")]
    yield lambda: (remove(entry), entry.write_text("a file in its place"))


def test_entries_are_written_once_and_again_if_damaged(cache):
    write = Writer()
    for _ in range(2):
        entry = cached_folder("openvino-1", FILES, write)
    assert write.count == 1
    for number, damage in enumerate(damages(entry), start=2):
        damage()
        assert (cached_folder("openvino-1", FILES, write) / "weights").read_bytes() == b"1111"
        assert write.count == number
    assert [path.name for path in cache.iterdir()] == ["openvino-1"]


@posix
def test_entries_that_others_can_have_written_are_written_again(cache, tmp_path):
    write = Writer()
    entry = cached_folder("openvino-1", FILES, write)
    planted = tmp_path / "planted"
    entry.rename(planted)
    entry.symlink_to(planted)
    assert not cached_folder("openvino-1", FILES, write).is_symlink()
    assert write.count == 2
    assert (planted / "weights").exists()  # the link's target is not touched
    entry.chmod(0o777)
    cached_folder("openvino-1", FILES, write)
    assert write.count == 3
    assert entry.stat().st_mode & 0o777 == 0o700


@posix
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root")
def test_entries_of_another_user_are_written_again_and_its_folder_is_not_used(cache, caplog):
    write = Writer()
    entry = cached_folder("openvino-1", FILES, write)
    os.chown(entry, 12345, 12345)
    cached_folder("openvino-1", FILES, write)
    assert (write.count, entry.stat().st_uid) == (2, 0)
    os.chown(cache, 12345, 12345)
    for _ in range(2):
        assert cached_folder("openvino-1", FILES, write) is None
    (message,) = caplog.messages
    assert "belongs to another user (id 12345, yours is 0)" in message
    assert FOLDER_VARIABLE in message


@posix
def test_a_folder_that_all_can_write_to_and_a_link_are_not_used(cache, tmp_path, caplog):
    cache.mkdir()
    cache.chmod(0o777)
    assert usable_cache() is None
    assert "other users can write to it (mode 777)" in caplog.messages[-1]
    cache.rmdir()
    (tmp_path / "real").mkdir()
    cache.symlink_to(tmp_path / "real")
    assert usable_cache() is None
    assert "symbolic link" in caplog.messages[-1]
    assert list((tmp_path / "real").iterdir()) == []


@posix
def test_a_folder_from_umask_002_is_closed_to_the_group_and_used(cache):
    cache.mkdir()
    cache.chmod(0o775)
    assert usable_cache() == cache
    assert distrust(cache) == ""
    assert cache.stat().st_mode & 0o777 == 0o755


def test_a_file_in_place_of_the_folder_is_named_once_and_ends_nothing(cache, caplog):
    cache.touch()
    for _ in range(2):
        assert cached_folder("openvino-1", FILES, Writer()) is None
    (message,) = caplog.messages
    assert "it is not a folder" in message


@posix
@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write")
def test_a_read_only_folder_is_read(cache, caplog):
    write = Writer()
    entry = cached_folder("openvino-1", FILES, write)
    cache.chmod(0o500)
    with caplog.at_level(logging.INFO, logger="totalfast"):
        assert cached_folder("openvino-1", FILES, write) == entry
        assert cached_folder("openvino-2", FILES, write) is None
    cache.chmod(0o700)
    assert "can't be kept" in caplog.text


def test_a_failed_conversion_leaves_nothing(cache):
    def fail(folder):
        (folder / "half").write_bytes(b"12")
        raise RuntimeError("conversion failed")

    with pytest.raises(RuntimeError, match="conversion failed"):
        cached_folder("openvino-1", FILES, fail)
    assert list(cache.iterdir()) == []


def test_a_full_disk_is_no_error(cache, caplog):
    def fail(folder):
        raise OSError(28, "No space left on device")

    with caplog.at_level(logging.INFO, logger="totalfast"):
        assert cached_folder("openvino-1", FILES, fail) is None
    assert "No space left" in caplog.text
    assert list(cache.iterdir()) == []


KILLED = """
import os, pathlib, signal, sys
from totalfast.system.cache_entries import unfinished_entry
with unfinished_entry(pathlib.Path(sys.argv[1])) as entry:
    (entry / "weights").write_bytes(b"half")
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_leftovers_of_a_killed_process_go_and_those_of_a_running_one_stay(cache):
    cache.mkdir(mode=0o700)
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, cache],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout.readline() == "ready\n"
        cached_folder("openvino-1", FILES, Writer())
        assert len(list(cache.glob(".new-*"))) == 1
        process.kill()
    cached_folder("openvino-1", FILES, Writer())
    assert [path.name for path in cache.iterdir()] == ["openvino-1"]


def test_leftovers_without_a_lock_go_when_they_are_old(cache):
    cache.mkdir(mode=0o700)
    for name in (".new-young", ".new-old", ".old-removed"):
        (cache / name).mkdir()
        (cache / name / "weights").touch()
    long_ago = time.time() - ABANDONED_AFTER_S - 60
    os.utime(cache / ".new-old", (long_ago, long_ago))
    cached_folder("openvino-1", FILES, Writer())
    assert sorted(path.name for path in cache.iterdir()) == [".new-young", "openvino-1"]


def test_least_recently_used_entries_are_pruned_to_the_limit(cache, monkeypatch):
    monkeypatch.setenv(LIMIT_VARIABLE, "0.0000035")  # 3500 bytes: three entries and their manifests
    write = Writer(size=1000)
    for number in range(3):
        entry = cached_folder(f"openvino-{number}", FILES, write)
        os.utime(entry, (number, number))
    cached_folder("openvino-0", FILES, write)  # used again, so 1 is the oldest now
    cached_folder("openvino-3", FILES, write)
    names = [entry.folder.name for entry in list_entries(cache, "openvino-")]
    assert names == ["openvino-2", "openvino-0", "openvino-3"]
    assert write.count == 4
    cached_folder("openvino-4", FILES, Writer(size=9000))  # above the limit on its own
    assert [path.name for path in cache.iterdir()] == ["openvino-4"]


@posix
def test_pruned_entries_stay_readable_for_those_who_have_mapped_them(cache):
    entry = cached_folder("openvino-1", FILES, Writer(size=8192))
    mapped = np.memmap(entry / "weights", mode="r")
    assert remove(entry)
    assert not entry.exists()
    assert (mapped == ord("1")).all()
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("text", ["many", "-1", "nan", "inf"])
def test_a_wrong_limit_is_named(monkeypatch, text):
    monkeypatch.setenv(LIMIT_VARIABLE, text)
    with pytest.raises(OptionError, match=f"{LIMIT_VARIABLE} must be a number of GB.*'{text}'"):
        limit_bytes()


def test_threads_that_write_and_remove_the_same_entry_never_see_half_of_it(cache):
    errors, found = [], []

    def work():
        for _ in range(20):
            folder = cached_folder("openvino-1", FILES, Writer(size=100_000))
            if folder is None:
                continue  # another thread was faster: the caller does without the cache
            found.append(folder)
            try:
                content = (folder / "weights").read_bytes()
            except FileNotFoundError:
                continue  # removed meanwhile
            if len(content) != 100_000:
                errors.append(len(content))
            remove(folder)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(found) > 20
    assert [path for path in cache.iterdir() if path.name != "openvino-1"] == []


LOOPS = """
import logging, pathlib, sys
logging.basicConfig(format="%(message)s", stream=sys.stdout)
sys.path.insert(0, sys.argv[1])
import numpy as np
from totalfast.system import loops
if len(sys.argv) > 2:
    loops._state_of_the_package = lambda: sys.argv[2]
import loops_of_test
loops_of_test.one(np.ones(3)); loops_of_test.two(np.ones(3))
print("HITS", sum(sum(f.stats.cache_hits.values()) for f in (loops_of_test.one, loops_of_test.two)))
"""
MODULE = """
from totalfast.system.loops import jit
@jit
def one(values):
    return values.sum()
@jit
def two(values):
    return values.sum() + 1
"""


@pytest.fixture
def installation(tmp_path):
    """A module with compiled loops that the unprivileged user of ``run`` can't write beside."""
    tmp_path.chmod(0o755)
    folder = tmp_path / "installation"
    folder.mkdir()
    (folder / "loops_of_test.py").write_text(MODULE)
    # A file in place of the folder that numba wants: also root can't write there.
    (folder / "__pycache__").touch()
    return folder


def run_loops(folder, *state, **changes):
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("NUMBA_CACHE_DIR", None)
    environment |= {name: str(value) for name, value in changes.items()}
    done = subprocess.run(
        [sys.executable, "-c", LOOPS, folder, *state],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_loops_of_a_read_only_installation_are_kept_in_the_cache(installation, cache):
    assert run_loops(installation) == ["HITS 0"]
    assert run_loops(installation) == ["HITS 2"]
    assert len(list((cache / "compiled-loops").glob("*/*.nbi"))) == 2


def test_loops_are_compiled_again_if_another_module_of_the_package_has_changed(installation, cache):
    assert run_loops(installation) == ["HITS 0"]
    assert run_loops(installation, "changed") == ["HITS 0"]
    assert run_loops(installation, "changed") == ["HITS 2"]
    assert run_loops(installation) == ["HITS 2"]


def test_numbas_own_variable_has_precedence(installation, cache, tmp_path):
    assert run_loops(installation, NUMBA_CACHE_DIR=tmp_path / "own") == ["HITS 0"]
    assert list((tmp_path / "own").glob("*/*.nbi"))
    assert not cache.exists()


def test_loops_that_cannot_be_kept_are_compiled_and_named_once(installation, cache):
    cache.touch()
    first, second, hits = run_loops(installation)
    assert "it is not a folder" in first
    assert "can't be kept" in second
    assert FOLDER_VARIABLE in second
    assert hits == "HITS 0"


@pytest.mark.parametrize("content", [b"", b"\x80\x05nothing", b"no pickle"])
def test_damaged_files_of_compiled_loops_are_written_again(installation, cache, content):
    run_loops(installation)
    for ending in ("nbi", "nbc"):
        for path in Path(cache).rglob(f"*.{ending}"):
            path.write_bytes(content)
        assert run_loops(installation) == ["HITS 0"]
        assert run_loops(installation) == ["HITS 2"]
