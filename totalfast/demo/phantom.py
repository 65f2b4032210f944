"""A made thorax-abdomen CT with its label map, different for every seed.

One responsibility: turn a seed into a CT-like volume and the TotalSegmentator labels of what was
drawn. It knows nothing of models, files or of how the volume is used.

The anatomy is written once in millimetres, in reference coordinates (r, a, s): patient right,
anterior and superior are positive, s = 0 lies between T12 and L1. A random similarity transform and
a smooth random displacement map the voxels there, so that drawing stays simple and shapes do not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Sequence

Volume = NDArray[np.float32]
Mask = NDArray[np.bool_]
Box = tuple[slice, slice, slice]
Curve = NDArray[np.float64]

FIELD_CENTRE_RAS_MM = (0.0, 0.0, 45.0)
"""Reference point in the middle of the volume: 375 mm then reach from T2 to L5."""
WARP_MM = 5.0
"""Largest displacement of the smooth warp along one axis: organic, yet no organ folds over."""
WARP_KNOT_MM = 55.0
"""Knot distance of the warp: about half an organ, so that shapes bend rather than wrinkle."""
ROUGHNESS_KNOT_MM = 18.0
"""Knot distance of the surface noise that keeps ellipsoids from looking like ellipsoids."""

AIR_HU, LUNG_HU, FAT_HU, MESENTERY_HU, SKIN_HU, MUSCLE_HU = -1024, -850, -105, -95, 10, 58
CORTICAL_HU, MARROW_HU, CARTILAGE_HU, CLOT_HU = 720, 230, 110, 45
"""Textbook values of a portal-venous CT; soft organs lie close together on purpose."""

# Rows of (s, half width, half depth, centre a) in mm, from the neck to the hips.
BODY_PROFILE = (
    (310, 62, 62, -15), (265, 76, 72, -14), (245, 122, 84, -12), (222, 157, 96, -10),
    (180, 161, 106, -7), (120, 158, 113, -5), (50, 155, 111, -5), (0, 150, 107, -6),
    (-60, 146, 104, -7), (-130, 162, 109, -9), (-240, 172, 115, -10),
)  # fmt: skip
CAVITY_PROFILE = (
    (262, 8, 8, -24), (250, 42, 26, -24), (236, 66, 42, -20), (215, 90, 58, -12),
    (180, 113, 70, -4), (120, 130, 80, 0), (50, 136, 82, 1), (0, 133, 79, 1),
    (-60, 124, 75, 2), (-130, 122, 77, 3), (-180, 95, 75, 0), (-250, 60, 65, -5),
)  # fmt: skip
SPINE_PROFILE = ((280, -48), (215, -50), (140, -58), (60, -52), (-60, -38), (-130, -46))
"""Rows of (s, centre a of the vertebral bodies) in mm: kyphosis above, lordosis below."""

CERVICAL_HEIGHT_MM, THORACIC_HEIGHTS_MM, LUMBAR_HEIGHTS_MM = 16.0, (17.5, 24.0), (26.0, 29.0)
RIB_END_DEG = (146, 149, 150, 150, 148, 145, 140, 132, 124, 114, 84, 60)
"""How far each rib runs round the chest, 0 at the spine and 180 at the sternum."""
RIB_DROP_MM = (34, 44, 52, 58, 64, 70, 76, 78, 78, 74, 66, 54)
"""How far each rib would descend by 180 degrees."""


class _Bone(TypedDict):
    hu: float
    shell_hu: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Phantom:
    """A made scan.

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
        Voxels along patient right, anterior and superior. Whatever does not fit is cut off,
        as on a scanner; a longer volume shows more of neck and pelvis.
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

    canvas = _Canvas(np.random.default_rng(seed), shape_xyz, spacing_mm)
    _draw_body(canvas)
    _draw_spine(canvas)
    _draw_rib_cage(canvas)
    _draw_pelvis(canvas)
    _draw_airways_and_gullet(canvas)
    _draw_great_vessels(canvas)
    _draw_heart(canvas)
    _draw_retroperitoneum(canvas)
    _draw_upper_abdomen(canvas)
    _draw_bowel(canvas)
    _draw_lungs(canvas)
    _draw_muscles(canvas)
    affine = np.diag([spacing_mm, spacing_mm, spacing_mm, 1.0])
    affine[:3, 3] = -spacing_mm * (np.asarray(shape_xyz) - 1) / 2
    return Phantom(ct=_scan(canvas), labels=canvas.labels, affine=affine)


