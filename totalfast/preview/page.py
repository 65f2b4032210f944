"""A picture of a result on one page: three slices, a surface view, and a list of the structures.

This module places the blocks; the modules ``slices`` and ``surface`` draw them.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from totalfast.errors import InputError
from totalfast.preview.palette import is_translucent, structure_colours
from totalfast.preview.slices import font, slice_view
from totalfast.preview.surface import surface_view
from totalfast.preview.volume import LabelledVolume
from totalfast.system.cores import usable_cores

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from totalfast.geometry import Grid
    from totalfast.preview.palette import Colour
    from totalfast.scan import ScannerImage
    from totalfast.system.pending_files import PendingFiles

__all__ = ["draw_preview", "save_picture"]

BACKGROUND, TEXT, FAINT = "#0d1014", "#e8ecf0", "#8b95a1"
MARGIN_PX, GAP_PX, TITLE_PX = 20, 12, 44
MAX_SCALE_PX_PER_MM = 1.75
MAX_HEIGHT_PX, MAX_SLICES_WIDTH_PX = 1500, 1400
MIN_CELL_PX = 230
ROW_PX, LIST_HEAD_PX = 16, 22
AXIS_NAMES = ("sagittal", "coronal", "axial")


class _Box(NamedTuple):
    """A rectangle of the page, in pixels."""

    x: int
    y: int
    width: int
    height: int

    def centred(self, picture: Image.Image) -> tuple[int, int]:
        """Return the upper left corner at which a picture is in the middle of the box."""
        return (
            self.x + (self.width - picture.width) // 2,
            self.y + (self.height - picture.height) // 2,
        )


class _SliceCell(NamedTuple):
    """Place of one slice."""

    axis: int
    """0, 1 or 2 for a sagittal, coronal or axial slice."""
    box: _Box
    picture_size: tuple[int, int]
    """Height and width in pixels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    """Sizes and places of everything on the page, in pixels."""

    page_size: tuple[int, int]
    """Width and height."""
    slices: tuple[_SliceCell, ...]
    structure_list: _Box
    surface: _Box


@dataclass(frozen=True, slots=True, kw_only=True)
class _Structures:
    """Names and colours of labels."""

    names: dict[int, str]
    """Labels in the volume only."""
    palette: dict[int, Colour]
    colours: NDArray[np.float32]
    """(labels, 3), 0 to 255."""
    translucent: NDArray[np.bool_]
    """(labels,)."""


