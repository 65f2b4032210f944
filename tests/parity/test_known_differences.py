"""The listed differences are there, and nothing else differs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from .matrix import Case, input_file, run_pair, script

ROWS = yaml.safe_load(Path(__file__).with_name("known_differences.yaml").read_text())
PAIRS = [row for row in ROWS if "pair" in row]
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("row", PAIRS, ids=lambda row: row["what"])
def test_difference_is_the_listed_one(row, scans, standin_home, tmp_path, monkeypatch):
    pair = row["pair"]
    case = Case(pair["scan"], tuple(pair["flags"]))
    scan = input_file(case.scan, scans)
    if pair.get("upstream_fails"):
        with pytest.raises(RuntimeError, match=r"^totalsegmentator\.bin\.TotalSegmentator failed"):
            run_pair(case, scan, standin_home, tmp_path)
        monkeypatch.setenv("TOTALSEG_HOME_DIR", str(standin_home))
        output = tmp_path / "seg.nii.gz"
        command = ["-m", "totalfast", "-i", scan, "-o", output, "-d", "cpu", *case.flags]
        subprocess.run([sys.executable, *command], check=True, capture_output=True)
        assert output.exists()
        return
    result = run_pair(case, scan, standin_home, tmp_path)
    more_than, at_most = pair.get("share", (-1, 0))
    assert more_than < result.differing_voxels / max(result.voxels, 1) <= at_most
    patterns = pair.get("problems", [])
    unlisted = [p for p in result.problems if not any(re.search(known, p) for known in patterns)]
    assert unlisted == []
    for known in patterns:
        assert any(re.search(known, problem) for problem in result.problems), f"gone: {known}"


@pytest.mark.parametrize("row", [row for row in ROWS if "pair" not in row], ids=lambda r: r["what"])
def test_other_rows_name_the_test_that_shows_them(row):
    path, _, name = row["shown_by"].partition("::")
    text = (ROOT / path).read_text()
    assert not name or f"def {name}(" in text


def test_readme_shows_these_rows():
    table = script("differences_table").table(ROWS)
    assert table in (ROOT / "README.md").read_text()
