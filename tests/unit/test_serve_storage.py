"""Files of submitted runs: how much of the disk they may take, and where paths may lead."""

from __future__ import annotations

import shutil

import pytest

from totalfast.serve.http_limits import HttpLimits, OutsideError
from totalfast.serve.storage import FullError, Storage


def test_all_folders_together_are_bounded(tmp_path):
    storage = Storage(tmp_path, limit_bytes=100, free_bytes=0)
    first, second = storage.new_folder(), storage.new_folder()
    storage.claim(first, 60)
    storage.claim(second, 40)
    for refused in (storage.check, lambda count: storage.claim(second, count)):
        with pytest.raises(FullError, match="--max-storage"):
            refused(1)
    storage.claim(second, -10)
    assert storage.used_bytes == 90
    (second / "sub").mkdir()
    (second / "sub" / "file").write_bytes(b"0" * 25)
    storage.measure(second)
    assert storage.used_bytes == 85
    storage.remove(first)
    assert (storage.used_bytes, first.exists()) == (25, False)
    storage.measure(first)
    assert storage.used_bytes == 25


def test_a_part_of_the_disk_stays_free(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    storage = Storage(tmp_path, limit_bytes=10 * free, free_bytes=free // 2)
    with pytest.raises(FullError, match="MB left"):
        storage.check(free)
    storage.check(1)


def test_paths_are_returned_without_links_and_again_checked(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "scan").mkdir(parents=True)
    outside.mkdir()
    (root / "link").symlink_to(root / "scan")
    limits = HttpLimits(roots=(root,))
    paths = {"input": str(root / "link"), "output": str(root / "seg.nii.gz")}
    assert limits.check_again(paths, ())["input"] == str((root / "scan").resolve())
    (root / "scan" / "inner").symlink_to(root / "link")
    limits.check_again(paths, ())
    (root / "scan" / "inner2").symlink_to(outside)
    with pytest.raises(OutsideError):
        limits.check_again(paths, ())
    (root / "scan" / "inner2").unlink()
    (root / "link").unlink()
    (root / "link").symlink_to(outside)
    with pytest.raises(OutsideError):
        limits.check_again(paths, ())
    own = {"input": "/elsewhere/scan", "output": "/elsewhere/seg", "report": str(root / "r.json")}
    assert limits.check_again(own, ("input", "output")) == {
        **own,
        "report": str(root.resolve() / "r.json"),
    }
