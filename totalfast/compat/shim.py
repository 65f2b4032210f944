"""The ``TotalSegmentator`` command on totalfast: upstream's flags, version and exit codes."""

from __future__ import annotations

import sys

from totalfast import upstream
from totalfast.cli.exit_codes import WRONG_OPTION
from totalfast.cli.parser import build_parser
from totalfast.cli.segment import run_main_command


def main() -> int:
    """Run as ``TotalSegmentator`` would; return its exit code."""
    parser = build_parser(program="TotalSegmentator", version=upstream.version())
    code = run_main_command(parser, sys.argv[1:])
    # Upstream raises an exception, exit code 1, for options that only its parser accepts.
    return 1 if code == WRONG_OPTION else code
