"""Images and target labels for fitting stand-in models, from the demonstration's phantom."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from standin_models import FIELD_OF_VIEW_MM, Recipe

from totalfast.demo.phantom import make_phantom

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Labels = NDArray[np.uint8]
Mask = NDArray[np.bool_]

TINY_DRAWN_AT_MM = 6.0
"""Tiny models learn a small patient, drawn at this spacing for every model. A life-size patient
would fill hundreds of tiny tiles, and a small scan would contain few of the classes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A phantom on a model's grid: the normalised image and the target labels, (z, y, x)."""

    image: NDArray[np.float32]
    labels: Labels


@lru_cache(maxsize=4)
def _phantom_zyx(
    seed: int, spacing_xyz_mm: tuple[float, float, float]
) -> tuple[NDArray[np.int16], Labels]:
    """Return CT and ``total`` labels, (z, y, x), drawn at the finest spacing and resampled."""
    from scipy import ndimage

    finest = min(spacing_xyz_mm)
    shape = tuple(round(f / finest) for f in FIELD_OF_VIEW_MM)
    phantom = make_phantom(seed, shape_xyz=(shape[0], shape[1], shape[2]), spacing_mm=finest)
    ct, labels = phantom.ct, phantom.labels
    if max(spacing_xyz_mm) > finest:
        zoom = [finest / s for s in spacing_xyz_mm]
        ct = ndimage.zoom(ct, zoom, order=1)
        labels = ndimage.zoom(labels, zoom, order=0)
    return ct.transpose(2, 1, 0), labels.transpose(2, 1, 0)


def make_case(recipe: Recipe, seed: int) -> Case:
    """Draw a phantom for a model, and normalise it like nnU-Net."""
    drawn_at_mm = recipe.spacing_xyz_mm
    if recipe.tiny:
        drawn_at_mm = (TINY_DRAWN_AT_MM,) * 3
    ct, total = _phantom_zyx(seed, drawn_at_mm)
    image = ct.astype(np.float32)
    intensities = recipe.model.intensities
    if intensities:
        image = np.clip(image, intensities.low, intensities.high)
        image = (image - intensities.mean) / intensities.std
    else:
        image = (image - image.mean()) / max(float(image.std()), 1e-8)
    image = np.ascontiguousarray(image, np.float32)
    names = [recipe.shown_as.get(name, name) for name in recipe.class_names]
    return Case(image=image, labels=Targets(ct, total, names, drawn_at_mm).labels())


BALL_MM = 16.0
"""Radius of the ball that replaces a class that the phantom lacks."""
COLLECTIVE_NAMES = {
    "vertebrae": ("vertebrae_", ""),
    "lung": ("lung_", ""),
    "lung_left": ("lung_", "left"),
    "lung_right": ("lung_", "right"),
}
"""Names of classes that combine several CT classes: start and end of the CT names."""