class _Canvas:
    """The volume under construction, with every voxel's reference coordinates."""

    def __init__(
        self, random: np.random.Generator, shape_xyz: tuple[int, int, int], spacing_mm: float
    ) -> None:
        from totalsegmentator.map_to_binary import class_map

        self.random = random
        self.shape = shape_xyz
        self.spacing_mm = spacing_mm
        self.ids = {name: label for label, name in class_map["total"].items()}
        self.labels = np.zeros(shape_xyz, np.uint8)
        self.hu = np.full(shape_xyz, AIR_HU, np.float32)
        self.kept_free = np.zeros(shape_xyz, bool)
        self.contrast = random.uniform(0.7, 1.25)

        angles = np.deg2rad(random.uniform(-3, 3, 3))
        self.to_reference = _rotation(angles) / random.uniform(0.95, 1.04)
        self.to_scanner = np.linalg.inv(self.to_reference)
        self.shift_mm = random.uniform(-6, 6, 3)
        axes = [
            spacing_mm * (np.arange(count) - (count - 1) / 2) - offset
            for count, offset in zip(shape_xyz, self.shift_mm, strict=True)
        ]
        grid = [
            axes[axis].astype(np.float32).reshape([-1 if axis == k else 1 for k in range(3)])
            for axis in range(3)
        ]
        warped = []
        for axis in range(3):
            field = self.smooth_noise(WARP_KNOT_MM) * np.float32(WARP_MM)
            for k in range(3):
                field += np.float32(self.to_reference[axis, k]) * grid[k]
            field += np.float32(FIELD_CENTRE_RAS_MM[axis])
            warped.append(field)
        self.r, self.a, self.s = warped
        self.roughness = self.smooth_noise(ROUGHNESS_KNOT_MM)
        slices = self.to_reference[2, 2] * axes[2] + FIELD_CENTRE_RAS_MM[2]
        self.body = self._tube_radius(BODY_PROFILE, slices, random.uniform(-4, 8))
        self.cavity = self._tube_radius(CAVITY_PROFILE, slices, 0.0)
        self.above_diaphragm_mm = self.s - self._diaphragm()

    def smooth_noise(self, knot_mm: float) -> Volume:
        """Random cubic B-spline field with values of about -1 to 1."""
        weights = [_spline_weights(n, knot_mm / self.spacing_mm) for n in self.shape]
        field = self.random.uniform(-1.6, 1.6, [w.shape[1] for w in weights]).astype(np.float32)
        for weight in weights:
            field = np.tensordot(field, weight, axes=(0, 1))
        return np.ascontiguousarray(np.clip(field, -1, 1))

    def _tube_radius(
        self, profile: Sequence[Sequence[float]], slices_mm: Curve, extra_mm: float
    ) -> Volume:
        """1 on the outline of a squarish elliptic tube, less inside."""
        width, depth, centre = (
            _profile_at(profile, slices_mm, k).astype(np.float32) for k in (1, 2, 3)
        )
        x = np.square(self.r / (width + np.float32(extra_mm)))
        y = np.square((self.a - centre) / (depth + np.float32(extra_mm)))
        # Squircle x + y - k x y; the clip keeps the product from turning the far outside inside.
        np.minimum(x, 2.25, out=x)
        np.minimum(y, 2.25, out=y)
        radius: Volume = np.sqrt(x + y - np.float32(0.42) * x * y)
        return radius

    def _diaphragm(self) -> Volume:
        """Height s of the diaphragm over every voxel's (r, a): two domes and deep recesses."""
        right_top, left_top = 80 + self.random.uniform(-8, 8), 68 + self.random.uniform(-8, 8)
        fall = np.square((self.a - 8) / np.float32(72)) * np.float32(42)
        right = right_top - np.square((self.r - 62) / np.float32(66)) * np.float32(38)
        left = left_top - np.square((self.r + 62) / np.float32(66)) * np.float32(38)
        dome: Volume = np.maximum(right, left) - fall
        return np.maximum(dome, -28)

    def box(self, low_mm: Curve, high_mm: Curve) -> Box:
        """Voxels that can lie inside a box of reference coordinates."""
        middle, reach = (high_mm + low_mm) / 2, (high_mm - low_mm) / 2
        voxel = self._unwarped(middle[None])[0]
        return self._box(voxel, np.abs(self.to_scanner) @ reach + WARP_MM)

    def boxes(self, centres_mm: Curve, reaches_mm: Curve) -> list[Box]:
        """Like :meth:`box` for many small ones: follows the warp instead of allowing for it."""
        voxels = self._unwarped(centres_mm)
        last = np.array(self.shape) - 1
        for _ in range(2):
            nearest = tuple(np.clip(np.rint(voxels).astype(int), 0, last).T)
            here = np.stack([field[nearest] for field in (self.r, self.a, self.s)], axis=1)
            flat = self._unwarped(here) - np.stack(nearest, axis=1)
            voxels = self._unwarped(centres_mm) - flat
        # The warp stretches by up to a third; what two steps leave open is below 2 mm.
        reaches = 1.3 * reaches_mm @ np.abs(self.to_scanner).T + 2.0
        return [self._box(voxel, reach) for voxel, reach in zip(voxels, reaches, strict=True)]

    def _unwarped(self, points_mm: Curve) -> Curve:
        """Voxel indices of reference points, the warp left out."""
        scanner = (points_mm - np.array(FIELD_CENTRE_RAS_MM)) @ self.to_scanner.T + self.shift_mm
        voxels: Curve = scanner / self.spacing_mm + (np.array(self.shape) - 1) / 2
        return voxels

    def _box(self, voxel: Curve, reach_mm: Curve) -> Box:
        start = [int(v - reach / self.spacing_mm) for v, reach in zip(voxel, reach_mm, strict=True)]
        stop = [
            int(v + reach / self.spacing_mm) + 2 for v, reach in zip(voxel, reach_mm, strict=True)
        ]
        ranges = [
            slice(min(max(low, 0), n), min(max(high, 0), n))
            for low, high, n in zip(start, stop, self.shape, strict=True)
        ]
        return ranges[0], ranges[1], ranges[2]

    def jitter(self, values: Sequence[float], amount_mm: float) -> Curve:
        """The values, each moved by up to ``amount_mm``."""
        return np.asarray(values) + self.random.uniform(-amount_mm, amount_mm, len(values))

    def fill(self, name: str, mask: Mask, hu: float, box: Box | None = None) -> None:
        """Label the voxels of the mask that are still free."""
        where: Any = box if box is not None else ...
        free = mask & (self.labels[where] == 0) & ~self.kept_free[where]
        self.labels[where][free] = self.ids[name]
        self.hu[where][free] = hu

    def blob(
        self,
        name: str,
        centre: Sequence[float],
        radii: Sequence[float],
        *,
        hu: float,
        shell_hu: float | None = None,
        tilt_deg: Sequence[float] = (0, 0, 0),
        rough: float = 0.15,
        jitter_mm: float = 4.0,
        inside: Volume | None = None,
        inside_limit: float = 1.0,
        below_diaphragm: bool = False,
    ) -> None:
        """Draw an uneven ellipsoid where nothing is drawn yet."""
        middle = self.jitter(centre, jitter_mm)
        size = np.asarray(radii) * self.random.uniform(1 - 0.02 * jitter_mm, 1 + 0.02 * jitter_mm)
        turn = _rotation(np.deg2rad(tilt_deg))
        reach = np.sqrt(np.square(turn.T * size).sum(1)) * 1.15
        box = self.box(middle - reach, middle + reach)
        offsets = [
            field[box] - np.float32(m)
            for field, m in zip((self.r, self.a, self.s), middle, strict=True)
        ]
        distance = np.zeros_like(offsets[0])
        for axis in range(3):
            along = sum(np.float32(turn[axis, k] / size[axis]) * offsets[k] for k in range(3))
            distance += np.square(along)
        distance -= np.float32(2 * rough) * self.roughness[box]
        mask = distance < 1
        if inside is not None:
            mask &= inside[box] < inside_limit
        if below_diaphragm:
            mask &= self.above_diaphragm_mm[box] < -2
        if shell_hu is not None:
            self.fill(name, mask & (distance < 0.6), hu, box)
        self.fill(name, mask, hu if shell_hu is None else shell_hu, box)

    def tube(
        self,
        name: str | None,
        points: Sequence[Sequence[float] | Curve] | Curve,
        radius: float | Sequence[float] | Curve,
        *,
        hu: float,
        flat: Sequence[float] = (1, 1, 1),
        shell_hu: float | None = None,
        jitter_mm: float = 2.0,
        inside: Volume | None = None,
    ) -> None:
        """Draw a bent tube: a chain of ellipsoids along a spline.

        ``radius`` is one value or one per point, ``flat`` scales it along r, a and s.
        Without a name only the HU inside lungs are drawn (vessels have no label of their own).
        """
        knots = np.asarray(points, np.float64)
        if jitter_mm:
            knots = knots + self.random.uniform(-jitter_mm, jitter_mm, knots.shape)
        radii = np.broadcast_to(np.asarray(radius, np.float64), len(knots))
        step_mm = max(0.7 * float(np.min(radii)) * min(flat), 0.75 * self.spacing_mm)
        path, thickness = _spline(knots, radii, step_mm)
        reaches = thickness[:, None] * np.asarray(flat)
        drawn = []
        for box, centre, reach in zip(self.boxes(path, reaches), path, reaches, strict=True):
            if any(axis.start >= axis.stop for axis in box):
                continue
            squares = [
                np.square((field[box] - np.float32(c)) / np.float32(w))
                for field, c, w in zip((self.r, self.a, self.s), centre, reach, strict=True)
            ]
            distance = squares[0] + squares[1] + squares[2]
            mask = distance < 1
            if inside is not None:
                mask &= inside[box] < 1
            if name is None:
                self.hu[box][mask & (self.hu[box] < -600)] = hu
            elif shell_hu is None:
                self.fill(name, mask, hu, box)
            else:
                thinnest = float(min(reach))
                self.fill(name, mask & (distance < max(0.45, 1 - 1.3 / thinnest) ** 2), hu, box)
                drawn.append((box, mask))
        # The shell comes when the whole core is drawn, or it would wall the core off at each step.
        if name is not None and shell_hu is not None:
            for box, mask in drawn:
                self.fill(name, mask, shell_hu, box)


