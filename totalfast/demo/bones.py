"""The bones of a phantom: spine, rib cage and pelvis."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from totalfast.demo.canvas import (
    CARTILAGE_HU,
    CAVITY_PROFILE,
    CORTICAL_HU,
    MARROW_HU,
    MUSCLE_HU,
    Canvas,
    Curve,
    Paint,
    Within,
    profile_at,
)

SPINE_PROFILE = ((280, -48), (215, -50), (140, -58), (60, -52), (-60, -38), (-130, -46))
"""Rows of (s, centre a of the vertebral bodies) in mm: kyphosis above, lordosis below."""

CERVICAL_HEIGHT_MM, THORACIC_HEIGHTS_MM, LUMBAR_HEIGHTS_MM = 16.0, (17.5, 24.0), (26.0, 29.0)
RIB_END_DEG = (146, 149, 150, 150, 148, 145, 140, 132, 124, 114, 84, 60)
"""How far each rib runs round the chest, 0 at the spine and 180 at the sternum."""
RIB_DROP_MM = (34, 44, 52, 58, 64, 70, 76, 78, 78, 74, 66, 54)
"""How far each rib would descend by 180 degrees."""


def draw_spine(canvas: Canvas) -> None:
    """Cord, then every vertebra as a body, an arch, transverse and spinous processes, discs."""
    rows = vertebrae()
    cord = [(0.0, spine_a(s) - 21.5 - 0.02 * (150 - s) * (s < 150), s) for _, s, _ in rows]
    cord = [point for point in cord if point[2] > -40]
    canvas.tube("spinal_cord", cord, 7.6, paint=Paint(38), flat=(1.2, 0.95, 1), jitter_mm=0)
    for index, (level, s, height) in enumerate(rows):
        grow = index / (len(rows) - 1)
        vertebra = Vertebra(
            f"vertebrae_{level}", level.startswith("L"), grow, s, spine_a(s), height
        )
        _draw_vertebral_body(canvas, vertebra)
        _draw_processes(canvas, vertebra)


class Vertebra(NamedTuple):
    """Place and size of one vertebra, in mm."""

    name: str
    lumbar: bool
    grow: float
    """0 for the first vertebra, 1 for the last and largest."""
    s: float
    a: float
    """Centre of the body: ``s``, and ``a`` here."""
    height: float

    @property
    def width(self) -> float:
        """Half width of the body."""
        return 12.5 + 10.5 * self.grow

    @property
    def depth(self) -> float:
        """Half depth of the body."""
        return 10.5 + 6.0 * self.grow


def _draw_vertebral_body(canvas: Canvas, vertebra: Vertebra) -> None:
    """The body and the disc."""
    name, s, a, height = vertebra.name, vertebra.s, vertebra.a, vertebra.height
    width, depth, half = vertebra.width, vertebra.depth, height / 2 - 0.8
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


def _draw_processes(canvas: Canvas, vertebra: Vertebra) -> None:
    """The arch with transverse processes on both sides, and the spinous process."""
    name, lumbar, grow, s, a, height = vertebra
    width, depth = vertebra.width, vertebra.depth
    bone = Paint(MARROW_HU, shell_hu=CORTICAL_HU - 280)
    span = 27 + 9 * grow if lumbar else 26 + 5 * grow
    for side in (-1.0, 1.0):
        transverse = [
            (side * width * 0.62, a - depth * 0.7, s + height * 0.16),
            (side * width * 0.78, a - depth - 9, s + height * 0.12),
            (side * span, a - depth - (11 if lumbar else 19), s + height * 0.1),
        ]
        canvas.tube(name, transverse, [6.0, 6.6, 5.4], flat=(1, 1, 1.15), jitter_mm=0.5, paint=bone)
        arch = [
            (side * width * 0.78, a - depth - 9, s + height * 0.1),
            (side * width * 0.50, a - depth - 18, s - height * 0.12),
            (0.0, a - depth - 24, s - height * 0.28),
        ]
        canvas.tube(name, arch, 5.4, flat=(1, 1, 1.6), jitter_mm=0.3, paint=bone)
    drop = height * (0.30 if lumbar else 0.85)
    canvas.tube(
        name,
        [(0, a - depth - 22, s - height * 0.2), (0, a - depth - 42, s - drop)],
        5.0,
        flat=(0.9, 1, 1.9 if lumbar else 1.3),
        jitter_mm=1.0,
        paint=bone,
    )


def draw_rib_cage(canvas: Canvas) -> None:
    """Sternum, ribs, their cartilages, clavicles and shoulder blades."""
    bone = Paint(MARROW_HU - 60, shell_hu=CORTICAL_HU)
    front = np.array([(0, 66, 207), (0, 79, 172), (0, 87, 130), (0, 91, 84)], float)
    canvas.tube("sternum", front, [23, 16, 17, 10], flat=(1, 0.36, 0.5), jitter_mm=0.5, paint=bone)
    heights = {level: (s, height) for level, s, height in vertebrae()}
    for side, word in ((-1.0, "left"), (1.0, "right")):
        for number in range(1, 13):
            s, height = heights[f"T{number}"]
            path = _rib_path(number, side, s + height * 0.35, spine_a(s))
            thin = 0.85 if number in (1, 11, 12) else 1.0
            canvas.tube(
                f"rib_{word}_{number}",
                path,
                8.0 * thin,
                flat=(0.8, 0.8, 1.2),
                jitter_mm=0.8,
                paint=bone,
            )
            if number <= 10:
                joint_s = float(np.interp(min(number, 7), (1, 7), (203, 88)))
                joint_a = float(np.interp(joint_s, front[::-1, 2], front[::-1, 1]))
                away = 16.0 if number <= 7 else 20.0 + 17.0 * (number - 7)
                fall = 0.0 if number <= 7 else 11.0 * (number - 7)
                end = np.array([side * away, joint_a - (number > 7) * 3.0, joint_s - fall])
                bend = (path[-1] + end) / 2 + np.array([0, 5.0, -6.0])
                canvas.tube(
                    "costal_cartilages",
                    [path[-1], bend, end],
                    8.5,
                    paint=Paint(CARTILAGE_HU),
                    flat=(0.9, 0.9, 1),
                    jitter_mm=0.5,
                )
        collar = [(side * 20, 64, 214), (side * 60, 58, 232), (side * 110, 20, 243)]
        canvas.tube(f"clavicula_{word}", collar, 8.0, paint=bone)
        blade = (side * 98, -76, 176)
        canvas.blob(
            f"scapula_{word}",
            blade,
            (36, 7.5, 50),
            tilt_deg=(-14, 0, side * 34),
            rough=0.1,
            within=Within(canvas.body, 0.93),
            paint=bone,
        )


def _rib_path(number: int, side: float, s_mm: float, a_spine: float) -> Curve:
    """Centre line of a rib: neck, angle, then round the cavity while it descends."""
    start = np.deg2rad(34.0)
    angles = np.linspace(start, np.deg2rad(RIB_END_DEG[number - 1]), 14)
    s = s_mm - RIB_DROP_MM[number - 1] * (1 - np.cos(angles - start)) / 1.85
    width, depth, centre = (profile_at(CAVITY_PROFILE, s, k) for k in (1, 2, 3))
    r, a = np.sin(angles), -np.cos(angles)
    stretch = 1 / np.sqrt((1 + np.sqrt(1 - 1.68 * np.square(r * a))) / 2)
    r, a = side * stretch * r * (width + 6.0), centre + stretch * a * (depth + 6.0)
    neck = [(side * 19.0, a_spine - 10.0, s_mm + 5.0), (side * 33.0, a_spine - 24.0, s_mm + 2.5)]
    return np.vstack([neck, np.stack([r, a, s], axis=1)])


def draw_pelvis(canvas: Canvas) -> None:
    """Sacrum, hip bones, thigh bones and bladder; a standard volume shows the iliac crests."""
    bone = Paint(MARROW_HU - 40, shell_hu=CORTICAL_HU)
    canvas.blob("vertebrae_S1", (0, -52, -150), (24, 18, 13), jitter_mm=1.0, paint=bone)
    canvas.blob("sacrum", (0, -66, -178), (48, 17, 44), tilt_deg=(25, 0, 0), paint=bone)
    for side, word in ((-1.0, "left"), (1.0, "right")):
        canvas.blob(
            f"hip_{word}",
            (side * 108, -24, -148),
            (8, 56, 60),
            rough=0.06,
            tilt_deg=(0, side * 24, side * -30),
            paint=bone,
        )
        canvas.blob(f"hip_{word}", (side * 78, 0, -215), (30, 34, 30), paint=bone)
        canvas.blob(f"femur_{word}", (side * 92, 0, -222), (23, 23, 23), paint=bone)
    canvas.blob("urinary_bladder", (0, 30, -205), (42, 34, 34), paint=Paint(8))
    canvas.blob("prostate", (0, 18, -245), (20, 17, 16), paint=Paint(MUSCLE_HU))


def vertebrae() -> list[tuple[str, float, float]]:
    """Rows of (level, centre s, height) in mm, from C4 down to L5."""
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


def spine_a(s_mm: float) -> float:
    """Centre a of the vertebral body at a height s, in mm."""
    return float(profile_at(SPINE_PROFILE, np.array([s_mm]), 1)[0])
