"""Fixtures that every test gets: nothing may be left behind."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import filelock
import pytest

# The tests' extra brings OpenVINO, which "auto" would take; for commands that tests start, too.
os.environ["TOTALFAST_BACKEND"] = "torch"

TINY_IDS = (
    [291, 292, 293, 294, 295, 297, 298]  # total, fast, fastest
    + [299, 300, 343]  # body, trunk_cavities
    + [850, 851]  # total_mr
    + [258, 301, 315, 570]  # tasks that look at a region
)


@pytest.fixture(scope="session")
def standin_home(tmp_path_factory) -> Path:
    """Folder with tiny stand-in weights; TOTALFAST_STANDIN_HOME reuses one made before."""
    ready = os.environ.get("TOTALFAST_STANDIN_HOME")
    if ready:
        return Path(ready)
    maker = Path(__file__).resolve().parents[1] / "scripts" / "make_standin_weights.py"
    with _one_at_a_time(tmp_path_factory, "standins") as home:
        if not home.exists():
            subprocess.run(
                [sys.executable, maker, home, "--tiny", "--ids", *map(str, TINY_IDS)], check=True
            )
    return home


@pytest.fixture(autouse=True)
def _nothing_left_behind(tmp_path_factory, monkeypatch):
    """Fail on leaked temporary files, child processes and changed torch settings.

    Temporary files, those of started commands too, go to a folder of the test's own, so that other
    programs on the machine do not matter.
    """
    temporary = tmp_path_factory.mktemp("temporary")
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr(tempfile, "tempdir", None)
    settings = _torch_settings() if "torch" in sys.modules else None
    yield
    leaked = [path.name for path in temporary.iterdir() if not _is_torchs(path)]
    assert not leaked, f"left in the temporary folder: {leaked}"
    assert not multiprocessing.active_children()
    if settings:
        assert _torch_settings() == settings


def _is_torchs(path: Path) -> bool:
    """Whether torch left a path: its compiler's cache, or a template for remote modules (2.7)."""
    template = path / "_remote_module_non_scriptable.py"
    return path.match("torchinductor_*") or template.exists()


def _torch_settings():
    import torch  # waits, where a thread that a refused run left behind is still importing it

    return (
        torch.get_num_threads(),
        torch.backends.cudnn.benchmark,
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
    )


@pytest.fixture(scope="session")
def scans(tmp_path_factory):
    """Folder for the made scans, which the tests of one process share."""
    return tmp_path_factory.mktemp("scans")


@contextlib.contextmanager
def _one_at_a_time(tmp_path_factory, name: str) -> Iterator[Path]:
    """Give a path that is the same for all processes of a test run, to one of them at a time."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with filelock.FileLock(folder / f"{name}.lock"):
        yield folder / name