def _draw_body(canvas: _Canvas) -> None:
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


def _vertebrae() -> list[tuple[str, float, float]]:
    """Rows of (level, centre s, height) in mm, from T1's neighbour C7 down to L5."""
    thoracic = np.linspace(*THORACIC_HEIGHTS_MM, 12)
    rows, top = [], float(thoracic.sum()) + 4 * CERVICAL_HEIGHT_MM
    heights = [
        *((f"C{n}", CERVICAL_HEIGHT_MM) for n in range(4, 8)),
        *((f"T{n}", float(thoracic[n - 1])) for n in range(1, 13)),
        *((f"L{n}", float(h)) for n, h in enumerate(np.linspace(*LUMBAR_HEIGHTS_MM, 5), 1)),
    ]
    for level, height in heights:
        rows.append((level, top - height / 2, height))
        top -= height
    return rows


def _spine_a(s_mm: float) -> float:
    return float(_profile_at(SPINE_PROFILE, np.array([s_mm]), 1)[0])


def _draw_spine(canvas: _Canvas) -> None:
    """Cord, then every vertebra as a body, an arch, transverse and spinous processes, discs."""
    rows = _vertebrae()
    cord = [(0.0, _spine_a(s) - 21.5 - 0.02 * (150 - s) * (s < 150), s) for _, s, _ in rows]
    cord = [point for point in cord if point[2] > -40]
    canvas.tube("spinal_cord", cord, 7.6, hu=38, flat=(1.2, 0.95, 1), jitter_mm=0)
    for index, (level, s, height) in enumerate(rows):
        name, a = f"vertebrae_{level}", _spine_a(s)
        grow = index / (len(rows) - 1)
        width, depth = 12.5 + 10.5 * grow, 10.5 + 6.0 * grow
        half = height / 2 - 0.8
        bone: _Bone = {"hu": MARROW_HU, "shell_hu": CORTICAL_HU - 280}
        disc_box = canvas.box(
            np.array([-width, a - depth, s - height / 2 - 3]),
            np.array([width, a + depth, s + height / 2 + 3]),
        )
        x, y = canvas.r[disc_box] / np.float32(width), (canvas.a[disc_box] - a) / np.float32(depth)
        waist = np.square((canvas.s[disc_box] - np.float32(s)) / np.float32(half))
        oval = x * x + y * y - np.float32(0.10) * waist
        endplate = np.abs(canvas.s[disc_box] - np.float32(s))
        body = (oval < 0.9) & (endplate < half - 1.5)
        core = body & (oval < 0.68) & (endplate < half - 3.2)
        canvas.fill(name, core, MARROW_HU, disc_box)
        canvas.fill(name, body, CORTICAL_HU - 300, disc_box)
        disc = (oval < 0.86) & (endplate < height / 2) & ~body & (canvas.labels[disc_box] == 0)
        canvas.hu[disc_box][disc] = 85
        lumbar = level.startswith("L")
        span = 27 + 9 * grow if lumbar else 26 + 5 * grow
        for side in (-1.0, 1.0):
            canvas.tube(
                name,
                [
                    (side * width * 0.62, a - depth * 0.7, s + height * 0.16),
                    (side * width * 0.78, a - depth - 9, s + height * 0.12),
                    (side * span, a - depth - (11 if lumbar else 19), s + height * 0.1),
                ],
                [6.0, 6.6, 5.4],
                flat=(1, 1, 1.15),
                jitter_mm=0.5,
                **bone,
            )
            canvas.tube(
                name,
                [
                    (side * width * 0.78, a - depth - 9, s + height * 0.1),
                    (side * width * 0.50, a - depth - 18, s - height * 0.12),
                    (0.0, a - depth - 24, s - height * 0.28),
                ],
                5.4,
                flat=(1, 1, 1.6),
                jitter_mm=0.3,
                **bone,
            )
        drop = height * (0.30 if lumbar else 0.85)
        canvas.tube(
            name,
            [(0, a - depth - 22, s - height * 0.2), (0, a - depth - 42, s - drop)],
            5.0,
            flat=(0.9, 1, 1.9 if lumbar else 1.3),
            jitter_mm=1.0,
            **bone,
        )


