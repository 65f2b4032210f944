"""``totalfast demo``: segments a synthetic scan with a model that is part of the package.

The segmentation and the picture are those of the ordinary commands.
"""

from __future__ import annotations

import argparse
import os
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from totalfast import demo
from totalfast.cli import preview
from totalfast.cli.exit_codes import run_to_exit_code
from totalfast.cli.parser import build_parser as build_main_parser
from totalfast.cli.segment import run_main_command
from totalfast.errors import OutputError, TotalfastError
from totalfast.upstream import CLASS_MAPS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nibabel import Nifti1Image

    from totalfast.demo.phantom import Phantom
    from totalfast.demo.score import Score

MODEL = Path(demo.__file__).with_name("model")
"""Folder of the demonstration model, a value for TOTALSEG_WEIGHTS_PATH."""
SEED = 7
"""Seed of the default phantom; the model was trained on other seeds."""

ABOUT = """\
Create a synthetic CT, segment it, and show the result. Nothing is downloaded.

The model is part of totalfast and was trained on similar synthetic scans. It is a demonstration,
not one of TotalSegmentator's models. Do not use it for patients."""

CLOSING = """\
This was a demonstration model on a synthetic scan. For your own scan, with TotalSegmentator's
models, which are downloaded once (1.5 mm: five models, 700 MB; --fast: one 3 mm model, 120 MB):

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
        help="Folder for the scan, the masks and the picture (default: totalfast-demo).",
    )
    add("--seed", type=int, default=SEED, help=f"Seed of the synthetic scan (default: {SEED}).")
    add("--debug", action="store_true", help="Show the traceback of an error.")
    return parser


def run(args: argparse.Namespace) -> int:
    """Create a scan, segment it with the ordinary command, and print how good the result is."""
    import nibabel as nib

    from totalfast.demo.phantom import make_phantom

    began = time.perf_counter()
    folder: Path = args.output
    scan, label_map = folder / "ct.nii.gz", folder / "segmentation.nii.gz"
    print(f"Creating a synthetic CT (seed {args.seed}) ...", flush=True)
    phantom = make_phantom(args.seed)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(phantom.ct, phantom.affine), scan)
    except OSError as error:
        raise OutputError(f"can't write to {folder}: {error}") from error

    with _demonstration_model():
        # The scan is one tile: converting the network for OpenVINO takes longer than running it.
        _segment(
            "-i", scan, "-o", label_map, "-ml", "--fast", "--export", "linear", "--backend", "torch"
        )
    result = nib.load(label_map)
    _write_masks(result, folder / "segmentations")
    _preview(scan, label_map, folder / "preview.png")
    print_table(_scores(result, phantom))
    print(f"\nFiles: {folder}{os.sep}. {time.perf_counter() - began:.0f} s in all.\n\n{CLOSING}")
    return 0


def _write_masks(label_map: Nifti1Image, folder: Path) -> None:
    from totalfast.files.write import write_masks
    from totalfast.system.cores import usable_cores
    from totalfast.system.pending_files import PendingFiles

    print(f"\nOne mask per structure, as the command writes them without -ml: {folder}{os.sep}")
    with PendingFiles() as files:
        write_masks(
            label_map, CLASS_MAPS["total"], folder=folder, files=files, threads=usable_cores()
        )
        files.commit()


def _scores(label_map: Nifti1Image, phantom: Phantom) -> list[Score]:
    import numpy as np

    from totalfast.demo.score import score

    labels = np.asarray(label_map.dataobj)
    voxel_ml = float(np.prod(np.diag(phantom.affine)[:3])) / 1000
    return score(labels, phantom.labels, CLASS_MAPS["total"], voxel_ml=voxel_ml)


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


def _segment(*arguments: str | Path) -> None:
    """Run the main command as a user types it."""
    words = _announce(*arguments)
    _check(run_main_command(build_main_parser(), words))


def _preview(*arguments: str | Path) -> None:
    """Run the subcommand ``preview`` as a user types it."""
    words = _announce("preview", *arguments)
    _check(run_to_exit_code(preview.run, preview.build_parser().parse_args(words[1:])))


def _announce(*arguments: str | Path) -> list[str]:
    words = [str(argument) for argument in arguments]
    print("\n$ totalfast", *words, flush=True)
    return words


def _check(code: int) -> None:
    if code != 0:
        raise TotalfastError("the demo stopped at the command above; its error is printed there.")


@contextmanager
def _demonstration_model() -> Iterator[None]:
    """Replace TotalSegmentator's models by the demonstration model within the context."""
    name = "TOTALSEG_WEIGHTS_PATH"
    previous = os.environ.get(name)
    os.environ[name] = str(MODEL)
    try:
        yield
    finally:
        if previous is None:
            del os.environ[name]
        else:
            os.environ[name] = previous
