"""Exit codes of errors, of signals, and of errors while a signal is handled."""

from __future__ import annotations

import argparse
import os
import signal
import sys

import pytest

from totalfast.cli.exit_codes import run_to_exit_code
from totalfast.errors import InputError, OptionError

ARGS = argparse.Namespace(debug=False)


@pytest.mark.parametrize(
    ("error", "code"), [(InputError("odd"), 1), (OptionError("odd"), 2), (ValueError("odd"), 1)]
)
def test_errors(error, code, capsys):
    def run(args):
        raise error

    assert run_to_exit_code(run, ARGS) == code
    assert "ERROR: " in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="signals end the process there")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("fails", [False, True])
def test_a_signal_is_the_reason_also_if_cleaning_up_fails(number, fails, capsys):
    def run(args):
        try:
            os.kill(os.getpid(), number)
            signal.pause()
        finally:
            if fails:
                raise AttributeError("half an import")

    assert run_to_exit_code(run, ARGS) == 128 + number
    assert capsys.readouterr().err == "Interrupted; no file is half-written.\n"
