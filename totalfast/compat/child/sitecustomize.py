"""Python runs this file when a process starts that a program on totalfast has started.

``python -m totalfast.patch`` puts its folder into PYTHONPATH.
"""

import importlib
import sys
from pathlib import Path


def _patch() -> None:
    here = Path(__file__).parent
    sys.path[:] = [folder for folder in sys.path if Path(folder) != here]
    try:
        from totalfast.compat.program import patch_when_imported
    except ImportError:  # another Python, without totalfast
        pass
    else:
        patch_when_imported()
    # The environment's own file of this name, which is hidden by this one.
    this = sys.modules.pop(__name__)
    try:
        importlib.import_module(__name__)
    except ImportError:
        sys.modules[__name__] = this


_patch()
