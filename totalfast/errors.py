"""The errors of totalfast.

The tree::

    TotalfastError
    ├── InputError            the image can't be used: missing, damaged, wrong shape (a ValueError)
    ├── OptionError           an option, or a pair of options, is not valid (a ValueError)
    │   └── UnsupportedError  upstream has it, totalfast does not yet
    ├── OutputError           the result can't be written to the given path
    ├── LicenseError          the task needs a TotalSegmentator licence number
    ├── WeightsError          a model is missing or damaged, or holds what could run code
    │   └── MissingModelError a file of it is missing (a FileNotFoundError)
    ├── MemoryLimitError      the run needs more memory than the user allows
    ├── DeviceMemoryError     the GPU's memory is too small
    ├── PredictionError       the network's output can't be used
    ├── ClusterError          the Ray cluster can't be used, or no node of it is left
    ├── SessionError          the session is closed
    └── ForkError             the process was forked after a network had run; use "spawn"

All derive from ``TotalfastError``. A message gives the value, what was expected and what to do.
``InterruptedAfterSaving`` is a ``KeyboardInterrupt``.
"""

from __future__ import annotations


class TotalfastError(Exception):
    """Base class of all errors that totalfast raises on purpose."""


class InputError(TotalfastError, ValueError):
    """The input image is missing, damaged, or of a kind that can't be segmented."""


class OptionError(TotalfastError, ValueError):
    """An option, or a combination of options, is not valid."""


class UnsupportedError(OptionError):
    """The option or task exists in TotalSegmentator but not yet in totalfast."""


class OutputError(TotalfastError):
    """The result can't be written to the given path."""


class LicenseError(TotalfastError):
    """TotalSegmentator's licence for a task is missing or invalid."""


class WeightsError(TotalfastError):
    """A model is missing or damaged, or its files name or hold parts that could run code."""


class MissingModelError(WeightsError, FileNotFoundError):
    """A file of a model is missing."""


class MemoryLimitError(TotalfastError):
    """The run needs more memory than ``max_memory_gb`` allows; it was not started."""


class DeviceMemoryError(TotalfastError):
    """The GPU's memory is too small for the model, with everything else on the CPU."""


class PredictionError(TotalfastError):
    """The network returned values that can't be turned into labels."""


class InterruptedAfterSaving(KeyboardInterrupt):
    """A signal arrived while the results got their names; all of them are complete."""


class ClusterError(TotalfastError):
    """The Ray cluster can't be used, or no node of it is left."""


class SessionError(TotalfastError):
    """The session is closed."""


class ForkError(TotalfastError):
    """The process was forked from one in which a network had run, so its threads are missing."""
