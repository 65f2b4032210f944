"""From labels on the network's grid to labels on the scanner's grid."""

from __future__ import annotations

from totalfast.export.nearest import nearest_to_scanner_grid

__all__ = ["nearest_to_scanner_grid"]
