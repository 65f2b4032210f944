"""Write README's table of deliberate differences from tests/parity/known_differences.yaml.

    python scripts/differences_table.py

The tests run what the rows tell; see tests/parity/test_known_differences.py.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from readme import write_table

ROWS = Path(__file__).resolve().parents[1] / "tests/parity/known_differences.yaml"


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown of the rows."""
    lines = ["| what | upstream | totalfast | why |", "|---|---|---|---|"]
    lines += [f"| {r['what']} | {r['upstream']} | {r['totalfast']} | {r['why']} |" for r in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the table."""
    import yaml

    write_table(Path(__file__).name, table(yaml.safe_load(ROWS.read_text())))


if __name__ == "__main__":
    main()
