"""Colours and short names of structures, from their class names alone.

Classes of any task get a colour. Names that match no pattern below get a hue by their label.
"""

from __future__ import annotations

import colorsys

Colour = tuple[int, int, int]

# The first pattern that is part of the name gives the colour. Structures of one kind (ribs,
# vertebrae, lobes) alternate between the shades of a row.
_SHADES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("lung_vessel", ("#5b7fd1",)),
    ("lung_trachea", ("#78c8e0",)),
    ("lung_upper_lobe", ("#86b9e6", "#9fd0c8")),
    ("lung_middle_lobe", ("#c3b4ea",)),
    ("lung_lower_lobe", ("#5f97d8", "#6fb3b8")),
    ("lung", ("#86b9e6", "#5f97d8")),
    ("trachea", ("#78e0e0",)),
    ("aorta", ("#e0403a",)),
    ("artery", ("#ea6a54", "#d9493c")),
    ("trunk", ("#ef7d66",)),
    ("carotid", ("#ea6a54",)),
    ("portal_vein", ("#8d7bf0",)),
    ("pulmonary_vein", ("#b26ae0",)),
    ("vena", ("#5b7ff0", "#4a69d8")),
    ("vein", ("#6f8ff5", "#5474de")),
    ("atrial_appendage", ("#ff8f9f",)),
    ("heart", ("#d9546a", "#c23f5a", "#e77a86", "#b8475f")),
    ("liver", ("#b0643c",)),
    ("spleen", ("#a04a86",)),
    ("stomach", ("#e8a2b4",)),
    ("esophagus", ("#d98cb0",)),
    ("duodenum", ("#f0b878",)),
    ("small_bowel", ("#e9c27e",)),
    ("colon", ("#c9a05c",)),
    ("pancreas", ("#f2d05c",)),
    ("gallbladder", ("#7fc35a",)),
    ("urinary_bladder", ("#e8e070",)),
    ("prostate", ("#d6b0e0",)),
    ("kidney_cyst", ("#9be0c0",)),
    ("kidney", ("#d8713f", "#c5602f")),
    ("adrenal", ("#f4a63a", "#e39425")),
    ("thyroid", ("#58c8a0",)),
    ("spinal_cord", ("#fff27a",)),
    ("brain", ("#e8c0c8",)),
    ("vertebra", ("#efe2c0", "#cdb98a")),
    ("sacrum", ("#e0cfa2",)),
    ("rib", ("#f3ead2", "#d4c49c")),
    ("costal_cartilage", ("#b8d8c8",)),
    ("sternum", ("#e6d3a0",)),
    ("skull", ("#f0e6cc",)),
    ("clavicula", ("#dcc692", "#cdb680")),
    ("scapula", ("#c9b07a", "#bba068")),
    ("humerus", ("#e2d0a4", "#d4c090")),
    ("femur", ("#e2d0a4", "#d4c090")),
    ("hip", ("#d8c494", "#cab480")),
    ("gluteus", ("#b5564a", "#a04840", "#c4675a")),
    ("iliopsoas", ("#a85a50", "#984a44")),
    ("autochthon", ("#9c4c48", "#8a403e")),
    ("muscle", ("#a85a50", "#984a44")),
    ("fat", ("#f0d890",)),
    ("skin", ("#e8c8a8",)),
    ("body", ("#d8b89c",)),
)

_ENCLOSING = (
    "body",
    "skin",
    "subcutaneous_fat",
    "torso_fat",
    "skeletal_muscle",
    "lung_left",
    "lung_right",
    "lung_upper_lobe",
    "lung_middle_lobe",
    "lung_lower_lobe",
)
_GOLDEN_RATIO = 0.618034


def structure_colours(names: dict[int, str]) -> dict[int, Colour]:
    """Return a colour per label: the usual one in anatomy, else a hue by the label."""
    last_shade: dict[str, int] = {}
    colours = {}
    for label, name in names.items():
        for pattern, shades in _SHADES:
            if pattern in name:
                shade = last_shade[pattern] = last_shade.get(pattern, -1) + 1
                colours[label] = _from_hex(shades[shade % len(shades)])
                break
        else:
            red, green, blue = colorsys.hsv_to_rgb(label * _GOLDEN_RATIO % 1.0, 0.55, 0.95)
            colours[label] = (round(255 * red), round(255 * green), round(255 * blue))
    return colours


def is_translucent(name: str) -> bool:
    """Whether a structure encloses others, so that a surface view must draw it transparent."""
    return name == "lung" or name.startswith(_ENCLOSING)


def short_name(name: str) -> str:
    """Shorten a name for a picture: ``rib_left_5`` to "rib 5 L", ``vertebrae_L1`` to "L1"."""
    words = name.removeprefix("vertebrae_").split("_")
    for side, letter in (("left", "L"), ("right", "R")):
        if side in words:
            words.remove(side)
            words.append(letter)
    return " ".join(words)


def _from_hex(text: str) -> Colour:
    return int(text[1:3], 16), int(text[3:5], 16), int(text[5:7], 16)
