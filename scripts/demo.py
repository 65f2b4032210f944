"""Segment a made CT with stand-in weights: the main job on a machine without any download.

    python scripts/demo.py [--output totalfast-demo]

Leaves the CT, one mask a structure and the label map in the output folder. The weights are tiny
stand-ins fitted to another phantom, not TotalSegmentator's: the masks show that the whole way
works, not how good the real models are.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np

SEED = 11
SHOWN = 12
"""Rows of the table: the largest structures."""


def totalfast(*arguments: str | Path, home: Path) -> None:
    """Run the command as a user does."""
    command = [sys.executable, "-m", "totalfast", *map(str, arguments)]
    print("$ totalfast", *map(str, arguments), flush=True)
    environment = {**os.environ, "TOTALSEG_HOME_DIR": str(home)}
    environment.pop("TOTALSEG_WEIGHTS_PATH", None)
    subprocess.run(command, check=True, env=environment)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("totalfast-demo"))
    folder = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)

    from totalfast.demo.phantom import make_phantom
    from totalfast.upstream import CLASS_MAPS

    print("Making a CT of a phantom ...", flush=True)
    phantom = make_phantom(SEED)
    scan = folder / "ct.nii.gz"
    nib.save(nib.Nifti1Image(phantom.ct, phantom.affine), scan)

    home = folder / "stand-in-weights"
    maker = Path(__file__).with_name("make_standin_weights.py")
    subprocess.run([sys.executable, maker, home, "--tiny", "--ids", "297"], check=True)

    totalfast("-i", scan, "-o", folder / "segmentations", "--fast", home=home)
    totalfast("-i", scan, "-o", folder / "segmentation.nii.gz", "--fast", "-ml", "-q", home=home)

    labels = np.asarray(nib.load(folder / "segmentation.nii.gz").dataobj)
    voxel_ml = float(np.prod(np.abs(np.diag(phantom.affine)[:3]))) / 1000
    names = CLASS_MAPS["total"]
    sizes = np.bincount(labels.ravel(order="F"), minlength=max(names) + 1)
    print(f"\n{'label':<28}{'volume ml':>10}")
    for label in sorted(names, key=lambda label: -sizes[label])[:SHOWN]:
        print(f"{names[label]:<28}{sizes[label] * voxel_ml:>10.1f}")
    print(
        "\nThese are stand-in weights (a random network whose last layer was fitted to another "
        "phantom),\nnot TotalSegmentator's models: the labels are shapes, not the organs that they "
        f"are named after.\nFiles: {folder}/. For a real scan:\n\n"
        "    totalfast -i ct.nii.gz -o segmentations --fast\n"
    )


if __name__ == "__main__":
    main()
