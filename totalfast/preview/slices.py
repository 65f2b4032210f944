"""One slice as a picture: grey values, coloured and outlined labels, and names.

Slices have the orientation that radiologists use: the patient's right is on the left, the front
and the head are on top, and in a sagittal slice the patient looks to the left.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import distance_transform_edt, find_objects, gaussian_filter

from totalfast.preview.palette import short_name

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from totalfast.preview.volume import LabelledVolume

Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont

FILL = 0.34
"""Opacity of a label's colour over the scan."""
OUTLINE_PX = 1.6
SMOOTHING = 0.6
"""Blur of a label before it is enlarged, in its own pixels: rounds its steps."""
NAME_PX = 14

EDGES = {0: ("A", "P", "S", "I"), 1: ("R", "L", "S", "I"), 2: ("R", "L", "A", "P")}
"""Axis across a slice to the directions at the picture's left, right, top and bottom."""


def slice_view(
    volume: LabelledVolume,
    axis: int,
    index: int,
    size: tuple[int, int],
    *,
    colours: NDArray[np.float32],
    names: Mapping[int, str],
) -> tuple[Image.Image, set[int]]:
    """Draw one slice.

    Parameters
    ----------
    volume
        The scan and its labels.
    axis, index
        0, 1 or 2 for a sagittal, coronal or axial slice, and its index along that axis.
    size
        Height and width in pixels.
    colours
        (labels, 3), 0 to 255.
    names
        Label to class name.

    Returns
    -------
        The picture, and the labels that are on it.
    """
    grey = _to_picture_axes(volume.scan_slice(axis, index, (size[1], size[0])))
    low, high = volume.window
    grey = np.clip((grey - low) / (high - low), 0, 1).astype(np.float32) * 235
    picture = np.repeat(grey[..., None], 3, axis=2)

    labels, cover = enlarge_labels(_to_picture_axes(volume.label_slice(axis, index)), size)
    present = {int(label) for label in np.flatnonzero(np.bincount(labels.ravel()))} - {0}
    alpha = (FILL * cover)[..., None]
    picture = (1 - alpha) * picture + alpha * colours[labels]
    edge = _outline(labels)[..., None]
    picture = (1 - edge) * picture + edge * (0.85 * colours[labels] + 30)

    image = Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))
    _write_names(image, labels, names)
    _write_edges(image, EDGES[axis])
    return image, present


def enlarge_labels(
    labels: NDArray[Any], size: tuple[int, int]
) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """Enlarge a label picture with smooth borders.

    Each label is enlarged separately, as a picture of zeros and ones; each pixel gets the label
    with the largest value.

    Parameters
    ----------
    labels
        (rows, columns).
    size
        Height and width of the result.

    Returns
    -------
        The labels, and the coverage of each pixel by any of them, 0 to 1.
    """
    best = np.full(size, 0.5, np.float32)
    result = np.zeros(size, labels.dtype)
    cover = np.zeros(size, np.float32)
    scale = np.array(size) / labels.shape
    for label, where in enumerate(find_objects(labels.astype(np.int32)), start=1):
        if where is None:
            continue
        # The box has a margin of two source pixels, in which the border fades out, and three more
        # pixels for cubic interpolation.
        low = [max(s.start - 2, 0) for s in where]
        high = [min(s.stop + 2, n) for s, n in zip(where, labels.shape, strict=True)]
        around = [max(a - 3, 0) for a in low]
        source = tuple(slice(a, b + 3) for a, b in zip(around, high, strict=True))
        target = [
            (int(np.floor(a * s)), int(np.ceil(b * s)))
            for a, b, s in zip(low, high, scale, strict=True)
        ]
        mask = gaussian_filter((labels[source] == label).astype(np.float32), SMOOTHING)
        part = tuple(slice(a, min(b, n)) for (a, b), n in zip(target, size, strict=True))
        rows, columns = part
        box = (
            columns.start / scale[1] - around[1],
            rows.start / scale[0] - around[0],
            min(columns.stop / scale[1], labels.shape[1]) - around[1],
            min(rows.stop / scale[0], labels.shape[0]) - around[0],
        )
        extent = (columns.stop - columns.start, rows.stop - rows.start)
        enlarged = Image.fromarray(mask).resize(extent, Image.Resampling.BICUBIC, box=box)
        share = np.asarray(enlarged)
        cover[part] = np.maximum(cover[part], np.clip(2 * share - 0.5, 0, 1))
        # Between two structures both have less than a half; then the larger share is used.
        better = share > best[part] - 0.1 * (result[part] == 0)
        result[part][better] = label
        best[part][better] = share[better]
    return result, np.where(result > 0, np.maximum(cover, 0.35), 0)


