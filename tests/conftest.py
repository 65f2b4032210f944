"""Fixtures that every test gets: nothing may be left behind."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

TINY_IDS = (
    [291, 292, 293, 294, 295, 297, 298]  # total, fast, fastest
    + [299, 343]  # body, trunk_cavities
    + [850, 851]  # total_mr
)


@pytest.fixture(scope="session")
def standin_home(tmp_path_factory) -> Path:
    """Folder with tiny stand-in weights; TOTALFAST_STANDIN_HOME reuses one made before."""
    ready = os.environ.get("TOTALFAST_STANDIN_HOME")
    if ready:
        return Path(ready)
    home = tmp_path_factory.mktemp("standins")
    maker = Path(__file__).resolve().parents[1] / "scripts" / "make_standin_weights.py"
    subprocess.run(
        [sys.executable, maker, home, "--tiny", "--ids", *map(str, TINY_IDS)], check=True
    )
    return home


@pytest.fixture(autouse=True)
def _nothing_left_behind(tmp_path):
    """Fail on leaked temporary files, child processes and changed torch settings."""
    temporary = Path(tempfile.gettempdir())
    before = set(temporary.iterdir())
    torch = sys.modules.get("torch")
    settings = _torch_settings(torch) if torch else None
    yield
    leaked = {path.name for path in set(temporary.iterdir()) - before}
    leaked = {name for name in leaked if not name.startswith(("pytest-", "torchinductor_"))}
    assert not leaked, f"left in {temporary}: {leaked}"
    assert not multiprocessing.active_children()
    if settings:
        assert _torch_settings(torch) == settings


def _torch_settings(torch):
    return (
        torch.get_num_threads(),
        torch.backends.cudnn.benchmark,
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
    )
