"""The recorded differences exist, and there are no others."""

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
def test_pair_has_the_recorded_difference_and_no_other(
    row, scans, standin_home, tmp_path, monkeypatch
):
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
    others = [p for p in result.problems if not any(re.search(regex, p) for regex in patterns)]
    assert others == []
    for regex in patterns:
        assert any(re.search(regex, problem) for problem in result.problems), f"missing: {regex}"


@pytest.mark.parametrize("row", [row for row in ROWS if "pair" not in row], ids=lambda r: r["what"])
def test_rows_without_a_pair_name_an_existing_test(row):
    path, _, name = row["shown_by"].partition("::")
    text = (ROOT / path).read_text()
    assert not name or f"def {name}(" in text


def test_readme_has_the_table_of_differences():
    table = script("differences_table").table(ROWS)
    assert table in (ROOT / "tests" / "parity" / "README.md").read_text()