def _rib_path(number: int, side: float, s_mm: float, a_spine: float) -> Curve:
    """Centre line of a rib: neck, angle, then round the cavity while it descends."""
    start = np.deg2rad(34.0)
    angles = np.linspace(start, np.deg2rad(RIB_END_DEG[number - 1]), 14)
    s = s_mm - RIB_DROP_MM[number - 1] * (1 - np.cos(angles - start)) / 1.85
    width, depth, centre = (_profile_at(CAVITY_PROFILE, s, k) for k in (1, 2, 3))
    r, a = np.sin(angles), -np.cos(angles)
    stretch = 1 / np.sqrt((1 + np.sqrt(1 - 1.68 * np.square(r * a))) / 2)
    r, a = side * stretch * r * (width + 6.0), centre + stretch * a * (depth + 6.0)
    neck = [(side * 19.0, a_spine - 10.0, s_mm + 5.0), (side * 33.0, a_spine - 24.0, s_mm + 2.5)]
    return np.vstack([neck, np.stack([r, a, s], axis=1)])


def _draw_rib_cage(canvas: _Canvas) -> None:
    """Sternum, ribs, their cartilages, clavicles and shoulder blades."""
    bone: _Bone = {"hu": MARROW_HU - 60, "shell_hu": CORTICAL_HU}
    front = np.array([(0, 66, 207), (0, 79, 172), (0, 87, 130), (0, 91, 84)], float)
    canvas.tube("sternum", front, [23, 16, 17, 10], flat=(1, 0.36, 0.5), jitter_mm=0.5, **bone)
    heights = {level: (s, height) for level, s, height in _vertebrae()}
    for side, word in ((-1.0, "left"), (1.0, "right")):
        for number in range(1, 13):
            s, height = heights[f"T{number}"]
            path = _rib_path(number, side, s + height * 0.35, _spine_a(s))
            thin = 0.85 if number in (1, 11, 12) else 1.0
            canvas.tube(
                f"rib_{word}_{number}",
                path,
                8.0 * thin,
                flat=(0.8, 0.8, 1.2),
                jitter_mm=0.8,
                **bone,
            )
            if number <= 10:
                joint_s = float(np.interp(min(number, 7), (1, 7), (203, 88)))
                joint_a = float(np.interp(joint_s, front[::-1, 2], front[::-1, 1]))
                away = 16.0 if number <= 7 else 20.0 + 17.0 * (number - 7)
                fall = 0.0 if number <= 7 else 11.0 * (number - 7)
                end = np.array([side * away, joint_a - (number > 7) * 3.0, joint_s - fall])
                bend = (path[-1] + end) / 2 + np.array([0, 5.0, -6.0])
                canvas.tube(
                    "costal_cartilages", [path[-1], bend, end], 8.5, hu=CARTILAGE_HU,
                    flat=(0.9, 0.9, 1), jitter_mm=0.5,
                )  # fmt: skip
        collar = [(side * 20, 64, 214), (side * 60, 58, 232), (side * 110, 20, 243)]
        canvas.tube(f"clavicula_{word}", collar, 8.0, **bone)
        blade = (side * 98, -76, 176)
        canvas.blob(
            f"scapula_{word}", blade, (36, 7.5, 50), tilt_deg=(-14, 0, side * 34), rough=0.1,
            inside=canvas.body, inside_limit=0.93, **bone,
        )  # fmt: skip


