"""The folder of uploads: private, removed at the end, and after a crash by the next server."""

from __future__ import annotations

import stat
import tempfile
from pathlib import Path

from totalfast.serve.uploads import LOCK, PREFIX, upload_folder


def test_the_folder_is_private_and_removed():
    with upload_folder() as folder:
        assert stat.S_IMODE(folder.stat().st_mode) & 0o077 == 0
        (folder / "scan").write_text("x")
    assert not folder.exists()


def test_folders_of_dead_servers_are_removed_and_those_of_living_ones_stay(tmp_path):
    temporary = Path(tempfile.gettempdir())
    dead = temporary / f"{PREFIX}dead"
    (dead / "upload").mkdir(parents=True)
    (dead / LOCK).touch()
    other = temporary / f"{PREFIX}other"
    other.mkdir()
    (tmp_path / LOCK).touch()
    link = temporary / f"{PREFIX}link"
    link.symlink_to(tmp_path)
    try:
        with upload_folder() as first, upload_folder() as second:
            assert first.exists()
            assert second.exists()
            assert not dead.exists()
        assert other.exists()
        assert (tmp_path / LOCK).exists()
    finally:
        link.unlink()
        other.rmdir()
