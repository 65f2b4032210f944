"""totalfast: TotalSegmentator's models and command line, in one process and a fraction of the time.

The public names are ``segment``, ``Session``, ``ArgmaxPredictor``, ``patch_totalsegmentator``, its
inverse, and the errors. Importing this package imports neither torch nor nibabel; the first call
does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from totalfast.about import version as _version
from totalfast.errors import (
    DeviceMemoryError,
    ForkError,
    InputError,
    LicenseError,
    MemoryLimitError,
    OptionError,
    OutputError,
    PredictionError,
    SessionError,
    TotalfastError,
    UnsupportedError,
    WeightsError,
)

if TYPE_CHECKING:
    from totalfast.api import segment
    from totalfast.compat.patch_nnunet import patch_nnunet, unpatch_nnunet
    from totalfast.compat.patch_totalsegmentator import (
        patch_totalsegmentator,
        unpatch_totalsegmentator,
    )
    from totalfast.nnunet.predictor import ArgmaxPredictor
    from totalfast.session import Session

__all__ = [
    "ArgmaxPredictor",
    "ForkError",
    "InputError",
    "LicenseError",
    "DeviceMemoryError",
    "MemoryLimitError",
    "OptionError",
    "OutputError",
    "PredictionError",
    "Session",
    "SessionError",
    "TotalfastError",
    "UnsupportedError",
    "WeightsError",
    "patch_nnunet",
    "patch_totalsegmentator",
    "segment",
    "unpatch_nnunet",
    "unpatch_totalsegmentator",
]

__version__ = _version()

_LAZY = {
    "ArgmaxPredictor": "totalfast.nnunet.predictor",
    "Session": "totalfast.session",
    "patch_nnunet": "totalfast.compat.patch_nnunet",
    "patch_totalsegmentator": "totalfast.compat.patch_totalsegmentator",
    "segment": "totalfast.api",
    "unpatch_nnunet": "totalfast.compat.patch_nnunet",
    "unpatch_totalsegmentator": "totalfast.compat.patch_totalsegmentator",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401
    if name not in _LAZY:
        raise AttributeError(f"module 'totalfast' has no attribute '{name}'")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
