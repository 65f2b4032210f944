"""A loaded nnU-Net model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing import TypeAlias

    import torch
    from torch import nn

    from totalfast.backends.forward import Forward

    Untyped: TypeAlias = Any
    """nnU-Net's objects, which have no types."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Model:
    """A loaded nnU-Net model with its weights on the device.

    Parameters
    ----------
    folder
        ``<results>/<dataset>/<trainer>__<plans>__<configuration>``.
    plans, configuration, labels
        nnU-Net's PlansManager, ConfigurationManager and LabelManager.
    dataset
        Content of dataset.json.
    networks
        One network per fold, in eval mode. Empty if only ``forwards`` are needed.
    forwards
        The networks in the form in which a backend runs them.
    trainer_name
        The trainer's name in the checkpoint.
    mirroring_axes
        Mirroring axes that the checkpoint allows; TotalSegmentator never mirrors.
    device
        Device of the weights.
    """

    folder: Path
    plans: Untyped
    configuration: Untyped
    labels: Untyped
    dataset: dict[str, Any]
    networks: tuple[nn.Module, ...]
    forwards: tuple[Forward, ...]
    trainer_name: str
    mirroring_axes: tuple[int, ...] | None
    device: torch.device

    @property
    def patch_size(self) -> tuple[int, ...]:
        """Tile size (z, y, x) in voxels; (y, x) of a 2-D model."""
        return tuple(self.configuration.patch_size)

    @property
    def heads(self) -> int:
        """Number of the network's output channels."""
        return int(self.labels.num_segmentation_heads)

    @property
    def regions(self) -> tuple[int, ...] | None:
        """Label of each channel of a region-based model, in the order of painting; else None."""
        return tuple(self.labels.regions_class_order) if self.labels.has_regions else None
