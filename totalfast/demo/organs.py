"""The organs and vessels of a phantom."""

from __future__ import annotations

import numpy as np

from totalfast.demo.canvas import (
    CLOT_HU,
    LUNG_HU,
    MESENTERY_HU,
    MUSCLE_HU,
    Canvas,
    Curve,
    Paint,
    Within,
    spline,
)


def draw_airways_and_gullet(canvas: Canvas) -> None:
    """Trachea with both main bronchi, oesophagus."""
    windpipe = [(1, -22, 275), (1, -24, 225), (2, -30, 172)]
    canvas.tube("trachea", windpipe, 9.5, paint=Paint(-990), jitter_mm=1.0)
    canvas.tube("trachea", [(2, -30, 174), (16, -30, 158), (32, -30, 146)], 6.5, paint=Paint(-985))
    canvas.tube(
        "trachea", [(2, -30, 174), (-18, -29, 160), (-38, -30, 150)], 6.0, paint=Paint(-985)
    )
    gullet = [(-5, -38, 265), (-3, -41, 200), (-5, -40, 120), (-14, -30, 75), (-22, -22, 52)]
    canvas.tube("esophagus", gullet, 10.0, paint=Paint(CLOT_HU), flat=(1.15, 0.8, 1), jitter_mm=1.5)


def draw_great_vessels(canvas: Canvas) -> None:
    """Aorta with the branches of its arch, the large veins, the portal system."""
    artery, vein = 60 + 105 * canvas.contrast, 60 + 80 * canvas.contrast
    arch = [
        (8, 18, 108),
        (15, 26, 138),
        (10, 20, 170),
        (-6, 0, 184),
        (-22, -24, 172),
        (-25, -38, 140),
        (-21, -38, 85),
        (-13, -32, 45),
        (-7, -19, 0),
        (-5, -10, -60),
        (-3, -14, -106),
    ]
    radii = [15, 15, 14, 13, 12, 11.5, 11, 10.5, 9.5, 8.5, 8]
    canvas.tube("aorta", arch, radii, paint=Paint(artery), jitter_mm=1.5)
    for name, points, size in (
        ("brachiocephalic_trunk", [(8, 12, 182), (14, 6, 200), (22, 0, 220)], 8.5),
        ("subclavian_artery_right", [(22, 0, 218), (50, 2, 236), (95, -5, 228)], 7.5),
        ("common_carotid_artery_right", [(22, 0, 220), (24, -6, 240), (26, -8, 285)], 7.5),
        ("common_carotid_artery_left", [(-6, 2, 186), (-16, -2, 225), (-26, -8, 285)], 7.5),
        ("subclavian_artery_left", [(-18, -14, 180), (-28, -16, 222), (-95, -8, 228)], 7.5),
    ):
        canvas.tube(name, points, size, paint=Paint(artery))
    for name, points, size in (
        ("superior_vena_cava", [(25, 14, 196), (26, 12, 165), (25, 8, 125)], 11.0),
        ("brachiocephalic_vein_right", [(25, 16, 196), (32, 18, 212), (48, 22, 232)], 8.5),
        ("brachiocephalic_vein_left", [(22, 22, 194), (-10, 30, 204), (-46, 24, 232)], 8.5),
        (
            "inferior_vena_cava",
            [(18, -14, -108), (19, -12, -40), (22, -10, 15), (24, 0, 62), (20, 6, 84)],
            11.0,
        ),
        (
            "portal_vein_and_splenic_vein",
            [(42, 10, 8), (16, 6, -18), (-20, 0, -14), (-62, -22, 2)],
            8.5,
        ),
    ):
        canvas.tube(name, points, size, paint=Paint(vein))
    for side, word in ((-1.0, "left"), (1.0, "right")):
        fork = [(side * 4, -14, -106), (side * 24, -10, -135), (side * 48, 2, -190)]
        canvas.tube(f"iliac_artery_{word}", fork, 9.0, paint=Paint(artery))
        fork = [(side * 8 + 8, -20, -110), (side * 26, -22, -140), (side * 50, -8, -190)]
        canvas.tube(f"iliac_vena_{word}", fork, 10.0, paint=Paint(vein))
        for s, a in ((128, -14), (112, -12)):
            root = [(side * 14, a, s), (side * 36, a - 6, s + 2), (side * 56, a - 12, s + 4)]
            canvas.tube("pulmonary_vein", root, 8.0, paint=Paint(vein))