def draw_preview(
    scan: ScannerImage,
    labels: NDArray[np.unsignedinteger],
    grid: Grid,
    names: Mapping[int, str],
    *,
    title: str = "",
) -> Image.Image:
    """Draw a result on one page.

    The axial slice is above the coronal one, the sagittal slice beside it, all at one scale. The
    structures are listed with their volumes, and drawn as solid bodies, seen from the front.

    Parameters
    ----------
    scan
        The scan. CT is shown with a soft-tissue window, other images between percentiles.
    labels
        (x, y, z) of ``grid``, 0 is background.
    grid
        Grid of the labels; it may differ from the scan's.
    names
        Label to class name.
    title
        Text above the slices.

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
    structures = _structures(volume, names)
    layout = _lay_out(volume.extent_mm)
    indices = {axis: volume.slice_with_most_structures(axis) for axis in range(3)}
    with ThreadPoolExecutor(usable_cores()) as pool:
        surface = pool.submit(
            surface_view,
            volume,
            structures.colours,
            structures.translucent,
            (layout.surface.height, layout.surface.width),
        )
        slices = [
            pool.submit(
                slice_view,
                volume,
                cell.axis,
                indices[cell.axis],
                cell.picture_size,
                colours=structures.colours,
                names=structures.names,
            )
            for cell in layout.slices
        ]

    page = Image.new("RGB", layout.page_size, BACKGROUND)
    ImageDraw.Draw(page).text((MARGIN_PX, MARGIN_PX - 4), title, font=font(22), fill=TEXT)
    labels_on_slices: set[int] = set()
    for cell, slice_ in zip(layout.slices, slices, strict=True):
        picture, present = slice_.result()
        labels_on_slices |= present
        count = volume.canonical_grid.shape[cell.axis]
        caption = f"{AXIS_NAMES[cell.axis]} {indices[cell.axis] + 1}/{count}"
        _paste_slice(page, picture, cell.box, caption)
    _write_list(page, layout.structure_list, structures, volume.volumes_ml, labels_on_slices)
    bodies = Image.fromarray(surface.result())
    page.paste(bodies, layout.surface.centred(bodies), bodies)
    return page


def save_picture(picture: Image.Image, path: Path, *, files: PendingFiles) -> None:
    """Write a picture as PNG or JPEG, by the ending of ``path``."""
    is_png = path.suffix.lower() == ".png"
    kind, settings = ("PNG", {"compress_level": 3}) if is_png else ("JPEG", {"quality": 92})
    files.write(path, lambda staged: picture.save(staged, kind, **settings))


def _structures(volume: LabelledVolume, names: Mapping[int, str]) -> _Structures:
    """Collect the names and colours of all labels, for those without a name "label 7"."""
    present = {label: names.get(label, f"label {label}") for label in volume.volumes_ml}
    palette = structure_colours({**names, **present})
    size = max([*palette, int(volume.labels.max())]) + 1
    colours, translucent = np.zeros((size, 3), np.float32), np.zeros(size, bool)
    for label, colour in palette.items():
        colours[label] = colour
        translucent[label] = is_translucent(present.get(label, ""))
    return _Structures(names=present, palette=palette, colours=colours, translucent=translucent)


def _lay_out(extent_mm: NDArray[np.float64]) -> _Layout:
    """Place the blocks for a field of view of (x, y, z) in mm: slices, list, surface view."""
    width_mm, depth_mm, height_mm = extent_mm
    scale = min(
        MAX_SCALE_PX_PER_MM,
        (MAX_HEIGHT_PX - TITLE_PX - GAP_PX - 2 * MARGIN_PX) / (depth_mm + height_mm),
        MAX_SLICES_WIDTH_PX / (width_mm + depth_mm),
    )
    wide, deep, high = (max(round(float(mm) * scale), 2) for mm in extent_mm)
    left_px, middle_px = max(wide, MIN_CELL_PX), max(deep, 2 * MIN_CELL_PX)
    top_px, bottom_px = max(deep, MIN_CELL_PX), max(high, 60)
    body_px = top_px + GAP_PX + bottom_px
    right_px = max(int(0.72 * body_px), MIN_CELL_PX)

    left, top = MARGIN_PX, MARGIN_PX + TITLE_PX
    middle, bottom = left + left_px + GAP_PX, top + top_px + GAP_PX
    right = middle + middle_px + GAP_PX
    return _Layout(
        page_size=(right + right_px + MARGIN_PX, top + body_px + MARGIN_PX),
        slices=(
            _SliceCell(2, _Box(left, top, left_px, top_px), (deep, wide)),
            _SliceCell(1, _Box(left, bottom, left_px, bottom_px), (high, wide)),
            _SliceCell(0, _Box(middle, bottom, middle_px, bottom_px), (high, deep)),
        ),
        structure_list=_Box(middle, top, middle_px, top_px),
        surface=_Box(right, top, right_px, body_px),
    )


def _paste_slice(page: Image.Image, picture: Image.Image, box: _Box, caption: str) -> None:
    x, y = box.centred(picture)
    page.paste(picture, (x, y))
    ImageDraw.Draw(page).text((x + 8, y + 6), caption, font=font(13), fill=FAINT)


def _write_list(
    page: Image.Image,
    box: _Box,
    structures: _Structures,
    volumes_ml: Mapping[int, float],
    labels_on_slices: set[int],
) -> None:
    """List structures with colour and volume: first those on the slices, then the others."""
    draw = ImageDraw.Draw(page)
    names, face = structures.names, font(12)
    order = sorted(names, key=lambda label: (label not in labels_on_slices, label))
    if not order:
        draw.text((box.x, box.y), "no structure found", font=font(16), fill=FAINT)
        return
    column_px = max(int(draw.textlength(names[label], font=face)) for label in order) + 68
    rows = max((box.height - 24) // ROW_PX, 1)
    listed = _that_fit(order, rows * max(box.width // column_px, 1))

    def corner(place: int) -> tuple[int, int]:
        column, row = divmod(place, rows)
        return box.x + column * column_px, box.y + LIST_HEAD_PX + row * ROW_PX

    draw.text((box.x, box.y), f"{len(names)} structures, ml", font=face, fill=FAINT)
    for place, label in enumerate(listed):
        x, y = corner(place)
        draw.rounded_rectangle((x, y + 1, x + 11, y + 12), 3, fill=structures.palette[label])
        fill = TEXT if label in labels_on_slices else FAINT
        draw.text((x + 19, y), names[label], font=face, fill=fill)
        ml = volumes_ml[label]
        text = f"{ml:.0f}" if ml >= 10 else f"{ml:.1f}"
        draw.text((x + column_px - 16, y), text, font=face, fill=FAINT, anchor="ra")
    if len(listed) < len(order):
        x, y = corner(len(listed))
        draw.text((x + 19, y), f"and {len(order) - len(listed)} more", font=face, fill=FAINT)


def _that_fit(labels: Sequence[int], places: int) -> Sequence[int]:
    """Return the labels that are listed; one place is kept for "and 7 more" if there are more."""
    return labels if len(labels) <= places else labels[: places - 1]
