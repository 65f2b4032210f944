"""What several tasks on one scan share: the scan itself, its model grids, and rough passes."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    import numpy as np
    from numpy.typing import NDArray

    from totalfast.scan import ModelImage, ScannerImage

    Kept: TypeAlias = ScannerImage | ModelImage | NDArray[np.uint8]


class SharedScan:
    """Keeps what one task has computed for the next one; the scan's voxels stay in memory."""

    def __init__(self) -> None:
        self._scans: dict[Hashable, ScannerImage] = {}
        self._grids: dict[Hashable, ModelImage] = {}
        self._labels: dict[Hashable, NDArray[np.uint8]] = {}

    def scan(self, modality: str, read: Callable[[], ScannerImage]) -> ScannerImage:
        """Return the scan; how it is read depends on the modality only."""
        if modality not in self._scans:
            self._scans[modality] = read()
        return self._scans[modality]

    def model_image(
        self, image: ScannerImage, key: Hashable, resample: Callable[[], ModelImage]
    ) -> ModelImage:
        """Return the scan on a model grid; the grid of a region is not kept."""
        if not self._is_scan(image):
            return resample()
        if (id(image), key) not in self._grids:
            self._grids[id(image), key] = resample()
        return self._grids[id(image), key]

    def rough_labels(
        self, image: ScannerImage, key: Hashable, predict: Callable[[], NDArray[np.uint8]]
    ) -> NDArray[np.uint8]:
        """Return the labels of a rough pass over the scan, which must not be changed.

        Those of a region are not kept.
        """
        if not self._is_scan(image):
            return predict()
        if key not in self._labels:
            self._labels[key] = predict()
        return self._labels[key]

    def _is_scan(self, image: ScannerImage) -> bool:
        return any(image is scan for scan in self._scans.values())