def draw_heart(canvas: Canvas) -> None:
    """Heart with brighter chambers in a wall of muscle, and the left atrial appendage."""
    pool = 60 + 85 * canvas.contrast
    canvas.blob(
        "atrial_appendage_left", (-38, 14, 136), (9, 15, 11), paint=Paint(pool), jitter_mm=2
    )
    state = canvas.labels == 0
    canvas.blob(
        "heart",
        (-16, 26, 97),
        (54, 43, 44),
        tilt_deg=(10, 22, 24),
        paint=Paint(88),
        rough=0.08,
        jitter_mm=3,
    )
    heart = state & (canvas.labels == canvas.ids["heart"])
    low = heart & (canvas.above_diaphragm_mm < 0)
    canvas.labels[low], canvas.hu[low] = 0, MESENTERY_HU
    for centre, size in (
        ((-38, 30, 86), (19, 17, 27)),
        ((-2, 46, 92), (25, 16, 27)),
        ((26, 22, 98), (19, 19, 25)),
        ((-6, -4, 116), (27, 15, 19)),
    ):
        box = canvas.box(np.array(centre) - size, np.array(centre) + size)
        distance = sum(
            np.square((field[box] - np.float32(c)) / np.float32(w))
            for field, c, w in zip((canvas.r, canvas.a, canvas.s), centre, size, strict=True)
        )
        chamber = np.asarray(distance) - np.float32(0.35) * canvas.roughness[box] < 1
        canvas.hu[box][heart[box] & chamber] = pool


def draw_lungs(canvas: Canvas) -> None:
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


def _grow_vessel(canvas: Canvas, start: Curve, heading: Curve, radius_mm: float) -> None:
    """One lung vessel and, thinner each time, its branches."""
    heading = heading / np.linalg.norm(heading)
    length = 7.5 * radius_mm + 6
    bend = canvas.random.normal(scale=0.08 * length, size=3)
    end = start + length * heading
    points = np.stack([start, (start + end) / 2 + bend, end])
    canvas.tube(None, points, np.array([1.0, 0.9, 0.8]) * radius_mm, paint=Paint(40), jitter_mm=0)
    if radius_mm > 1.1:
        for _ in range(2):
            turned = heading + canvas.random.normal(scale=0.42, size=3)
            _grow_vessel(canvas, end, turned, 0.66 * radius_mm)


def draw_retroperitoneum(canvas: Canvas) -> None:
    """Kidneys with bright cortex, psoas muscles."""
    for side, word in ((-1.0, "left"), (1.0, "right")):
        muscle = [
            (side * 26, -44, -8),
            (side * 35, -42, -60),
            (side * 52, -30, -120),
            (side * 66, -6, -180),
        ]
        canvas.tube(
            f"iliopsoas_{word}", muscle, [8, 15, 21, 19], paint=Paint(MUSCLE_HU), flat=(0.85, 1, 1)
        )
        drop = -52.0 if side > 0 else -36.0
        canvas.blob(
            f"kidney_{word}",
            (side * 66, -38, drop),
            (27, 25, 52),
            jitter_mm=3.5,
            rough=0.05,
            paint=Paint(75 + 60 * canvas.contrast, shell_hu=80 + 95 * canvas.contrast),
            tilt_deg=(12, side * 14, side * 20),
        )
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


