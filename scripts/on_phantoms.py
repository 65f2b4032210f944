"""Command line and prediction shared by the scripts that measure the demonstration model."""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nibabel as nib
import numpy as np
from readme import write_table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray

    from totalfast.demo.phantom import Phantom


def segmented(phantom: Phantom, **keywords: Any) -> NDArray[np.uint8]:
    """Segment a phantom with ``--fast`` and other options; return the labels, (x, y, z)."""
    import totalfast

    scan = nib.Nifti1Image(phantom.ct, phantom.affine)
    labels = totalfast.segment(scan, fast=True, device="cpu", quiet=True, **keywords)
    return np.asarray(labels.dataobj)


def main(
    script: str,
    description: str,
    *,
    seeds: Iterable[int],
    measure: Callable[[int], list[dict[str, Any]]],
    table: Callable[[list[dict[str, Any]]], str],
) -> int:
    """Run the command line of such a script.

    Parameters
    ----------
    script
        Path of the script; its file name marks the table in scripts/results/README.md.
    description
        Docstring of the script; ``--help`` shows its first line.
    seeds
        Default of ``--seeds``.
    measure
        Returns the rows of the JSON for the phantom of a seed.
    table
        Returns Markdown for all rows.
    """
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(seeds))
    parser.add_argument(
        "--readme", action="store_true", help="also write the table in scripts/results"
    )
    options = parser.parse_args()
    from totalfast.cli.demo import MODEL

    os.environ["TOTALSEG_WEIGHTS_PATH"] = str(MODEL)
    rows: list[dict[str, Any]] = []
    for seed in options.seeds:
        began = time.perf_counter()
        rows += measure(seed)
        print(f"seed {seed}: {time.perf_counter() - began:.0f} s", flush=True)
    options.json.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))
    if options.readme:
        write_table(Path(script).name, table(rows))
    return 0
