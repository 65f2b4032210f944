"""``totalfast preview``: a picture of a scan and its labels, from any program."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from totalfast.errors import InputError, OptionError

if TYPE_CHECKING:
    from typing import Any

    from numpy.typing import NDArray

    from totalfast.geometry import Grid

LARGEST_LABEL = 1000
"""A file with larger values is not accepted as a label map; it may be a scan."""


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the subcommand."""
    parser = argparse.ArgumentParser(
        prog="totalfast preview",
        description="Draw a scan and its labels: axial, coronal and sagittal slices, a view of\n"
        "the surfaces, and a list of the structures with their volumes.",
        epilog="example:\n  totalfast preview ct.nii.gz seg.nii.gz preview.png",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("scan", type=Path, help="The scan: a .nii or .nii.gz file.")
    add("labels", type=Path, help="Its label map, or the folder of its masks.")
    add("output", type=Path, help="The picture file to write: .png or .jpg.")
    add("--debug", action="store_true", help="Show the traceback of an error.")
    return parser


def run(args: argparse.Namespace) -> int:
    """Read the scan and its labels, draw them, write the picture."""
    if args.output.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise OptionError(f"{args.output} must end in .png or .jpg.")
    from totalfast.files.read import read_image
    from totalfast.preview.page import draw_preview, save_picture
    from totalfast.system.pending_files import PendingFiles

    began = time.perf_counter()
    scan = read_image(args.scan)
    read = read_masks if args.labels.is_dir() else read_label_map
    labels, grid, names = read(args.labels)
    picture = draw_preview(scan, labels, grid, names, title=args.scan.name)
    with PendingFiles() as files:
        save_picture(picture, args.output, files=files)
        files.commit()
    print(f"Done in {time.perf_counter() - began:.1f} s: {args.output}")
    return 0


def read_label_map(path: Path) -> tuple[NDArray[Any], Grid, dict[int, str]]:
    """Read a label map.

    Returns
    -------
        Labels, unsigned integers, (x, y, z); their grid; label to class name, from the header.

    Raises
    ------
    InputError
        If the values are not whole numbers from 0 to ``LARGEST_LABEL``.
    """
    import numpy as np

    from totalfast.files.read import read_image
    from totalfast.upstream import label_names

    image = read_image(path)
    values = image.stored
    if (image.slope, image.intercept) != (1.0, 0.0):
        values = image.scale(values)
    if values.dtype != np.uint8:
        nearest = values if values.dtype.kind in "iub" else np.rint(values)
        # Scaling by a slope with many digits can give 4.99998 for 5.
        whole = nearest is values or bool(np.all(np.abs(values - nearest) < 0.01))
        values = nearest
        if not whole or float(values.min()) < 0 or float(values.max()) > LARGEST_LABEL:
            raise InputError(
                f"{path.name} is no label map: it must contain whole numbers from 0 to "
                f"{LARGEST_LABEL}. Is it the scan?"
            )
        values = values.astype(np.uint16)
    return values, image.grid, label_names(image.header)


def read_masks(folder: Path) -> tuple[NDArray[Any], Grid, dict[int, str]]:
    """Read a folder of masks as one label map; where masks overlap, the last one is used.

    Returns
    -------
        Labels, uint16, (x, y, z); their grid; label to class name, from the file names.

    Raises
    ------
    InputError
        If the folder has no masks, or masks of different shapes.
    """
    import numpy as np

    from totalfast.files.read import read_image

    paths = sorted(path for path in folder.iterdir() if path.name.endswith((".nii", ".nii.gz")))
    if not paths:
        raise InputError(f"{folder} has no masks: no .nii.gz files.")
    first = read_image(paths[0])
    labels = np.zeros(first.stored.shape, np.uint16, order="F")
    names = {}
    for label, path in enumerate(paths, start=1):
        mask = read_image(path)
        if mask.stored.shape != labels.shape:
            raise InputError(
                f"{path.name} has the shape {mask.stored.shape}, {paths[0].name} {labels.shape}; "
                "all masks must belong to one scan."
            )
        labels[mask.stored > 0] = label
        names[label] = path.name.partition(".nii")[0]
    return labels, first.grid, names
