"""What the written command runs: upstream's flags, version and exit codes, on totalfast."""

from __future__ import annotations

import sys

from totalfast import upstream
from totalfast.cli.main import WRONG_OPTION, answer, build_parser


def main() -> int:
    """Run as ``TotalSegmentator`` would; return its exit code."""
    parser = build_parser(program="TotalSegmentator", version=upstream.version())
    code = answer(parser, sys.argv[1:])
    # Upstream's parser knows flags only; options that make no sense end it with an exception.
    return 1 if code == WRONG_OPTION else code
