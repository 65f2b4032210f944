"""A scan for the tests of commands."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest


@pytest.fixture(scope="session")
def scan(tmp_path_factory):
    values = np.random.default_rng(0).normal(0, 300, (40, 36, 30)).astype(np.int16)
    path = tmp_path_factory.mktemp("scan") / "ct.nii.gz"
    nib.save(nib.Nifti1Image(values, np.diag([-2.0, 2.0, 3.0, 1.0])), path)
    return path