def _draw_pelvis(canvas: _Canvas) -> None:
    """Sacrum, hip bones, thigh bones and bladder; a standard volume shows the iliac crests."""
    bone: _Bone = {"hu": MARROW_HU - 40, "shell_hu": CORTICAL_HU}
    canvas.blob("vertebrae_S1", (0, -52, -150), (24, 18, 13), jitter_mm=1.0, **bone)
    canvas.blob("sacrum", (0, -66, -178), (48, 17, 44), tilt_deg=(25, 0, 0), **bone)
    for side, word in ((-1.0, "left"), (1.0, "right")):
        canvas.blob(
            f"hip_{word}", (side * 108, -24, -148), (8, 56, 60), rough=0.06,
            tilt_deg=(0, side * 24, side * -30), **bone,
        )  # fmt: skip
        canvas.blob(f"hip_{word}", (side * 78, 0, -215), (30, 34, 30), **bone)
        canvas.blob(f"femur_{word}", (side * 92, 0, -222), (23, 23, 23), **bone)
    canvas.blob("urinary_bladder", (0, 30, -205), (42, 34, 34), hu=8)
    canvas.blob("prostate", (0, 18, -245), (20, 17, 16), hu=MUSCLE_HU)


def _draw_airways_and_gullet(canvas: _Canvas) -> None:
    """Trachea with both main bronchi, oesophagus."""
    windpipe = [(1, -22, 275), (1, -24, 225), (2, -30, 172)]
    canvas.tube("trachea", windpipe, 9.5, hu=-990, jitter_mm=1.0)
    canvas.tube("trachea", [(2, -30, 174), (16, -30, 158), (32, -30, 146)], 6.5, hu=-985)
    canvas.tube("trachea", [(2, -30, 174), (-18, -29, 160), (-38, -30, 150)], 6.0, hu=-985)
    gullet = [(-5, -38, 265), (-3, -41, 200), (-5, -40, 120), (-14, -30, 75), (-22, -22, 52)]
    canvas.tube("esophagus", gullet, 10.0, hu=CLOT_HU, flat=(1.15, 0.8, 1), jitter_mm=1.5)


