"""Write the table of deliberate differences into tests/parity/README.md.

    python scripts/differences_table.py

The rows come from tests/parity/known_differences.yaml. tests/parity/test_known_differences.py
checks each row and the table.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from readme import ROOT, write_table

PARITY = ROOT / "tests" / "parity"
ROWS = PARITY / "known_differences.yaml"


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown."""
    lines = ["| input or option | TotalSegmentator | totalfast | reason |", "|---|---|---|---|"]
    lines += [f"| {r['what']} | {r['upstream']} | {r['totalfast']} | {r['why']} |" for r in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the table."""
    import yaml

    rows = yaml.safe_load(ROWS.read_text())
    write_table(Path(__file__).name, table(rows), PARITY / "README.md")


if __name__ == "__main__":
    main()