def enlarge_values(values: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """Enlarge a picture of numbers (rows, columns) by cubic interpolation."""
    picture = Image.fromarray(np.ascontiguousarray(values, np.float32))
    return np.asarray(picture.resize((size[1], size[0]), Image.Resampling.BICUBIC))


def font(size_px: int) -> Font:
    """Return Pillow's own font, so that pictures are the same on all machines."""
    return ImageFont.load_default(size_px)


def _to_picture_axes(plane: NDArray[Any]) -> NDArray[Any]:
    """Turn a plane with two RAS+ axes into rows and columns of a picture."""
    rows_and_columns: NDArray[Any] = plane[::-1, ::-1].T
    return rows_and_columns


def _outline(labels: NDArray[Any]) -> NDArray[np.float32]:
    """Return 1 on the border of a structure, less inside of it, and 0 elsewhere."""
    inside = labels > 0
    border = np.zeros(labels.shape, bool)
    for axis in (0, 1):
        ahead = np.diff(labels.astype(np.int32), axis=axis) != 0
        pad = [(0, 0), (0, 0)]
        pad[axis] = (0, 1)
        border |= np.pad(ahead, pad)
        pad[axis] = (1, 0)
        border |= np.pad(ahead, pad)
    distance = distance_transform_edt(~border)
    edge: NDArray[np.float32] = (inside * np.clip(OUTLINE_PX - distance, 0, 1)).astype(np.float32)
    return edge


def _write_names(image: Image.Image, labels: NDArray[Any], names: Mapping[int, str]) -> None:
    """Write names of structures where they fit, the largest first; names never overlap."""
    draw = ImageDraw.Draw(image)
    face = font(NAME_PX)
    places = []
    for label, where in enumerate(find_objects(labels.astype(np.int32)), start=1):
        if where is None or label not in names:
            continue
        mask = np.pad(labels[where] == label, 1)
        depth = distance_transform_edt(mask)
        row, column = np.unravel_index(int(depth.argmax()), depth.shape)
        places.append(
            (float(depth.max()), column - 1 + where[1].start, row - 1 + where[0].start, label)
        )
    occupied: list[tuple[float, float, float, float]] = []
    for depth_px, x, y, label in sorted(places, reverse=True):
        text = short_name(names[label])
        left, top, right, bottom = draw.textbbox((x, y), text, font=face, anchor="mm")
        # A name may be wider than its structure, but only up to a limit.
        if depth_px < 6 or right - left > 9 * depth_px:
            continue
        if left < 2 or top < 2 or right > image.width - 2 or bottom > image.height - 2:
            continue
        if any(
            left < other[2] and other[0] < right and top < other[3] and other[1] < bottom
            for other in occupied
        ):
            continue
        occupied.append((left - 3, top - 2, right + 3, bottom + 2))
        draw.text(
            (x, y),
            text,
            font=face,
            anchor="mm",
            fill="white",
            stroke_width=2,
            stroke_fill="#101418",
        )


def _write_edges(image: Image.Image, letters: tuple[str, str, str, str]) -> None:
    draw = ImageDraw.Draw(image)
    face = font(15)
    middle_x, middle_y = image.width / 2, image.height / 2
    left, right, top, bottom = letters
    for text, at, anchor in (
        (left, (6, middle_y), "lm"),
        (right, (image.width - 6, middle_y), "rm"),
        (top, (middle_x, 5), "mt"),
        (bottom, (middle_x, image.height - 5), "mb"),
    ):
        draw.text(
            at,
            text,
            font=face,
            anchor=anchor,
            fill="#ffd24a",
            stroke_width=2,
            stroke_fill="black",
        )
