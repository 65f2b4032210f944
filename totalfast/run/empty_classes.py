"""Why a class is empty in the result: the step that removed its last voxel."""

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
NO_REGION = "the region was not found"
NOT_GUIDED_TO = "the fast model found no class of its model"
CLEANED = "removed by the task's clean-up"
TOO_SMALL = "removed because it was too small"
NOT_RESTORED = "smaller than the scan's voxel spacing"
OUTSIDE = "removed because it was outside of the region"
REFINED = "removed by the refinement"


class EmptyClasses:
    """Records for each class the step that left it empty.

    Parameters
    ----------
    classes
        Label to class name.
    enabled
        False records nothing, at no cost.
    """

    def __init__(self, classes: Mapping[int, str], *, enabled: bool) -> None:
        self._classes = classes
        self._enabled = enabled
        self.reasons: dict[str, str] = {}
        """Class name to reason, of the classes that are empty."""

    def note(self, labels: NDArray[np.uint8], reason: str) -> None:
        """Record a reason for the classes that are empty now and were not before."""
        if self._enabled:
            self._record(self._classes.keys() - label_boxes(labels), reason)

    def note_some(self, labels: Iterable[int], reason: str) -> None:
        """Record a reason for some classes."""
        if self._enabled:
            self._record(self._classes.keys() & labels, reason)

    def note_all(self, reason: str) -> None:
        """Record a reason for all classes."""
        if self._enabled:
            self._record(self._classes, reason)

    def _record(self, labels: Iterable[int], reason: str) -> None:
        for label in sorted(labels):
            self.reasons.setdefault(self._classes[label], reason)

    def log(self) -> None:
        """Log the empty classes, one line per reason."""
        for reason in dict.fromkeys(self.reasons.values()):
            names = [name for name, why in self.reasons.items() if why == reason]
            logger.debug("Empty, %s: %s", reason, ", ".join(names))
