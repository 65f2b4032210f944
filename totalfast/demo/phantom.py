"""A synthetic thorax-abdomen CT with its label map, different for every seed.

The anatomy is written once in millimetres, in reference coordinates (r, a, s): patient right,
anterior and superior are positive, s = 0 lies between T12 and L1. A random similarity transform and
a smooth random displacement map the voxels to these coordinates, so that simple shapes become
irregular.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from totalfast.demo.bones import draw_pelvis, draw_rib_cage, draw_spine, spine_a
from totalfast.demo.canvas import AIR_HU, FAT_HU, MESENTERY_HU, MUSCLE_HU, SKIN_HU, Canvas, Paint
from totalfast.demo.organs import (
    draw_airways_and_gullet,
    draw_bowel,
    draw_great_vessels,
    draw_heart,
    draw_lungs,
    draw_retroperitoneum,
    draw_upper_abdomen,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from totalfast.demo.canvas import Mask


@dataclass(frozen=True, slots=True, kw_only=True)
class Phantom:
    """A synthetic scan.

    Attributes
    ----------
    ct
        int16, (x, y, z), HU, RAS+ axes.
    labels
        uint8, same shape; ids of TotalSegmentator's task ``total``, 0 is background.
    affine
        (4, 4), voxel to mm.
    """

    ct: NDArray[np.int16]
    labels: NDArray[np.uint8]
    affine: NDArray[np.float64]

    def __post_init__(self) -> None:
        if self.ct.ndim != 3 or self.ct.shape != self.labels.shape:
            message = f"ct {self.ct.shape} and labels {self.labels.shape} must be one 3-D shape."
            raise ValueError(message)
        if self.affine.shape != (4, 4):
            message = f"affine has shape {self.affine.shape}; expected (4, 4)."
            raise ValueError(message)


def make_phantom(
    seed: int, *, shape_xyz: tuple[int, int, int] = (250, 200, 250), spacing_mm: float = 1.5
) -> Phantom:
    """Draw a thorax and abdomen with about a hundred labelled structures.

    Parameters
    ----------
    seed
        Decides position, pose, organ sizes, contrast and noise; equal seeds give equal volumes.
    shape_xyz
        Voxels along patient right, anterior and superior. Structures beyond are cut
        off, as on a scanner. A longer volume shows more of neck and pelvis.
    spacing_mm
        Isotropic voxel size.

    Returns
    -------
        The scan, noise and partial-volume blur included, and the labels as drawn.

    Raises
    ------
    ValueError
        If the shape is not three positive numbers or the spacing is not positive.
    """
    if len(shape_xyz) != 3 or min(shape_xyz) < 1:
        message = f"shape_xyz is {shape_xyz}; expected three positive numbers."
        raise ValueError(message)
    if not spacing_mm > 0:
        message = f"spacing_mm is {spacing_mm}; expected a positive number."
        raise ValueError(message)

    canvas = Canvas(np.random.default_rng(seed), shape_xyz, spacing_mm)
    _draw_body(canvas)
    draw_spine(canvas)
    draw_rib_cage(canvas)
    draw_pelvis(canvas)
    draw_airways_and_gullet(canvas)
    draw_great_vessels(canvas)
    draw_heart(canvas)
    draw_retroperitoneum(canvas)
    draw_upper_abdomen(canvas)
    draw_bowel(canvas)
    draw_lungs(canvas)
    _draw_muscles(canvas)
    affine = np.diag([spacing_mm, spacing_mm, spacing_mm, 1.0])
    affine[:3, 3] = -spacing_mm * (np.asarray(shape_xyz) - 1) / 2
    return Phantom(ct=_scan(canvas), labels=canvas.labels, affine=affine)


def _draw_body(canvas: Canvas) -> None:
    """Skin, subcutaneous fat, the muscle wall and the fat that fills chest and abdomen."""
    from scipy import ndimage

    inside = canvas.body < 1
    canvas.hu[inside] = FAT_HU
    pixels_mm = max(1, round(2.0 / canvas.spacing_mm))
    core = inside
    for _ in range(pixels_mm):
        core = ndimage.binary_erosion(core, _cross_in_plane(), border_value=1)
    canvas.hu[inside & ~core] = SKIN_HU
    shoulder = np.clip((canvas.s - 120) / 60, 0, 1) * np.float32(0.16)
    wall = core & (canvas.cavity < 1.14 + 0.05 * canvas.roughness + shoulder)
    canvas.hu[wall & (canvas.body < 0.955)] = MUSCLE_HU
    hollow = core & (canvas.cavity < 1)
    canvas.hu[hollow] = MESENTERY_HU
    canvas.hu[hollow & (np.abs(canvas.above_diaphragm_mm) < 3.2)] = MUSCLE_HU


def _draw_muscles(canvas: Canvas) -> None:
    """The long muscles of the back, last: they fill what the bones left free."""
    for side, word in ((-1.0, "left"), (1.0, "right")):
        column = [
            (side * (24 + 8 * (s < 0)), spine_a(s) - 39, float(s)) for s in range(280, -181, -46)
        ]
        canvas.tube(
            f"autochthon_{word}",
            column,
            [15, 16, 18, 20, 21, 22, 24, 26, 27, 25, 20],
            paint=Paint(MUSCLE_HU),
            flat=(1, 0.78, 1),
            inside=canvas.body / 0.93,
            jitter_mm=1.5,
        )


def _scan(canvas: Canvas) -> NDArray[np.int16]:
    """Blur and noise like a scanner's, a table under the patient, HU as int16."""
    from scipy import ndimage

    _draw_table(canvas)
    blur = canvas.random.uniform(1.0, 1.25) / canvas.spacing_mm
    image = ndimage.gaussian_filter(canvas.hu, blur, truncate=3, output=np.float32)
    noise = canvas.random.standard_normal(canvas.shape, dtype=np.float32)
    grain = 0.9 / canvas.spacing_mm
    noise = ndimage.gaussian_filter(noise, (grain, grain, 0.5 * grain), truncate=2.5)
    # Centre of the body is noisiest: rays there cross the most tissue.
    level = canvas.random.uniform(7, 12) / max(float(noise.std()), 1e-6)
    noise *= level * (1.35 - 0.5 * np.minimum(canvas.body, 1.4))
    image += noise
    image[image < -900] -= 0.3 * (image[image < -900] + 900)
    hu: NDArray[np.int16] = np.rint(np.clip(image, AIR_HU, 3071)).astype(np.int16)
    return hu


def _draw_table(canvas: Canvas) -> None:
    inside = canvas.body < 1
    columns = inside.any(axis=(0, 2))
    first = int(np.argmax(columns)) if columns.any() else 0
    across = canvas.spacing_mm * (np.arange(canvas.shape[0]) - (canvas.shape[0] - 1) / 2)
    depth = canvas.spacing_mm * (np.arange(canvas.shape[1]) - first)
    sag = depth[None, :] + 7 - np.square(across / 200)[:, None] * 24
    wide = np.abs(across)[:, None] < 205
    plate = (np.abs(sag) < 1.6) | (np.abs(sag + 22) < 1.6)
    foam = (sag < 0) & (sag > -22)
    for mask, hu in ((foam & wide, -960.0), (plate & wide, -420.0)):
        canvas.hu[mask[:, :, None] & ~inside] = hu


def _cross_in_plane() -> Mask:
    cross = np.zeros((3, 3, 1), bool)
    cross[1, :, 0] = cross[:, 1, 0] = True
    return cross