def _draw_great_vessels(canvas: _Canvas) -> None:
    """Aorta with the branches of its arch, the large veins, the portal system."""
    artery, vein = 60 + 105 * canvas.contrast, 60 + 80 * canvas.contrast
    arch = [(8, 18, 108), (15, 26, 138), (10, 20, 170), (-6, 0, 184), (-22, -24, 172),
            (-25, -38, 140), (-21, -38, 85), (-13, -32, 45), (-7, -19, 0), (-5, -10, -60),
            (-3, -14, -106)]  # fmt: skip
    radii = [15, 15, 14, 13, 12, 11.5, 11, 10.5, 9.5, 8.5, 8]
    canvas.tube("aorta", arch, radii, hu=artery, jitter_mm=1.5)
    for name, points, size in (
        ("brachiocephalic_trunk", [(8, 12, 182), (14, 6, 200), (22, 0, 220)], 8.5),
        ("subclavian_artery_right", [(22, 0, 218), (50, 2, 236), (95, -5, 228)], 7.5),
        ("common_carotid_artery_right", [(22, 0, 220), (24, -6, 240), (26, -8, 285)], 7.5),
        ("common_carotid_artery_left", [(-6, 2, 186), (-16, -2, 225), (-26, -8, 285)], 7.5),
        ("subclavian_artery_left", [(-18, -14, 180), (-28, -16, 222), (-95, -8, 228)], 7.5),
    ):
        canvas.tube(name, points, size, hu=artery)
    for name, points, size in (
        ("superior_vena_cava", [(25, 14, 196), (26, 12, 165), (25, 8, 125)], 11.0),
        ("brachiocephalic_vein_right", [(25, 16, 196), (32, 18, 212), (48, 22, 232)], 8.5),
        ("brachiocephalic_vein_left", [(22, 22, 194), (-10, 30, 204), (-46, 24, 232)], 8.5),
        ("inferior_vena_cava", [(18, -14, -108), (19, -12, -40), (22, -10, 15), (24, 0, 62),
                                (20, 6, 84)], 11.0),
        ("portal_vein_and_splenic_vein", [(42, 10, 8), (16, 6, -18), (-20, 0, -14),
                                          (-62, -22, 2)], 8.5),
    ):  # fmt: skip
        canvas.tube(name, points, size, hu=vein)
    for side, word in ((-1.0, "left"), (1.0, "right")):
        fork = [(side * 4, -14, -106), (side * 24, -10, -135), (side * 48, 2, -190)]
        canvas.tube(f"iliac_artery_{word}", fork, 9.0, hu=artery)
        fork = [(side * 8 + 8, -20, -110), (side * 26, -22, -140), (side * 50, -8, -190)]
        canvas.tube(f"iliac_vena_{word}", fork, 10.0, hu=vein)
        for s, a in ((128, -14), (112, -12)):
            root = [(side * 14, a, s), (side * 36, a - 6, s + 2), (side * 56, a - 12, s + 4)]
            canvas.tube("pulmonary_vein", root, 8.0, hu=vein)


def _draw_heart(canvas: _Canvas) -> None:
    """Heart with brighter chambers in a wall of muscle, and the left atrial appendage."""
    pool = 60 + 85 * canvas.contrast
    canvas.blob("atrial_appendage_left", (-38, 14, 136), (9, 15, 11), hu=pool, jitter_mm=2)
    state = canvas.labels == 0
    canvas.blob(
        "heart", (-16, 26, 97), (54, 43, 44), tilt_deg=(10, 22, 24), hu=88, rough=0.08, jitter_mm=3
    )
    heart = state & (canvas.labels == canvas.ids["heart"])
    low = heart & (canvas.above_diaphragm_mm < 0)
    canvas.labels[low], canvas.hu[low] = 0, MESENTERY_HU
    for centre, size in (
        ((-38, 30, 86), (19, 17, 27)), ((-2, 46, 92), (25, 16, 27)),
        ((26, 22, 98), (19, 19, 25)), ((-6, -4, 116), (27, 15, 19)),
    ):  # fmt: skip
        box = canvas.box(np.array(centre) - size, np.array(centre) + size)
        distance = sum(
            np.square((field[box] - np.float32(c)) / np.float32(w))
            for field, c, w in zip((canvas.r, canvas.a, canvas.s), centre, size, strict=True)
        )
        chamber = np.asarray(distance) - np.float32(0.35) * canvas.roughness[box] < 1
        canvas.hu[box][heart[box] & chamber] = pool


def _draw_retroperitoneum(canvas: _Canvas) -> None:
    """Kidneys with bright cortex, psoas muscles."""
    for side, word in ((-1.0, "left"), (1.0, "right")):
        muscle = [(side * 26, -44, -8), (side * 35, -42, -60), (side * 52, -30, -120),
                  (side * 66, -6, -180)]  # fmt: skip
        canvas.tube(f"iliopsoas_{word}", muscle, [8, 15, 21, 19], hu=MUSCLE_HU, flat=(0.85, 1, 1))
        drop = -52.0 if side > 0 else -36.0
        canvas.blob(
            f"kidney_{word}", (side * 66, -38, drop), (27, 25, 52), jitter_mm=3.5, rough=0.05,
            hu=75 + 60 * canvas.contrast, shell_hu=80 + 95 * canvas.contrast,
            tilt_deg=(12, side * 14, side * 20),
        )  # fmt: skip
        fat = canvas.box(
            np.array([side * 66 - 44, -84, drop - 74.0]), np.array([side * 66 + 44, 4, drop + 74.0])
        )
        around = sum(
            np.square((field[fat] - np.float32(c)) / np.float32(w))
            for field, c, w in zip(
                (canvas.r, canvas.a, canvas.s), (side * 66, -38, drop), (37, 34, 60), strict=True
            )
        )
        canvas.kept_free[fat] |= np.asarray(around) < 1


