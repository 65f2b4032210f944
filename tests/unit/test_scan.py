from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest

from totalfast.geometry import Grid
from totalfast.scan import ScannerImage


def scan_of(stored, **scaling):
    return ScannerImage(
        stored=stored,
        slope=scaling.get("slope", 1.0),
        intercept=scaling.get("intercept", 0.0),
        grid=Grid(shape=stored.shape, affine=np.diag([1.0, 2.0, 3.0, 1.0])),
        header=nib.Nifti1Header(),
    )


def test_reading_voxels_after_they_were_dropped_is_an_error():
    image = scan_of(np.ones((2, 3, 4), np.int16))
    part = image.cropped((slice(0, 1), slice(0, 1), slice(0, 1)))
    image.drop_voxels()
    with pytest.raises(RuntimeError, match="dropped"):
        _ = image.stored
    assert part.stored.shape == (1, 1, 1)  # a view keeps its voxels
    assert image.grid.shape == (2, 3, 4)


def test_a_cropped_scan_truncates_scaled_intensities_towards_zero():
    image = scan_of(np.array([-3, -1, 0, 1, 3], np.int16).reshape(5, 1, 1), slope=0.5)
    everything = (slice(0, 5), slice(0, 1), slice(0, 1))
    assert image.scale(image.stored).ravel().tolist() == [-1.5, -0.5, 0.0, 0.5, 1.5]
    cropped = image.cropped(everything)
    assert cropped.scale(cropped.stored).ravel().tolist() == [-1.0, 0.0, 0.0, 0.0, 1.0]
