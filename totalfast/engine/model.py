"""A loaded nnU-Net model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

    from totalfast.engine.backends.forward import Forward


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Model:
    """A loaded nnU-Net model, its weights on the device.

    Parameters
    ----------
    folder
        ``<results>/<dataset>/<trainer>__<plans>__<configuration>``.
    plans, configuration, labels
        nnU-Net's PlansManager, ConfigurationManager and LabelManager.
    dataset
        Content of dataset.json.
    networks
        One network a fold, in eval mode; or none, as ``forwards`` are what runs.
    forwards
        The networks as a backend runs them.
    trainer_name
        The trainer that the checkpoint names.
    mirroring_axes
        What the checkpoint allows; TotalSegmentator never mirrors.
    """

    folder: Path
    plans: Any
    configuration: Any
    labels: Any
    dataset: dict[str, Any]
    networks: tuple[nn.Module, ...]
    forwards: tuple[Forward, ...]
    trainer_name: str
    mirroring_axes: tuple[int, ...] | None
    device: torch.device

    @property
    def patch_size(self) -> tuple[int, ...]:
        """Tile size (z, y, x) in voxels."""
        return tuple(self.configuration.patch_size)

    @property
    def heads(self) -> int:
        """Number of channels that the network returns."""
        return int(self.labels.num_segmentation_heads)

    @property
    def regions(self) -> tuple[int, ...] | None:
        """Label of each channel of a region-based model, in the order of painting; else None."""
        return tuple(self.labels.regions_class_order) if self.labels.has_regions else None
