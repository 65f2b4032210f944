"""Errors of other libraries get advice that fits them."""

from __future__ import annotations

import argparse
import errno
import os

import pytest

from totalfast.cli.advice import advice_for, report_of


class OutOfMemoryError(RuntimeError):
    """Torch's error has this name, too."""


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (MemoryError(), "The computer has too little free memory"),
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "The GPU has too little"),
        (
            RuntimeError("CUDA error: no kernel image is available for execution on the device"),
            "was not built for this GPU",
        ),
        (
            RuntimeError("The NVIDIA driver on your system is too old; CUDA driver 11.4"),
            "Update the driver",
        ),
        (RuntimeError("CUDA error: device-side assert triggered"), "use the CPU"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), "use the CPU"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/x"), "Free some space"),
        (PermissionError(13, "Permission denied", "/x"), "Check the rights"),
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), "ulimit -n"),
        (ModuleNotFoundError("No module named 'x'"), "install totalfast again"),
        (KeyError("x"), None),
        (RuntimeError("shape mismatch"), None),
    ],
)
def test_advice(error, advice):
    found = advice_for(error)
    assert found is None if advice is None else advice in found


def test_a_report_names_the_place_of_an_error_and_no_values():
    args = argparse.Namespace(
        task="total", fast=True, quiet=False, license_number="aca_123", roi_subset=["liver"]
    )
    try:
        {}["secret"]
    except KeyError as error:
        text = report_of(error, args)
    assert "flags: fast roi_subset task=total" in text
    assert "KeyError at test_advice.py:" in text
    for private in ("secret", "aca_123", "liver"):
        assert private not in text
