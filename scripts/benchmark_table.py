"""Write README's table of speed and memory from the figures in scripts/results/.

python scripts/benchmark_table.py
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from readme import write_table

SAME = ("processor", "cores", "memory_gb", "versions")
"""What of the machine must not differ between rows of one table."""

ROOT = Path(__file__).resolve().parents[1]


def rows(result: dict[str, Any]) -> Iterator[str]:
    """One case as lines of the table: upstream, then totalfast with each backend."""
    for label, figures in result["median"].items():
        first = result["runs"][label][0]["wall_s"]
        cells = [result["case"] if label == "upstream" else "", label.replace(" ", ", ")]
        cells += [f"{figures['wall_s']:.0f} s", f"{first:.0f} s"]
        cells += [f"{figures['network_s']:.0f} s", f"{figures['outside_network_s']:.1f} s"]
        cells += [f"{result['peak_bytes'][label] / 1e9:.1f} GB"]
        if label == "upstream":
            cells += ["", "", ""]
        else:
            gains, compared = result["ratios"][label], result["compared"][label]
            cells += [f"{gains['wall']:.1f}x", f"{gains['peak_memory_share']:.0%}"]
            cells += [differing(compared)]
        yield f"| {' | '.join(cells)} |"


def differing(compared: dict[str, Any]) -> str:
    """Differing voxels and, where there are any, how far that goes."""
    count, voxels = compared["differing_voxels"], compared["voxels"]
    if not count:
        return "0"
    least = math.floor(1e4 * compared["lowest_dice_of_large"]) / 1e4  # a bound is not rounded up
    return f"{count} ({count / voxels:.1g}), Dice at least {least:.4f}"


def table() -> str:
    """The whole table, and the machine that it was measured on."""
    results = [
        json.loads(path.read_text())
        for path in sorted((ROOT / "scripts/results").glob("command_*.json"))
    ]
    for result in results:
        if any(result["machine"][key] != results[0]["machine"][key] for key in SAME):
            raise ValueError(f"{result['case']} was measured elsewhere than {results[0]['case']}.")
    machine = results[0]["machine"]
    versions = machine["versions"]
    runs = {len(result["runs"]["upstream"]) for result in results}
    lines = [
        "| case | program | time | first run | network | outside it | peak memory | faster "
        "| memory | differing voxels |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(line for result in results for line in rows(result)),
        "",
        f"{machine['cores']} cores of {machine['processor']}, {machine['memory_gb']} GB, CPU only; "
        f"TotalSegmentator {versions['TotalSegmentator']}, nnU-Net {versions['nnunetv2']}, "
        f"torch {versions['torch']}; median of {' or '.join(map(str, sorted(runs)))} run(s). "
        "totalfast's first run finds empty caches of compiled code and of converted networks.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Replace the table in README.md."""
    write_table(Path(__file__).name, table())


if __name__ == "__main__":
    main()
