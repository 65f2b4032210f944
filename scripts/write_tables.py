"""Write all generated tables again from the stored results. Measures nothing.

python scripts/write_tables.py
"""

from __future__ import annotations

import json
from importlib import import_module
from typing import Any

import benchmark_table
import compare_dicom_readers
import differences_table
from readme import RESULTS, write_table

RESULTS_OF = {
    "benchmark_clients": "clients",
    "benchmark_export": "export",
    "benchmark_nnunet": "nnunet",
    "benchmark_scaling": "scaling",
    "compare_backends": "backends",
    "compare_exports": "exports",
    "compare_resampling": "resampling",
    "compare_tile_steps": "tile_steps",
    "measure_guided": "guided",
    "nnunet_versions": "nnunet_versions",
    "score_demo_model": "demo_model",
}
"""Scripts whose ``table`` takes the content of one JSON file, and the name of that file."""

ABLATIONS = ("ablation", "ablation_official")


def stored(name: str) -> Any:
    """Content of one of the JSON files in ``scripts/results``."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def main() -> None:
    """Write the tables."""
    benchmark_table.main()
    differences_table.main()
    compare_dicom_readers.write_tables(stored("dicom_readers"))
    contents = {script: stored(name) for script, name in RESULTS_OF.items()}
    contents["benchmark_steps"] = stored("steps")["steps"]
    contents["ablation"] = [stored(name) for name in ABLATIONS]
    for script, content in contents.items():
        write_table(f"{script}.py", import_module(script).table(content))


if __name__ == "__main__":
    main()
