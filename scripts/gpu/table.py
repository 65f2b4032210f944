"""Tables of the benchmark on a GPU, as Markdown."""

from __future__ import annotations

from typing import Any

CASES = {
    "fast_per_class": "`--fast`, one mask per class",
    "total_ml": "1.5 mm, label map",
}


def tables(results: dict[str, Any]) -> str:
    """Return all tables that the results allow."""
    parts = [commands(results), calls(results), network(results), memory(results)]
    return "\n".join(part for part in [*parts, machine(results)] if part)


def commands(results: dict[str, Any]) -> str:
    """Whole commands: upstream, totalfast, ratio, differing voxels."""
    lines = [
        "| case | upstream | totalfast | ratio | differing voxels | upstream against itself "
        "| GPU memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for key, name in CASES.items():
        rows = results.get(key, {})
        theirs, ours = (rows.get(label, {}) for label in ("upstream", "totalfast"))
        walls = theirs.get("wall_s"), ours.get("wall_s")
        ratio = f"{walls[0] / walls[1]:.1f}x" if all(walls) else ""
        cells = [name, seconds(theirs), seconds(ours), ratio]
        cells += [differing(rows, name) for name in ("ours_vs_upstream", "upstream_vs_itself")]
        cells += [f"{theirs.get('vram_mb', 0) / 1e3:.1f} -> {ours.get('vram_mb', 0) / 1e3:.1f} GB"]
        if rows:
            lines.append(f"| {' | '.join(cells)} |")
    peer = results.get("fastsegmentator_total", {})
    if peer:
        ours_s = results.get("total_ml", {}).get("totalfast", {}).get("wall_s")
        peer_s = peer.get("second", {}).get("wall_s")
        ratio = f"{peer_s / ours_s:.1f}x" if peer_s and ours_s else ""
        cells = ["1.5 mm, FastSegmentator's second run", seconds(peer.get("second", {}))]
        cells += [f"{ours_s:.1f} s" if ours_s else "", ratio, "", "", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n" if len(lines) > 2 else ""


def seconds(row: dict[str, Any]) -> str:
    """Wall time of a row, or why there is none."""
    if row.get("rc"):
        return "failed"
    if "wall_s" in row:
        return f"{row['wall_s']:.1f} s"
    return f"over {row['killed_after_s']:.0f} s" if "killed_after_s" in row else ""


def differing(rows: dict[str, Any], name: str) -> str:
    """Differing voxels and their share."""
    found = rows.get(name, {})
    if "differing" not in found:
        return ""
    count = found["differing"]
    return f"{count} ({count / found['voxels']:.1g})" if count else "0"


def calls(results: dict[str, Any]) -> str:
    """Calls of one session."""
    rows = results.get("session", {}).get("calls", [])
    lines = ["| call of a session, nothing saved | first | later | peak GPU memory |"]
    lines.append("|---|---|---|---|")
    for fast, name in ((True, "`--fast`"), (False, "1.5 mm")):
        own = [row for row in rows if row["fast"] is fast]
        if own:
            later = " and ".join(f"{row['s']:.2f} s" for row in own[1:])
            peak = max(row["peak_mb"] for row in own) / 1e3
            lines.append(f"| {name} | {own[0]['s']:.2f} s | {later} | {peak:.1f} GB |")
    return "\n".join(lines) + "\n" if rows else ""


def network(results: dict[str, Any]) -> str:
    """Tiles of the networks with each setting."""
    lines = [
        "| setting | model | first tile | later tiles | peak GPU memory | differing voxels |",
        "|---|---|---|---|---|---|",
    ]
    for setting, models in results.get("network", {}).items():
        for model, row in models.items():
            if not isinstance(row, dict) or "ms_per_tile" not in row:
                continue
            cells = [setting, model, f"{row['first_tile_s']:.2f} s", f"{row['ms_per_tile']:.1f} ms"]
            cells += [f"{row['peak_mb'] / 1e3:.1f} GB", str(row.get("differing", ""))]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n" if len(lines) > 2 else ""


def memory(results: dict[str, Any]) -> str:
    """Runs within limits of the device's memory."""
    lines = [
        "| limit | case | time | reserved | differing voxels | log |",
        "|---|---|---|---|---|---|",
    ]
    for row in results.get("memory", {}).values():
        if "limit_gb" not in row:
            continue
        limit = f"{row['limit_gb']:.0f} GB" if row["limit_gb"] else "none"
        cells = [limit, "`--fast`" if row["fast"] else "1.5 mm", f"{row['s']:.1f} s"]
        cells += [f"{row['reserved_mb'] / 1e3:.1f} GB", differing(row, "vs_unlimited")]
        cells += [row.get("error") or "; ".join(row["lines"])]
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join(lines) + "\n" if len(lines) > 2 else ""


def machine(results: dict[str, Any]) -> str:
    """The machine and the weights."""
    facts = results.get("machine", {})
    versions = facts.get("versions", {})
    if not versions:
        return ""
    return (
        f"{facts['gpu']}, {facts['cores']} cores of {facts['processor']}, {facts['memory_gb']} GB; "
        f"TotalSegmentator {versions['TotalSegmentator']}, nnU-Net {versions['nnunetv2']}, torch "
        f"{versions['torch']}, cuDNN {facts['cudnn']}. Synthetic CT, "
        f"{results.get('prepared', {}).get('scan', '')}; stand-in weights, not TotalSegmentator's "
        "(scripts/make_standin_weights.py).\n"
    )
