"""``totalfast demo``: the main job on a made scan, with a model that ships with the package.

Knows what to show, and in which order; the segmentation is the ordinary command.
"""

from __future__ import annotations

import argparse
import os
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from totalfast import demo
from totalfast.errors import OutputError, TotalfastError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from totalfast.demo.score import Score

MODEL = Path(demo.__file__).with_name("model")
"""Folder of the demonstration model, as TOTALSEG_WEIGHTS_PATH names it."""
SEED = 7
"""The phantom that is shown; the model was trained on others."""

ABOUT = """\
Make a CT of a phantom, segment it, and show the result: nothing is downloaded.

The model ships with totalfast and was trained on phantoms like this one. It is a demonstration, not
one of TotalSegmentator's models, and of no use for patients."""

CLOSING = """\
This was a demonstration model on a made scan. For a real one, with TotalSegmentator's models
(1.5 mm: five models, 700 MB, downloaded once; --fast: the 3 mm model, 120 MB):

    totalfast -i ct.nii.gz -o segmentations --fast --preview"""


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the subcommand."""
    parser = argparse.ArgumentParser(
        prog="totalfast demo",
        description=ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "-o",
        dest="output",
        metavar="directory",
        type=Path,
        default=Path("totalfast-demo"),
        help="Where the scan, the masks and the picture go (default: totalfast-demo).",
    )
    add("--seed", type=int, default=SEED, help=f"Another phantom (default: {SEED}).")
    add("--debug", action="store_true", help="Show the traceback of an error.")
    return parser


def run(args: argparse.Namespace) -> int:
    """Make a scan, segment it with the ordinary command, and show what came of it."""
    import nibabel as nib
    import numpy as np

    from totalfast.demo.phantom import make_phantom
    from totalfast.demo.score import score
    from totalfast.files.write import write_masks
    from totalfast.system.cores import usable_cores
    from totalfast.system.pending_files import PendingFiles
    from totalfast.upstream import CLASS_MAPS

    began = time.perf_counter()
    folder: Path = args.output
    scan, masks, label_map = (
        folder / name for name in ("ct.nii.gz", "segmentations", "segmentation.nii.gz")
    )
    print(f"Making a CT of a phantom (seed {args.seed}) ...", flush=True)
    phantom = make_phantom(args.seed)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(phantom.ct, phantom.affine), scan)
    except OSError as error:
        raise OutputError(f"can't write to {folder}: {error}") from error

    with _demonstration_model():
        # One tile: to convert the network for OpenVINO would take longer than to run it.
        _totalfast(
            "-i", scan, "-o", label_map, "-ml", "--fast", "--export", "linear", "--backend", "torch"
        )
    result = nib.load(label_map)
    names = CLASS_MAPS["total"]
    print(f"\nOne mask a structure, as the command writes them without -ml: {masks}{os.sep}")
    with PendingFiles() as files:
        write_masks(result, names, folder=masks, files=files, threads=usable_cores())
    _totalfast("preview", scan, label_map, folder / "preview.png")

    labels = np.asarray(result.dataobj)
    voxel_ml = float(np.prod(np.diag(phantom.affine)[:3])) / 1000
    scores = score(labels, phantom.labels, names, voxel_ml=voxel_ml)
    print_table(scores)
    print(f"\nFiles: {folder}{os.sep}. {time.perf_counter() - began:.0f} s in all.\n\n{CLOSING}")
    return 0


def print_table(scores: list[Score]) -> None:
    """Print structures, their volumes and Dice in two columns."""
    head = f"{'structure':<26}{'ml':>8}{'true ml':>9}{'Dice':>7}"
    rows = [
        f"{row.name:<26}{row.found_ml:>8.1f}{row.true_ml:>9.1f}{row.dice:>7.3f}" for row in scores
    ]
    half = (len(rows) + 1) // 2
    print(f"\n{head}   |   {head}")
    for index in range(half):
        right = rows[half + index] if half + index < len(rows) else ""
        print(f"{rows[index]}   |   {right}".rstrip(" |"))
    mean = sum(row.dice for row in scores) / max(len(scores), 1)
    print(f"{len(scores)} structures of 1 ml or more, mean Dice {mean:.3f}")


def _totalfast(*arguments: str | Path) -> None:
    """Run the command as a user types it."""
    from totalfast.cli.main import INTERRUPTED, main

    words = [str(argument) for argument in arguments]
    print("\n$ totalfast", *words, flush=True)
    code = main(words)
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    if code != 0:
        raise TotalfastError("the demo stopped at the command above; its error is printed there.")


@contextmanager
def _demonstration_model() -> Iterator[None]:
    """Let the command find the demonstration model instead of TotalSegmentator's."""
    name = "TOTALSEG_WEIGHTS_PATH"
    before = os.environ.get(name)
    os.environ[name] = str(MODEL)
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
