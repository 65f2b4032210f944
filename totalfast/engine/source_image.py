"""The model image that one model after another predicts, and its copy on a CUDA device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from totalfast.engine.normalise import (
    NetworkImage,
    network_shape,
    nonzero_box,
    pointwise_schemes,
    to_network_image,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import TypeAlias

    import torch
    from numpy.typing import NDArray

    from totalfast.models.model import Model

    Key: TypeAlias = tuple[tuple[int, ...], torch.device]


class SourceImage:
    """A model image; a device gets it once for all models, and normalises it there.

    Parameters
    ----------
    voxels
        float32, (channels, z, y, x), model grid, not normalised; not changed.
    spacing_mm
        Spacing along (z, y, x).
    """

    def __init__(self, voxels: NDArray[np.float32], *, spacing_mm: Sequence[float]) -> None:
        self.voxels = voxels
        self.spacing_mm = spacing_mm
        self._box: tuple[tuple[int, ...], tuple[slice, slice, slice]] | None = None
        self._copy: tuple[Key, torch.Tensor] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape, (z, y, x)."""
        return self.voxels.shape[1:]

    def prepared(self, model: Model, *, device: torch.device) -> NetworkImage:
        """Crop, normalise and, if the plans have another spacing, resample for a model.

        Equals ``to_network_image`` bit for bit. On a CUDA ``device``, the voxels are there, if
        that gives the same bits: for normalisation voxel by voxel, without resampling.

        Raises
        ------
        InputError
            As ``to_network_image``.
        """
        schemes = pointwise_schemes(model) if device.type == "cuda" else None
        if schemes is None or len(schemes) != len(self.voxels):
            return to_network_image(self.voxels, spacing_mm=self.spacing_mm, model=model)
        forward = tuple(model.plans.transpose_forward)
        spacing = [float(self.spacing_mm[axis]) for axis in forward]
        image = self.voxels.transpose([0, *(axis + 1 for axis in forward)])
        if self._box is None or self._box[0] != forward:
            self._box = (forward, nonzero_box(image))
        box = self._box[1]
        cropped = image[:, box[0], box[1], box[2]]
        resampled, target = network_shape(cropped.shape[1:], spacing, model)
        if resampled != cropped.shape[1:]:
            return to_network_image(self.voxels, spacing_mm=self.spacing_mm, model=model)
        voxels = self._on_device(cropped, (forward, device)).clone()
        for channel, scheme in zip(voxels, schemes, strict=True):
            scheme(channel)
        return NetworkImage(
            voxels=voxels,
            box=box,
            cropped_shape=cropped.shape[1:],
            full_shape=image.shape[1:],
            spacing_mm=tuple(spacing),
            network_spacing_mm=tuple(target),
        )

    def leave_device(self) -> None:
        """Free the copy on the device."""
        self._copy = None

    def _on_device(self, cropped: NDArray[np.float32], key: Key) -> torch.Tensor:
        import torch

        if self._copy is None or self._copy[0] != key:
            self._copy = None  # free it before the next one needs memory
            on_host = torch.from_numpy(np.ascontiguousarray(cropped))
            self._copy = (key, on_host.to(key[-1]))
        return self._copy[1]