def draw_upper_abdomen(canvas: Canvas) -> None:
    """Gallbladder, pancreas, stomach with its gas, spleen, liver."""
    parenchyma = 62 + 42 * canvas.contrast
    canvas.blob("gallbladder", (46, 44, -22), (14, 15, 28), paint=Paint(12), tilt_deg=(-25, 0, 0))
    gland = [(34, 10, -46), (20, 16, -34), (-8, 18, -22), (-42, -2, -10), (-74, -18, 4)]
    canvas.tube("pancreas", gland, [15, 13, 10, 10, 8], paint=Paint(62 + 28 * canvas.contrast))
    _draw_stomach(canvas)
    canvas.blob(
        "spleen",
        (-100, -34, 26),
        (26, 44, 46),
        paint=Paint(64 + 46 * canvas.contrast),
        rough=0.1,
        tilt_deg=(0, 12, -38),
        within=Within(canvas.cavity, 0.965, below_diaphragm=True),
    )
    canvas.blob(
        "liver",
        (64, 6, 20),
        (74, 80, 68),
        paint=Paint(parenchyma),
        rough=0.08,
        tilt_deg=(0, -24, 0),
        within=Within(canvas.cavity, 0.965, below_diaphragm=True),
    )
    canvas.blob(
        "liver",
        (4, 36, 32),
        (66, 40, 32),
        paint=Paint(parenchyma),
        rough=0.08,
        tilt_deg=(0, -14, 0),
        within=Within(canvas.cavity, 0.95, below_diaphragm=True),
    )
    liver = canvas.labels == canvas.ids["liver"]
    veins = [(24, 0, 58), (55, 4, 40), (95, 10, 26)], [(24, 2, 58), (30, 30, 44), (26, 52, 36)]
    for points in (*veins, [(24, -4, 56), (62, -30, 34), (88, -44, 20)]):
        path, _ = spline(np.asarray(points, float), np.full(3, 3.5), 2.0)
        for centre in path:
            box = canvas.box(centre - 3.6, centre + 3.6)
            near = np.square(canvas.r[box] - np.float32(centre[0]))
            near += np.square(canvas.a[box] - np.float32(centre[1]))
            near += np.square(canvas.s[box] - np.float32(centre[2]))
            canvas.hu[box][liver[box] & (near < 11)] = parenchyma + 22 * canvas.contrast


def _draw_stomach(canvas: Canvas) -> None:
    bag = [(-34, -14, 46), (-58, 2, 42), (-66, 22, 8), (-44, 44, -28), (-4, 46, -44), (24, 36, -36)]
    canvas.tube(
        "stomach", bag, [20, 31, 30, 24, 18, 12], paint=Paint(CLOT_HU), inside=canvas.cavity
    )
    stomach = canvas.labels == canvas.ids["stomach"]
    # A patient lies on the back: gas collects in front, above a level fluid surface.
    level = float(np.quantile(canvas.a[stomach], 0.8)) if stomach.any() else 0.0
    gas = stomach & (canvas.a > level) & (canvas.above_diaphragm_mm < -12)
    from scipy import ndimage

    walls = max(1, round(3.5 / canvas.spacing_mm))
    canvas.hu[gas & ndimage.binary_erosion(stomach, iterations=walls)] = -960


def draw_bowel(canvas: Canvas) -> None:
    """Duodenum, colon frame with gas and stool, loops of small bowel."""
    loop = [(24, 34, -38), (46, 20, -40), (52, 6, -62), (40, 0, -88), (8, 4, -90), (-24, 8, -78)]
    canvas.tube("duodenum", loop, 12.0, paint=Paint(CLOT_HU + 35), jitter_mm=2)
    frame = [
        (78, 24, -150),
        (96, 14, -118),
        (100, 4, -78),
        (92, 22, -50),
        (62, 54, -64),
        (20, 64, -82),
        (-30, 62, -74),
        (-76, 40, -40),
        (-98, 2, -18),
        (-104, -14, -60),
        (-104, -8, -110),
        (-88, 10, -150),
    ]
    canvas.tube(
        "colon",
        frame,
        [21, 23, 21, 19, 17, 16, 16, 16, 17, 15, 14, 13],
        paint=Paint(25),
        inside=canvas.cavity,
        jitter_mm=5,
    )
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
    canvas.tube(
        "small_bowel",
        walk,
        10.5,
        paint=Paint(CLOT_HU - 5),
        inside=canvas.cavity / 0.93,
        jitter_mm=6,
    )
