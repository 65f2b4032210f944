"""A picture of a result: three slices, a surface view, and the names of what they show.

Lays the page out; the slices, the surface and the colours are modules of their own.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

from totalfast.errors import InputError
from totalfast.preview.palette import is_translucent, structure_colours
from totalfast.preview.slices import font, slice_view
from totalfast.preview.surface import surface_view
from totalfast.preview.volume import LabelledVolume
from totalfast.system.cores import usable_cores
from totalfast.system.pending_files import PendingFiles

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from totalfast.geometry import Grid
    from totalfast.scan import ScannerImage

__all__ = ["draw_preview", "save_picture"]

BACKGROUND, TEXT, FAINT = "#0d1014", "#e8ecf0", "#8b95a1"
MARGIN_PX, GAP_PX, TITLE_PX = 20, 12, 44
MAX_SCALE_PX_PER_MM = 1.75
MAX_HEIGHT_PX, MAX_SLICES_WIDTH_PX = 1500, 1400
MIN_CELL_PX = 230
ROW_PX = 16
AXIS_NAMES = ("sagittal", "coronal", "axial")


def draw_preview(
    scan: ScannerImage,
    labels: NDArray[np.unsignedinteger],
    grid: Grid,
    names: Mapping[int, str],
    *,
    title: str = "",
) -> Image.Image:
    """Draw a result on one page.

    Axial above coronal, sagittal beside it, all at one scale; the list of what is seen, with
    volumes; and the labels as solid bodies, from the front.

    Parameters
    ----------
    scan
        The scan; CT is shown with a soft-tissue window, other images between their percentiles.
    labels
        (x, y, z) of ``grid``, 0 is background.
    grid
        The labels' grid; another one than the scan's is fine.
    names
        Label to class name.
    title
        Written on top.

    Returns
    -------
        An RGB picture.

    Raises
    ------
    InputError
        If the labels are no volume, or lie outside of the scan.
    """
    if labels.ndim != 3 or labels.shape != grid.shape:
        raise InputError(f"labels must be one 3-D volume, not {labels.shape}.")
    volume = LabelledVolume(scan=scan, labels=labels, grid=grid)
    known = {label: names.get(label, f"label {label}") for label in volume.volumes_ml}
    palette = structure_colours({**names, **known})
    size = max([*palette, int(labels.max())]) + 1
    colours, translucent = np.zeros((size, 3), np.float32), np.zeros(size, bool)
    for label, colour in palette.items():
        colours[label] = colour
        translucent[label] = is_translucent(known.get(label, ""))

    width_mm, depth_mm, height_mm = volume.extent_mm
    scale = min(
        MAX_SCALE_PX_PER_MM,
        (MAX_HEIGHT_PX - TITLE_PX - GAP_PX - 2 * MARGIN_PX) / (depth_mm + height_mm),
        MAX_SLICES_WIDTH_PX / (width_mm + depth_mm),
    )
    wide, deep, high = (max(round(float(v) * scale), 2) for v in volume.extent_mm)
    left_px, middle_px = max(wide, MIN_CELL_PX), max(deep, 2 * MIN_CELL_PX)
    top_px, bottom_px = max(deep, MIN_CELL_PX), max(high, 60)
    body_px = top_px + GAP_PX + bottom_px
    right_px = max(int(0.72 * body_px), MIN_CELL_PX)
    page = Image.new(
        "RGB",
        (
            2 * MARGIN_PX + left_px + middle_px + right_px + 2 * GAP_PX,
            MARGIN_PX + TITLE_PX + body_px + MARGIN_PX,
        ),
        BACKGROUND,
    )
    draw = ImageDraw.Draw(page)
    draw.text((MARGIN_PX, MARGIN_PX - 4), title, font=font(22), fill=TEXT)

    x0, y0 = MARGIN_PX, MARGIN_PX + TITLE_PX
    x1, y1 = x0 + left_px + GAP_PX, y0 + top_px + GAP_PX
    cells = (
        (2, (x0, y0), (left_px, top_px), (deep, wide)),
        (1, (x0, y1), (left_px, bottom_px), (high, wide)),
        (0, (x1, y1), (middle_px, bottom_px), (high, deep)),
    )
    indices = {axis: volume.telling_slice(axis) for axis in range(3)}
    with ThreadPoolExecutor(usable_cores()) as pool:
        body = pool.submit(surface_view, volume, colours, translucent, (body_px, right_px))
        slices = [
            pool.submit(
                slice_view, volume, axis, indices[axis], shape, colours=colours, names=known
            )
            for axis, _, _, shape in cells
        ]
    seen: set[int] = set()
    for (axis, (x, y), cell, _), drawn in zip(cells, slices, strict=True):
        index = indices[axis]
        picture, found = drawn.result()
        at = x + (cell[0] - picture.width) // 2, y + (cell[1] - picture.height) // 2
        page.paste(picture, at)
        seen |= found
        draw.text(
            (at[0] + 8, at[1] + 6),
            f"{AXIS_NAMES[axis]} {index + 1}/{volume.canonical_grid.shape[axis]}",
            font=font(13), fill=FAINT,
        )  # fmt: skip
    _write_list(draw, (x1, y0), (middle_px, top_px), volume, known, palette, seen)
    x2 = x1 + middle_px + GAP_PX
    solid = Image.fromarray(body.result())
    page.paste(
        solid, (x2 + (right_px - solid.width) // 2, y0 + (body_px - solid.height) // 2), solid
    )
    return page


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a picture whole or not at all."""
    with PendingFiles() as files:
        part = files.path(path)
        kind = "PNG" if path.suffix.lower() == ".png" else "JPEG"
        picture.save(part, kind, **({"compress_level": 3} if kind == "PNG" else {"quality": 92}))


def _write_list(
    draw: ImageDraw.ImageDraw,
    at: tuple[int, int],
    size: tuple[int, int],
    volume: LabelledVolume,
    names: Mapping[int, str],
    palette: Mapping[int, tuple[int, int, int]],
    seen: set[int],
) -> None:
    """List structures with their colour and volume: first those on the slices, then the others."""
    face = font(12)
    order = sorted(names, key=lambda label: (label not in seen, label))
    if not order:
        draw.text(at, "no structure found", font=font(16), fill=FAINT)
        return
    column_px = max(int(draw.textlength(names[label], font=face)) for label in order) + 68
    columns = max(size[0] // column_px, 1)
    rows = max((size[1] - 24) // ROW_PX, 1)
    shown = order[: columns * rows]
    if len(shown) < len(order):
        shown = shown[:-1]
    head = f"{len(names)} structures, ml"
    draw.text(at, head, font=face, fill=FAINT)
    for place, label in enumerate(shown):
        column, row = divmod(place, rows)
        x, y = at[0] + column * column_px, at[1] + 22 + row * ROW_PX
        draw.rounded_rectangle((x, y + 1, x + 11, y + 12), 3, fill=palette[label])
        draw.text((x + 19, y), names[label], font=face, fill=TEXT if label in seen else FAINT)
        ml = volume.volumes_ml[label]
        draw.text(
            (x + column_px - 16, y), f"{ml:.0f}" if ml >= 10 else f"{ml:.1f}",
            font=face, fill=FAINT, anchor="ra",
        )  # fmt: skip
    if len(shown) < len(order):
        column, row = divmod(len(shown), rows)
        draw.text(
            (at[0] + column * column_px + 19, at[1] + 22 + row * ROW_PX),
            f"and {len(order) - len(shown)} more", font=face, fill=FAINT,
        )  # fmt: skip
