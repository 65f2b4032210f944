"""Shared fixtures, and a guard that every test uses."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import filelock
import pytest

# The test extra installs OpenVINO, and "auto" would use it. Commands that tests start inherit this.
os.environ["TOTALFAST_BACKEND"] = "torch"

TINY_IDS = (
    [291, 292, 293, 294, 295, 297, 298]  # total, fast, fastest
    + [299, 300, 343]  # body, trunk_cavities
    + [850, 851]  # total_mr
    + [258, 301, 315, 570]  # tasks that segment only a region
)


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell lets its background jobs ignore Ctrl-C, and they hand that on to what they start.
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def standin_home(tmp_path_factory) -> Path:
    """Folder with tiny stand-in weights; TOTALFAST_STANDIN_HOME names an existing one."""
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


@pytest.fixture
def standins_are_used(standin_home, monkeypatch):
    """Let this process find the stand-in weights as a user's models."""
    monkeypatch.delenv("TOTALSEG_WEIGHTS_PATH", raising=False)
    monkeypatch.setenv("TOTALSEG_HOME_DIR", str(standin_home))


@pytest.fixture(autouse=True)
def _nothing_left_behind(tmp_path_factory, monkeypatch):
    """Fail on leaked temporary files, child processes and changed torch settings.

    Each test has its own folder for temporary files, also for the commands that it starts, so other
    programs on the machine have no influence.
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


@pytest.fixture(autouse=True)
def _log_as_before():
    """Undo what a command that is run in this process sets: it prints the log on its own stdout."""
    logger = logging.getLogger("totalfast")
    before = logger.handlers, logger.propagate, logger.level
    yield
    logger.handlers, logger.propagate = before[:2]
    logger.setLevel(before[2])


def _is_torchs(path: Path) -> bool:
    """Whether torch left a path: its compiler's cache, or a template for remote modules (2.7)."""
    template = path / "_remote_module_non_scriptable.py"
    return path.match("torchinductor_*") or template.exists()


def _torch_settings():
    import torch  # waits if a thread of a refused run still imports it

    return (
        torch.get_num_threads(),
        torch.backends.cudnn.benchmark,
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
    )


@pytest.fixture(scope="session")
def scans(tmp_path_factory):
    """Folder of the synthetic scans, shared by the tests of one process."""
    return tmp_path_factory.mktemp("scans")


@contextlib.contextmanager
def _one_at_a_time(tmp_path_factory, name: str) -> Iterator[Path]:
    """Yield the same path in all processes of a test run, to one process at a time."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with filelock.FileLock(folder / f"{name}.lock"):
        yield folder / name
