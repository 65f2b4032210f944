"""Every error that totalfast raises on purpose.

The tree::

    TotalfastError
    ├── InputError            the image can't be used: missing, damaged, wrong shape (a ValueError)
    ├── OptionError           an option, or a pair of options, makes no sense (also a ValueError)
    │   └── UnsupportedError  upstream has it, totalfast does not yet
    ├── OutputError           the result can't be written where it was asked for
    ├── LicenseError          TotalSegmentator asks for a licence number for the task
    ├── WeightsError          a model is missing, damaged or holds more than weights
    ├── MemoryLimitError      the run needs more memory than the user allows
    └── PredictionError       the network's answer can't be used

All derive from ``TotalfastError``; a message gives what was found, what was expected, what to do.
"""

from __future__ import annotations


class TotalfastError(Exception):
    """Base class: catching it catches everything that totalfast raises on purpose."""


class InputError(TotalfastError, ValueError):
    """The input image is missing, damaged, or of a kind that can't be segmented."""


class OptionError(TotalfastError, ValueError):
    """An option, or a combination of options, makes no sense."""


class UnsupportedError(OptionError):
    """The option or task exists in TotalSegmentator but not yet in totalfast."""


class OutputError(TotalfastError):
    """The result can't be written to the place that was asked for."""


class LicenseError(TotalfastError):
    """TotalSegmentator's licence for a task is missing or invalid."""


class WeightsError(TotalfastError):
    """A model folder is missing, damaged, or a checkpoint holds more than weights."""


class MemoryLimitError(TotalfastError):
    """The run would need more memory than ``max_memory_gb`` allows; nothing was begun."""


class PredictionError(TotalfastError):
    """The network returned values that can't be turned into labels."""