def _draw_upper_abdomen(canvas: _Canvas) -> None:
    """Gallbladder, pancreas, stomach with its gas, spleen, liver."""
    parenchyma = 62 + 42 * canvas.contrast
    canvas.blob("gallbladder", (46, 44, -22), (14, 15, 28), hu=12, tilt_deg=(-25, 0, 0))
    gland = [(34, 10, -46), (20, 16, -34), (-8, 18, -22), (-42, -2, -10), (-74, -18, 4)]
    canvas.tube("pancreas", gland, [15, 13, 10, 10, 8], hu=62 + 28 * canvas.contrast)
    _draw_stomach(canvas)
    canvas.blob(
        "spleen", (-100, -34, 26), (26, 44, 46), hu=64 + 46 * canvas.contrast, rough=0.1,
        tilt_deg=(0, 12, -38), inside_limit=0.965, inside=canvas.cavity, below_diaphragm=True,
    )  # fmt: skip
    canvas.blob(
        "liver", (64, 6, 20), (74, 80, 68), hu=parenchyma, rough=0.08, tilt_deg=(0, -24, 0),
        inside_limit=0.965, inside=canvas.cavity, below_diaphragm=True,
    )  # fmt: skip
    canvas.blob(
        "liver", (4, 36, 32), (66, 40, 32), hu=parenchyma, rough=0.08, tilt_deg=(0, -14, 0),
        inside_limit=0.95, inside=canvas.cavity, below_diaphragm=True,
    )  # fmt: skip
    liver = canvas.labels == canvas.ids["liver"]
    veins = [(24, 0, 58), (55, 4, 40), (95, 10, 26)], [(24, 2, 58), (30, 30, 44), (26, 52, 36)]
    for points in (*veins, [(24, -4, 56), (62, -30, 34), (88, -44, 20)]):
        path, _ = _spline(np.asarray(points, float), np.full(3, 3.5), 2.0)
        for centre in path:
            box = canvas.box(centre - 3.6, centre + 3.6)
            near = np.square(canvas.r[box] - np.float32(centre[0]))
            near += np.square(canvas.a[box] - np.float32(centre[1]))
            near += np.square(canvas.s[box] - np.float32(centre[2]))
            canvas.hu[box][liver[box] & (near < 11)] = parenchyma + 22 * canvas.contrast


def _draw_stomach(canvas: _Canvas) -> None:
    bag = [(-34, -14, 46), (-58, 2, 42), (-66, 22, 8), (-44, 44, -28), (-4, 46, -44), (24, 36, -36)]
    canvas.tube("stomach", bag, [20, 31, 30, 24, 18, 12], hu=CLOT_HU, inside=canvas.cavity)
    stomach = canvas.labels == canvas.ids["stomach"]
    # A patient lies on the back: gas collects in front, above a level fluid surface.
    level = float(np.quantile(canvas.a[stomach], 0.8)) if stomach.any() else 0.0
    gas = stomach & (canvas.a > level) & (canvas.above_diaphragm_mm < -12)
    from scipy import ndimage

    walls = max(1, round(3.5 / canvas.spacing_mm))
    canvas.hu[gas & ndimage.binary_erosion(stomach, iterations=walls)] = -960


def _draw_bowel(canvas: _Canvas) -> None:
    """Duodenum, colon frame with gas and stool, loops of small bowel."""
    loop = [(24, 34, -38), (46, 20, -40), (52, 6, -62), (40, 0, -88), (8, 4, -90), (-24, 8, -78)]
    canvas.tube("duodenum", loop, 12.0, hu=CLOT_HU + 35, jitter_mm=2)
    frame = [(78, 24, -150), (96, 14, -118), (100, 4, -78), (92, 22, -50), (62, 54, -64),
             (20, 64, -82), (-30, 62, -74), (-76, 40, -40), (-98, 2, -18), (-104, -14, -60),
             (-104, -8, -110), (-88, 10, -150)]  # fmt: skip
    canvas.tube(
        "colon", frame, [21, 23, 21, 19, 17, 16, 16, 16, 17, 15, 14, 13], hu=25,
        inside=canvas.cavity, jitter_mm=5,
    )  # fmt: skip
    colon = canvas.labels == canvas.ids["colon"]
    from scipy import ndimage

    lumen = ndimage.binary_erosion(colon, iterations=max(1, round(3.0 / canvas.spacing_mm)))
    canvas.hu[lumen & (canvas.roughness > 0.05)] = -920
    canvas.hu[lumen & (canvas.roughness < -0.45)] = -60
    count = 46
    walk = np.empty((count, 3))
    for index in range(count):
        row, along = divmod(index, 6)
        sweep = along if row % 2 == 0 else 5 - along
        walk[index] = (-62 + 25 * sweep, 14 + 30 * np.sin(2.1 * index), -66 - 12 * row)
    walk[:, 1] += canvas.random.uniform(-10, 10, count)
    canvas.tube("small_bowel", walk, 10.5, hu=CLOT_HU - 5, inside=canvas.cavity / 0.93, jitter_mm=6)


