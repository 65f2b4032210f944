"""Why a class is empty in the end: the step after which it was no longer there.

Knows label maps and the names of steps; knows nothing of what the steps do.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from totalfast.labels.boxes import label_boxes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import numpy as np
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)

NOT_FOUND = "not found"
NO_REGION = "the region to look at was not found"
CLEANED = "removed by the task's clean-up"
TOO_SMALL = "removed as too small"
NOT_RESTORED = "smaller than the distance of the scan's voxels"
OUTSIDE = "removed as outside of the region"
REFINED = "removed by the refinement"


class Losses:
    """Remembers for each class where it was lost.

    Parameters
    ----------
    classes
        Label to class name.
    wanted
        False remembers nothing, and costs nothing.
    """

    def __init__(self, classes: Mapping[int, str], *, wanted: bool) -> None:
        self._classes = classes
        self._wanted = wanted
        self.reasons: dict[str, str] = {}
        """Class name to reason, of the classes that are empty."""

    def note(self, labels: NDArray[np.uint8], reason: str) -> None:
        """Note the classes that are empty now, and were not before, as lost for a reason."""
        if self._wanted:
            self._lose(self._classes.keys() - label_boxes(labels), reason)

    def note_all(self, reason: str) -> None:
        """Note all classes as lost for a reason."""
        if self._wanted:
            self._lose(self._classes, reason)

    def _lose(self, labels: Iterable[int], reason: str) -> None:
        for label in sorted(labels):
            self.reasons.setdefault(self._classes[label], reason)

    def tell(self) -> None:
        """Say which classes are empty, a line a reason."""
        for reason in dict.fromkeys(self.reasons.values()):
            names = [name for name, why in self.reasons.items() if why == reason]
            logger.debug("Empty, %s: %s", reason, ", ".join(names))
