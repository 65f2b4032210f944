"""A shaded view of the labels from the front, along parallel rays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.ndimage import find_objects, gaussian_filter

from totalfast.preview.slices import enlarge_labels, enlarge_values

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from totalfast.preview.volume import LabelledVolume

YAW_DEG = 24.0
"""Rotation of the patient to their right: the view is from the front left."""
RAYS = 320
"""Rays along the longer side of the picture."""
VEIL = 0.28
"""Opacity of structures that enclose others."""
LIGHT = np.array([-0.45, -0.5, 0.75])
"""Direction to the light: (right in the picture, down, to the viewer)."""


def surface_view(
    volume: LabelledVolume,
    colours: NDArray[np.float32],
    translucent: NDArray[np.bool_],
    box_px: tuple[int, int],
) -> NDArray[np.uint8]:
    """Draw the labels as solid bodies, orthographically.

    Parameters
    ----------
    volume
        The labels.
    colours
        (labels, 3), 0 to 255.
    translucent
        (labels,): structures that are drawn transparent.
    box_px
        Maximum height and width.

    Returns
    -------
        RGBA, (height, width, 4), transparent where no structure is.
    """
    rays, spacing_mm = _rays(volume)
    if not rays.size or not rays.any():
        return np.zeros((1, 1, 4), np.uint8)
    solid, solid_depth = _first_hit(rays, ~translucent)
    veil, veil_depth = _first_hit(rays, translucent)
    veil[veil_depth >= solid_depth] = 0
    covered = (solid > 0) | (veil > 0)
    rows, columns = (np.flatnonzero(covered.any(axis=k)) for k in (1, 0))
    crop = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    height, width = (int(s.stop - s.start) for s in crop)
    scale = min(box_px[0] / height, box_px[1] / width)
    size = max(int(height * scale), 1), max(int(width * scale), 1)

    picture = np.zeros((*size, 4), np.float32)
    for labels, depth, opacity in ((solid, solid_depth, 1.0), (veil, veil_depth, VEIL)):
        labels, depth = labels[crop], depth[crop] * spacing_mm
        if not labels.any():
            continue
        light = enlarge_values(_shade(labels, depth, spacing_mm), size)
        large, cover = enlarge_labels(labels, size)
        alpha = (cover * np.float32(opacity))[..., None]
        colour = np.clip(colours[large] * light[..., None], 0, 255)
        picture[..., :3] = alpha * colour + (1 - alpha) * picture[..., :3]
        picture[..., 3:] = alpha + (1 - alpha) * picture[..., 3:]
    opacity_of_all = picture[..., 3:]
    picture[..., :3] /= np.maximum(opacity_of_all, 1e-3)
    picture[..., 3:] = 255 * opacity_of_all
    return np.clip(picture, 0, 255).astype(np.uint8)


def _rays(volume: LabelledVolume) -> tuple[NDArray[Any], float]:
    """Return labels (down, right in the picture, away from the viewer), and their spacing in mm."""
    labels = volume.canonical_labels
    spacing = volume.canonical_grid.spacing_mm.astype(np.float64)
    yaw = np.deg2rad(YAW_DEG)
    width_mm, depth_mm, height_mm = (float(v) for v in volume.extent_mm)
    across_mm = width_mm * np.cos(yaw) + depth_mm * np.sin(yaw)
    away_mm = width_mm * np.sin(yaw) + depth_mm * np.cos(yaw)
    step = max(across_mm, height_mm) / RAYS
    across = (np.arange(int(across_mm / step)) + 0.5) * step - across_mm / 2
    away = (np.arange(int(away_mm / step)) + 0.5) * step - away_mm / 2
    down = (np.arange(max(int(height_mm / step), 1)) + 0.5) * step
    # The viewer faces the patient: picture's right is the patient's left (-x), away is -y.
    x_mm = -across[:, None] * np.cos(yaw) + away[None, :] * np.sin(yaw)
    y_mm = -across[:, None] * np.sin(yaw) - away[None, :] * np.cos(yaw)
    x = np.rint((x_mm + width_mm / 2) / spacing[0] - 0.5).astype(np.intp)
    y = np.rint((y_mm + depth_mm / 2) / spacing[1] - 0.5).astype(np.intp)
    inside = (x >= 0) & (x < labels.shape[0]) & (y >= 0) & (y < labels.shape[1])
    x, y = np.where(inside, x, 0), np.where(inside, y, 0)
    z = np.clip(np.rint((height_mm - down) / spacing[2] - 0.5), 0, labels.shape[2] - 1)
    rays = np.empty((down.size, across.size, away.size), labels.dtype)
    before = -1
    for row, k in enumerate(z.astype(np.intp)):
        if k == before:
            rays[row] = rays[row - 1]
            continue
        rays[row] = labels[:, :, k][x, y] * inside
        before = k
    return rays, step


def _first_hit(
    rays: NDArray[Any], selected: NDArray[np.bool_]
) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """Return, per ray, the first label that is selected, or 0, and its depth in steps."""
    allowed = selected.copy()
    allowed[0] = False
    hit = np.take(allowed, rays)
    depth = hit.argmax(axis=2)
    any_hit = np.take_along_axis(hit, depth[..., None], 2)[..., 0]
    labels = np.take_along_axis(rays, depth[..., None], 2)[..., 0]
    far = np.float32(rays.shape[2])
    return np.where(any_hit, labels, 0), np.where(any_hit, depth, far).astype(np.float32)


def _shade(
    labels: NDArray[Any], depth_mm: NDArray[np.float32], spacing_mm: float
) -> NDArray[np.float32]:
    """Return the brightness per pixel: light from above, darker in hollows and beside edges."""
    smooth = np.array(depth_mm)
    sigma = 2.2 / spacing_mm
    margin = int(3 * sigma) + 1
    for label, where in enumerate(find_objects(labels.astype(np.int32)), start=1):
        if where is None:
            continue
        box = tuple(slice(max(s.start - margin, 0), s.stop + margin) for s in where)
        mask = labels[box] == label
        weight = gaussian_filter(mask.astype(np.float32), sigma, truncate=3)
        value = gaussian_filter(np.where(mask, depth_mm[box], 0), sigma, truncate=3)
        smooth[box][mask] = (value / np.maximum(weight, 1e-6))[mask]
    padded = np.pad(smooth, 1, mode="edge")  # a picture may be one pixel high
    down, right = (slope[1:-1, 1:-1] for slope in list(np.gradient(padded, spacing_mm)))
    # A jump in depth is an edge, not a slope.
    right, down = np.clip(right, -3.0, 3.0), np.clip(down, -3.0, 3.0)
    normal = np.stack([right, down, np.ones_like(right)], axis=-1)
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
    light = LIGHT / np.linalg.norm(LIGHT)
    diffuse = np.clip(normal @ light, 0, None)
    # The background gets the mean depth of the bodies; otherwise their rims would look too bright.
    solid = np.where(labels > 0, smooth, np.nan)
    level = np.where(np.isnan(solid), np.nanmean(solid), solid)
    hollow = np.clip(level - gaussian_filter(level, 10 / spacing_mm), 0, 40) / 40
    shade: NDArray[np.float32] = ((0.42 + 0.72 * diffuse) * (1 - 0.55 * hollow)).astype(np.float32)
    return shade