def _draw_lungs(canvas: _Canvas) -> None:
    """Five lobes between their fissures, with vessels that branch from the hila."""
    hollow = (canvas.cavity < 0.985) & (canvas.above_diaphragm_mm > 2) & (canvas.labels == 0)
    voxels = np.flatnonzero(hollow)
    r, a, s, rough = (
        field.reshape(-1)[voxels] for field in (canvas.r, canvas.a, canvas.s, canvas.roughness)
    )
    middle = 15 + 0.06 * np.square(np.minimum(np.abs(a + 26), 24)) * (s < 190) + 6 * rough
    middle = np.where(a < -48, 24, np.minimum(middle, 30 - 0.16 * np.abs(a)))
    oblique = s - (122 - 0.95 * (a + 4)) + 5 * rough
    horizontal = s - (128 + 0.12 * a) + 4 * rough
    above, right = oblique > 0, r > 0
    air = np.abs(r + 2) > middle
    density = LUNG_HU + canvas.random.uniform(-25, 25) + 18 * rough - 0.35 * a
    density[np.abs(oblique) < 0.9] += 110
    density[right & above & (np.abs(horizontal) < 0.7)] += 110
    for name, lobe in (
        ("upper_lobe_left", ~right & above),
        ("lower_lobe_left", ~right & ~above),
        ("upper_lobe_right", right & above & (horizontal > 0)),
        ("middle_lobe_right", right & above & (horizontal <= 0)),
        ("lower_lobe_right", right & ~above),
    ):
        canvas.labels.reshape(-1)[voxels[air & lobe]] = canvas.ids[f"lung_{name}"]
    canvas.hu.reshape(-1)[voxels[air]] = density[air]
    for side in (-1.0, 1.0):
        for _ in range(8):
            heading = canvas.random.normal(size=3) * (0.45, 0.75, 1.0) + (side * 0.75, 0, 0)
            _grow_vessel(canvas, np.array([side * 34, -18.0, 138.0]), heading, 4.6)


def _grow_vessel(canvas: _Canvas, start: Curve, heading: Curve, radius_mm: float) -> None:
    """One lung vessel and, thinner each time, its branches."""
    heading = heading / np.linalg.norm(heading)
    length = 7.5 * radius_mm + 6
    bend = canvas.random.normal(scale=0.08 * length, size=3)
    end = start + length * heading
    points = np.stack([start, (start + end) / 2 + bend, end])
    canvas.tube(None, points, np.array([1.0, 0.9, 0.8]) * radius_mm, hu=40, jitter_mm=0)
    if radius_mm > 1.1:
        for _ in range(2):
            turned = heading + canvas.random.normal(scale=0.42, size=3)
            _grow_vessel(canvas, end, turned, 0.66 * radius_mm)


def _draw_muscles(canvas: _Canvas) -> None:
    """The long muscles of the back, last: they fill what the bones left free."""
    for side, word in ((-1.0, "left"), (1.0, "right")):
        column = [
            (side * (24 + 8 * (s < 0)), _spine_a(s) - 39, float(s)) for s in range(280, -181, -46)
        ]
        canvas.tube(
            f"autochthon_{word}", column, [15, 16, 18, 20, 21, 22, 24, 26, 27, 25, 20],
            hu=MUSCLE_HU, flat=(1, 0.78, 1), inside=canvas.body / 0.93, jitter_mm=1.5,
        )  # fmt: skip


def _scan(canvas: _Canvas) -> NDArray[np.int16]:
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


def _draw_table(canvas: _Canvas) -> None:
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


def _rotation(angles: Sequence[float] | Curve) -> Curve:
    """Rotation about r, then a, then s, angles in radians."""
    (cr, ca, cs), (sr, sa, ss) = np.cos(angles), np.sin(angles)
    about_r = np.array([[1, 0, 0], [0, cr, -sr], [0, sr, cr]])
    about_a = np.array([[ca, 0, sa], [0, 1, 0], [-sa, 0, ca]])
    about_s = np.array([[cs, -ss, 0], [ss, cs, 0], [0, 0, 1]])
    turn: Curve = about_s @ about_a @ about_r
    return turn


def _profile_at(rows: Sequence[Sequence[float]], s_mm: Curve, column: int) -> Curve:
    """A column of a table of cross-sections, interpolated at heights s."""
    table = np.asarray(rows, np.float64)[::-1]
    return np.interp(s_mm, table[:, 0], table[:, column])


def _spline_weights(voxels: int, knot_voxels: float) -> Volume:
    """Cubic B-spline weights, (voxels, knots)."""
    position = np.arange(voxels) / knot_voxels + 1
    knots = np.arange(int(np.ceil(voxels / knot_voxels)) + 4)
    t = np.abs(position[:, None] - knots[None, :])
    near, far = 2 / 3 - t**2 + t**3 / 2, (2 - t) ** 3 / 6
    return np.where(t < 1, near, np.where(t < 2, far, 0)).astype(np.float32)


def _spline(points: Curve, radii: Curve, step_mm: float) -> tuple[Curve, Curve]:
    """Points about ``step_mm`` apart on the curve through the given ones, with their radii."""
    from scipy.interpolate import PchipInterpolator, make_interp_spline

    distance = np.concatenate(
        [[0], np.cumsum(np.maximum(np.linalg.norm(np.diff(points, axis=0), axis=1), 1e-3))]
    )
    along = np.linspace(0, distance[-1], max(2, int(np.ceil(distance[-1] / step_mm)) + 1))
    if len(points) < 4:
        path = np.asarray(make_interp_spline(distance, points, k=len(points) - 1)(along))
        return path, np.interp(along, distance, radii)
    path = np.asarray(make_interp_spline(distance, points, k=3)(along))
    return path, np.asarray(PchipInterpolator(distance, radii)(along))


def _cross_in_plane() -> Mask:
    cross = np.zeros((3, 3, 1), bool)
    cross[1, :, 0] = cross[:, 1, 0] = True
    return cross
