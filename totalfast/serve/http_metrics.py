"""Numbers about the server's runs as text for Prometheus."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from totalfast.serve.http_runs import HttpRuns


def metrics(runs: HttpRuns) -> str:
    """Return the metrics in Prometheus' text format."""
    lines = [
        *_labelled("totalfast_runs_ended_total", "state", runs.ended),
        "# TYPE totalfast_runs gauge",
        f"totalfast_runs {len(runs)}",
        "# TYPE totalfast_storage_bytes gauge",
        f"totalfast_storage_bytes {runs.storage.used_bytes}",
    ]
    if runs.studies is not None:
        for name, count in runs.studies.counts.items():
            lines.append(f"# TYPE totalfast_dicomweb_{name}_total counter")
            lines.append(f"totalfast_dicomweb_{name}_total {count}")
        lines += _labelled("totalfast_dicomweb_failures_total", "step", runs.studies.failures)
    return "\n".join([*lines, ""])


def _labelled(name: str, label: str, counts: Mapping[str, int]) -> list[str]:
    values = [f'{name}{{{label}="{value}"}} {count}' for value, count in counts.items()]
    return [f"# TYPE {name} counter", *values]
