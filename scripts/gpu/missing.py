"""Print the wheels of a folder whose packages this Python does not have.

python missing.py FOLDER
"""

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

for wheel in sorted(Path(sys.argv[1]).glob("*.whl")):
    try:
        version(wheel.name.partition("-")[0])
    except PackageNotFoundError:
        print(wheel)
