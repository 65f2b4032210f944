"""From logits at network resolution to labels on another grid.

``export_labels`` is the entry point. One module per method: ``nearest`` takes the argmax and then
one gather, ``linear`` is exactly the argmax of all logits resampled linearly, ``plans`` calls the
resampling function that a model's plans name.
"""

from __future__ import annotations

from totalfast.export.labels import export_labels
from totalfast.export.methods import (
    METHODS,
    choose_method,
    is_default_resampling,
    resampling_axes,
    separate_axis,
)
from totalfast.export.nearest import label_dtype, nearest_to_scanner_grid

__all__ = [
    "METHODS",
    "choose_method",
    "export_labels",
    "is_default_resampling",
    "label_dtype",
    "nearest_to_scanner_grid",
    "resampling_axes",
    "separate_axis",
]