class Targets:
    """The target labels of a model, from the phantom's labels or its geometry."""

    def __init__(
        self,
        ct: NDArray[np.int16],
        total: Labels,
        class_names: Sequence[str],
        spacing_xyz_mm: Sequence[float],
    ) -> None:
        from totalsegmentator.map_to_binary import class_map

        self.total = total
        self.names = class_names
        self.ids = {name: label for label, name in class_map["total"].items()}
        self.ct = ct
        self.spacing_zyx_mm = np.array(spacing_xyz_mm)[::-1]

    def labels(self) -> Labels:
        """Return the target labels, uint8, (z, y, x)."""
        derived: dict[str, Callable[[], Mask]] = {
            "vertebrae_body": self._vertebral_bodies,
            "intervertebral_discs": self._discs,
            "body_trunc": self._body,
            "body_extremities": self._flanks,
            "breast": self._breasts,
            "abdominal_cavity": self._abdomen,
            "thoracic_cavity": self._chest,
            "mediastinum": self._mediastinum,
            "pericardium": lambda: self._grown(self._structures("heart"), 5.0),
        }
        names = self.names
        table = np.zeros(256, np.uint8)
        for label, name in enumerate(names, 1):
            if name in self.ids:
                table[self.ids[name]] = label
        result = table[self.total]
        for label, name in enumerate(names, 1):
            if name in derived:
                result[derived[name]()] = label
            elif name in COLLECTIVE_NAMES:
                result[self._structures(name)] = label
        absent = sorted(set(range(1, len(names) + 1)) - set(np.unique(result).tolist()))
        return self._with_stand_ins(result, absent)

    def _with_stand_ins(self, result: Labels, absent: Sequence[int]) -> Labels:
        """Add a ball of unlabelled tissue for each class that the phantom lacks (brain, C1)."""
        from scipy import ndimage

        free = np.argwhere(ndimage.binary_erosion(self._body() & (result == 0)))
        if not absent or not len(free):
            return result
        random = np.random.default_rng(len(absent))
        radii = np.maximum(BALL_MM / self.spacing_zyx_mm, 1.5)
        for label in absent:
            centre = free[random.integers(len(free))]
            low = np.maximum(np.floor(centre - radii).astype(int), 0)
            high = np.minimum(np.ceil(centre + radii).astype(int) + 1, result.shape)
            box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
            axes = np.ogrid[box]
            distance = sum(((x - c) / r) ** 2 for x, c, r in zip(axes, centre, radii, strict=True))
            result[box][(distance < 1) & (result[box] == 0)] = label
        return result

    def _structures(self, name: str) -> Mask:
        """Return the mask of a structure, or of all structures of a collective name."""
        start, end = COLLECTIVE_NAMES.get(name, (name, name))
        chosen = np.zeros(256, bool)
        for structure, label in self.ids.items():
            chosen[label] = structure.startswith(start) and structure.endswith(end)
        return chosen[self.total]

    def _grown(self, mask: Mask, mm: float) -> Mask:
        from scipy import ndimage

        steps = max(1, round(mm / float(self.spacing_zyx_mm.min())))
        return np.asarray(ndimage.binary_dilation(mask, iterations=steps))

    def _vertebral_bodies(self) -> Mask:
        """Return the thick part of the vertebrae; an opening removes the processes."""
        from scipy import ndimage

        bones = self._structures("vertebrae")
        core = ndimage.distance_transform_edt(bones, sampling=self.spacing_zyx_mm) > 5.5
        return np.asarray(bones & self._grown(core, 6.0))

    def _discs(self) -> Mask:
        from scipy import ndimage

        bodies = self._vertebral_bodies()
        steps = max(1, round(6.0 / float(self.spacing_zyx_mm[0])))
        column = np.zeros((2 * steps + 1, 1, 1), bool)
        column[:] = True
        return np.asarray(ndimage.binary_closing(bodies, column)) & (self.total == 0)

    def _body(self) -> Mask:
        from scipy import ndimage

        dense = ndimage.binary_opening(self.ct > -300, iterations=1)
        parts, _ = ndimage.label(dense | (self.total > 0))
        largest = parts == np.argmax(np.bincount(parts.ravel())[1:]) + 1
        filled = [ndimage.binary_fill_holes(section) for section in largest]
        return np.stack(filled)

    def _across(self) -> NDArray[np.float64]:
        """Return the distance from the midsagittal plane in mm, (1, 1, x)."""
        columns = np.flatnonzero(self._body().any(axis=(0, 1)))
        middle = columns.mean() if len(columns) else self.total.shape[2] / 2
        offset = np.arange(self.total.shape[2]) - middle
        return np.asarray(np.abs(offset * self.spacing_zyx_mm[2]))[None, None, :]

    def _flanks(self) -> Mask:
        """Return the outer flanks, which replace the arms, because those are outside the image."""
        body, across = self._body(), self._across()
        return body & (across > 0.84 * np.max(across * body.any(axis=(0, 1))))

    def _chest_slices(self) -> Mask:
        return np.asarray(self._structures("lung").any(axis=(1, 2)))[:, None, None]

    def _breasts(self) -> Mask:
        body, across = self._body(), self._across()
        depth = np.cumsum(body[:, ::-1], axis=1)[:, ::-1] * self.spacing_zyx_mm[1]
        middle = (across > 20) & (across < 115)
        front = np.arange(body.shape[1])[None, :, None] > 0.5 * body.shape[1]
        return body & self._chest_slices() & middle & front & (depth < 32)

    def _cavity(self) -> Mask:
        """Return the body without its wall of skin, fat and muscle."""
        from scipy import ndimage

        return np.asarray(
            ndimage.distance_transform_edt(self._body(), sampling=self.spacing_zyx_mm) > 26
        )

    def _chest(self) -> Mask:
        lungs = self._structures("lung")
        return self._cavity() & lungs.any(axis=1)[:, None, :] & self._chest_slices() | lungs

    def _abdomen(self) -> Mask:
        lungs = self._structures("lung")
        above = np.cumsum(lungs, axis=0) > 0
        return self._cavity() & ~above & ~self._structures("heart")

    def _mediastinum(self) -> Mask:
        lungs, cavity = self._structures("lung"), self._cavity()
        near = self._across() < 45
        bones = self._structures("vertebrae") | self._structures("spinal_cord")
        heart = self._grown(self._structures("heart"), 5.0)
        organs = self._structures("liver") | self._structures("stomach")
        return cavity & near & self._chest_slices() & ~lungs & ~bones & ~heart & ~organs
