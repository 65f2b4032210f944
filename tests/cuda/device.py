"""The device of these tests, and both commands on it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"

DEVICE = os.environ.get("TOTALFAST_CUDA_TESTS_ON", "gpu")
"""Device of all tests. With ``cpu`` they run where there is no GPU, to try the tests themselves."""

PROGRAMS = {
    "upstream": [SCRIPTS / "gpu" / "upstream.py"],  # without cucim, see there
    "totalfast": ["-m", "totalfast"],
}

LIMIT_S = 900


def torch_device():
    """Torch's device for ``DEVICE``."""
    import torch

    return torch.device("cuda" if DEVICE == "gpu" else DEVICE)


def run_command(
    program: str, scan: Path, target: Path, flags: tuple[str, ...], *, home: Path, temporary: str
) -> None:
    """Run one of ``PROGRAMS`` on the device."""
    variables = {
        "TOTALSEG_HOME_DIR": str(home),
        "TOTALFAST_BACKEND": "torch",
        "PYTHONWARNINGS": "ignore",
        "TMPDIR": temporary,
    }
    inherited = {k: v for k, v in os.environ.items() if k != "TOTALSEG_WEIGHTS_PATH"}
    words = [sys.executable, *PROGRAMS[program], "-i", scan, "-o", target, "-d", DEVICE, *flags]
    done = subprocess.run(
        words,
        env=inherited | variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT_S,
    )
    if done.returncode:
        raise RuntimeError(f"{program} failed on {flags}:\n{done.stdout}\n{done.stderr}")
