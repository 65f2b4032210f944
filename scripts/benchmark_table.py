"""Write the tables of speed and memory of whole commands from the stored results.

    python scripts/benchmark_table.py

scripts/results/README.md gets all cases, README.md a short table of two cases.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from readme import RESULTS, ROOT, write_table

SAME = ("processor", "cores", "memory_gb", "versions")
"""Facts of the machine that must be equal in all rows of one table."""

SHORT = {
    "command_fast_488x404x336": "`--fast` (3 mm)",
    "command_total_488x404x336": "default (1.5 mm)",
}
"""The cases of the short table: name of the JSON file, and name in the table."""


def rows(result: dict[str, Any]) -> Iterator[str]:
    """One case as lines of the table: upstream, then totalfast with each backend."""
    for label, median in result["median"].items():
        first = result["runs"][label][0]["wall_s"]
        cells = [result["case"] if label == "upstream" else "", label.replace(" ", ", ")]
        cells += [f"{median['wall_s']:.0f} s", f"{first:.0f} s"]
        cells += [f"{median['network_s']:.0f} s", f"{median['outside_network_s']:.1f} s"]
        cells += [f"{result['peak_bytes'][label] / 1e9:.1f} GB"]
        if label == "upstream":
            cells += ["", "", ""]
        else:
            ratios, compared = result["ratios"][label], result["compared"][label]
            cells += [f"{ratios['wall']:.1f}x", f"{ratios['peak_memory_share']:.0%}"]
            cells += [differing(compared)]
        yield f"| {' | '.join(cells)} |"


def short_rows(name: str, result: dict[str, Any]) -> Iterator[str]:
    """One case as lines of the short table: one line per backend."""
    upstream_s = result["median"]["upstream"]["wall_s"]
    upstream_gb = result["peak_bytes"]["upstream"] / 1e9
    for label, ratios in result["ratios"].items():
        cells = [name, label.partition(" ")[2], f"{upstream_s:.0f} s"]
        cells += [f"{result['median'][label]['wall_s']:.0f} s", f"{ratios['wall']:.1f}x"]
        cells += [f"{ratios['peak_memory_share']:.0%} of {upstream_gb:.1f} GB"]
        cells += [differing(result["compared"][label])]
        yield f"| {' | '.join(cells)} |"


def differing(compared: dict[str, Any]) -> str:
    """Number of differing voxels and, unless it is 0, their share and the lowest Dice."""
    count, voxels = compared["differing_voxels"], compared["voxels"]
    if not count:
        return "0"
    lowest = math.floor(1e4 * compared["lowest_dice_of_large"]) / 1e4  # a lower bound
    return f"{count} ({count / voxels:.1g}), Dice at least {lowest:.4f}"


def machine_text(results: list[dict[str, Any]]) -> str:
    """Describe the machine and the versions.

    Raises
    ------
    ValueError
        If the results come from different machines or versions.
    """
    machine = results[0]["machine"]
    for result in results:
        if _facts(result) != _facts(results[0]):
            raise ValueError(f"{result['case']} and {results[0]['case']} have other machines.")
    versions = machine["versions"]
    return (
        f"{machine['cores']} cores of {machine['processor']}, {machine['memory_gb']} GB, CPU only; "
        f"TotalSegmentator {versions['TotalSegmentator']}, nnU-Net {versions['nnunetv2']}, "
        f"torch {versions['torch']}"
    )


def _facts(result: dict[str, Any]) -> list[Any]:
    """Facts of the machine; totalfast's version may differ, which the table tells."""
    facts = [result["machine"][key] for key in SAME]
    facts[-1] = {name: version for name, version in facts[-1].items() if name != "totalfast"}
    return facts


def earlier_versions(results: list[dict[str, Any]]) -> str:
    """Name the cases that an earlier version of totalfast was measured with."""
    versions = {result["case"]: result["machine"]["versions"]["totalfast"] for result in results}
    latest = max(versions.values())
    cases = [case for case, version in versions.items() if version != latest]
    return f" Of an earlier version of totalfast: {'; '.join(cases)}." if cases else ""


def table() -> str:
    """Return the table of all cases, and the machine."""
    paths = sorted(RESULTS.glob("command_*.json"))
    results = [json.loads(path.read_text()) for path in paths]
    repeats = sorted({len(result["runs"]["upstream"]) for result in results})
    lines = [
        "| case | program | time | first run | network | outside the network | peak memory "
        "| speed-up | memory | differing voxels |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(line for result in results for line in rows(result)),
        "",
        f"{machine_text(results)}. Median of {' or '.join(map(str, repeats))} run(s). In the first "
        "run, totalfast's caches of compiled code and of converted networks are empty."
        f"{earlier_versions(results)}",
    ]
    return "\n".join(lines) + "\n"


def short_table() -> str:
    """Return the short table, and the machine."""
    results = {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in SHORT}
    shapes = {"x".join(map(str, result["scan"]["shape"])) for result in results.values()}
    lines = [
        "| model | backend | TotalSegmentator | totalfast | speed-up | peak memory "
        "| differing voxels |",
        "|---|---|---|---|---|---|---|",
        *(line for name, result in results.items() for line in short_rows(SHORT[name], result)),
        "",
        f"Synthetic CT of {' and '.join(sorted(shapes))} voxels, one mask per class, stand-in "
        f"weights; {machine_text(list(results.values()))}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write both tables."""
    write_table(Path(__file__).name, table())
    write_table(Path(__file__).name, short_table(), ROOT / "README.md")


if __name__ == "__main__":
    main()
