"""The volume in which a phantom is drawn, and its two shapes: ellipsoids and bent tubes.

Coordinates (r, a, s) are in mm: patient right, anterior and superior are positive.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from totalfast.upstream import CLASS_MAPS

if TYPE_CHECKING:
    from collections.abc import Sequence

Volume: TypeAlias = NDArray[np.float32]
Mask: TypeAlias = NDArray[np.bool_]
Box: TypeAlias = tuple[slice, slice, slice]
Curve: TypeAlias = NDArray[np.float64]

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
    (310, 62, 62, -15),
    (265, 76, 72, -14),
    (245, 122, 84, -12),
    (222, 157, 96, -10),
    (180, 161, 106, -7),
    (120, 158, 113, -5),
    (50, 155, 111, -5),
    (0, 150, 107, -6),
    (-60, 146, 104, -7),
    (-130, 162, 109, -9),
    (-240, 172, 115, -10),
)
CAVITY_PROFILE = (
    (262, 8, 8, -24),
    (250, 42, 26, -24),
    (236, 66, 42, -20),
    (215, 90, 58, -12),
    (180, 113, 70, -4),
    (120, 130, 80, 0),
    (50, 136, 82, 1),
    (0, 133, 79, 1),
    (-60, 124, 75, 2),
    (-130, 122, 77, 3),
    (-180, 95, 75, 0),
    (-250, 60, 65, -5),
)


class Paint(NamedTuple):
    """Intensities of a structure in HU."""

    hu: float
    shell_hu: float | None = None
    """Of the outer layer; None draws no layer."""


class Within(NamedTuple):
    """Part of the volume that a blob is cut to."""

    field: Volume | None = None
    limit: float = 1.0
    """Only voxels whose ``field`` is smaller are drawn."""
    below_diaphragm: bool = False


ANYWHERE = Within()


class Canvas:
    """The volume under construction, with every voxel's reference coordinates."""

    def __init__(
        self, random: np.random.Generator, shape_xyz: tuple[int, int, int], spacing_mm: float
    ) -> None:
        self.random = random
        self.shape = shape_xyz
        self.spacing_mm = spacing_mm
        self.ids = {name: label for label, name in CLASS_MAPS["total"].items()}
        self.labels = np.zeros(shape_xyz, np.uint8)
        self.hu = np.full(shape_xyz, AIR_HU, np.float32)
        self.kept_free = np.zeros(shape_xyz, bool)
        self.contrast = random.uniform(0.7, 1.25)

        angles = np.deg2rad(random.uniform(-3, 3, 3))
        self.to_reference = rotation(angles) / random.uniform(0.95, 1.04)
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
        weights = [spline_weights(n, knot_mm / self.spacing_mm) for n in self.shape]
        field = self.random.uniform(-1.6, 1.6, [w.shape[1] for w in weights]).astype(np.float32)
        for weight in weights:
            field = np.tensordot(field, weight, axes=(0, 1))
        return np.ascontiguousarray(np.clip(field, -1, 1))

    def _tube_radius(
        self, profile: Sequence[Sequence[float]], slices_mm: Curve, extra_mm: float
    ) -> Volume:
        """1 on the outline of a squarish elliptic tube, less inside."""
        width, depth, centre = (
            profile_at(profile, slices_mm, k).astype(np.float32) for k in (1, 2, 3)
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
        paint: Paint,
        tilt_deg: Sequence[float] = (0, 0, 0),
        rough: float = 0.15,
        jitter_mm: float = 4.0,
        within: Within = ANYWHERE,
    ) -> None:
        """Draw an uneven ellipsoid where nothing is drawn yet."""
        middle = self.jitter(centre, jitter_mm)
        size = np.asarray(radii) * self.random.uniform(1 - 0.02 * jitter_mm, 1 + 0.02 * jitter_mm)
        turn = rotation(np.deg2rad(tilt_deg))
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
        if within.field is not None:
            mask &= within.field[box] < within.limit
        if within.below_diaphragm:
            mask &= self.above_diaphragm_mm[box] < -2
        if paint.shell_hu is not None:
            self.fill(name, mask & (distance < 0.6), paint.hu, box)
        self.fill(name, mask, paint.hu if paint.shell_hu is None else paint.shell_hu, box)

    def tube(
        self,
        name: str | None,
        points: Sequence[Sequence[float] | Curve] | Curve,
        radius: float | Sequence[float] | Curve,
        *,
        paint: Paint,
        flat: Sequence[float] = (1, 1, 1),
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
        path, thickness = spline(knots, radii, step_mm)
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
                self.hu[box][mask & (self.hu[box] < -600)] = paint.hu
            elif paint.shell_hu is None:
                self.fill(name, mask, paint.hu, box)
            else:
                thinnest = float(min(reach))
                self.fill(
                    name, mask & (distance < max(0.45, 1 - 1.3 / thinnest) ** 2), paint.hu, box
                )
                drawn.append((box, mask))
        # The shell comes when the whole core is drawn, or it would wall the core off at each step.
        if name is not None and paint.shell_hu is not None:
            for box, mask in drawn:
                self.fill(name, mask, paint.shell_hu, box)


def rotation(angles: Sequence[float] | Curve) -> Curve:
    """Rotation about r, then a, then s, angles in radians."""
    (cr, ca, cs), (sr, sa, ss) = np.cos(angles), np.sin(angles)
    about_r = np.array([[1, 0, 0], [0, cr, -sr], [0, sr, cr]])
    about_a = np.array([[ca, 0, sa], [0, 1, 0], [-sa, 0, ca]])
    about_s = np.array([[cs, -ss, 0], [ss, cs, 0], [0, 0, 1]])
    turn: Curve = about_s @ about_a @ about_r
    return turn


def profile_at(rows: Sequence[Sequence[float]], s_mm: Curve, column: int) -> Curve:
    """A column of a table of cross-sections, interpolated at heights s."""
    table = np.asarray(rows, np.float64)[::-1]
    return np.interp(s_mm, table[:, 0], table[:, column])


def spline_weights(voxels: int, knot_voxels: float) -> Volume:
    """Cubic B-spline weights, (voxels, knots)."""
    position = np.arange(voxels) / knot_voxels + 1
    knots = np.arange(int(np.ceil(voxels / knot_voxels)) + 4)
    t = np.abs(position[:, None] - knots[None, :])
    near, far = 2 / 3 - t**2 + t**3 / 2, (2 - t) ** 3 / 6
    return np.where(t < 1, near, np.where(t < 2, far, 0)).astype(np.float32)


def spline(points: Curve, radii: Curve, step_mm: float) -> tuple[Curve, Curve]:
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
