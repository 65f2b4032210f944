"""Write README's table of speed and memory from the figures in scripts/results/.

python scripts/benchmark_table.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from readme import write_table

ROOT = Path(__file__).resolve().parents[1]


def row(result: dict[str, Any]) -> str:
    """One case as a line of the table."""
    theirs, ours = result["median"]["upstream"], result["median"]["totalfast"]
    ratios = result["ratios"]
    return (
        f"| {result['case']} "
        f"| {theirs['wall_s']:.0f} s | {ours['wall_s']:.0f} s | {ratios['wall']:.1f} "
        f"| {theirs['outside_network_s']:.0f} s | {ours['outside_network_s']:.1f} s "
        f"| {theirs['peak_bytes'] / 1e9:.1f} GB | {ours['peak_bytes'] / 1e9:.1f} GB "
        f"| {result['differing_voxels']} |"
    )


def table() -> str:
    """The whole table, and the machine that it was measured on."""
    results = [
        json.loads(path.read_text())
        for path in sorted((ROOT / "scripts/results").glob("command_*.json"))
    ]
    results.sort(key=lambda result: result["case"])
    machine = results[0]["machine"]
    versions = machine["versions"]
    runs = {len(result["runs"]["upstream"]) for result in results}
    lines = [
        "| case | upstream | totalfast | times faster | outside the network: upstream | totalfast "
        "| peak memory: upstream | totalfast | differing voxels |",
        "|---|---|---|---|---|---|---|---|---|",
        *(row(result) for result in results),
        "",
        f"{machine['cores']} cores of {machine['processor']}, {machine['memory_gb']} GB, CPU only; "
        f"TotalSegmentator {versions['TotalSegmentator']}, nnU-Net {versions['nnunetv2']}, "
        f"torch {versions['torch']}; median of {'/'.join(map(str, sorted(runs)))} run(s).",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Replace the table in README.md."""
    write_table(Path(__file__).name, table())


if __name__ == "__main__":
    main()
