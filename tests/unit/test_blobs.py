"""Connected components against scipy's."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from totalfast.labels.blobs import label_blobs
from totalfast.labels.clean import clean_labels

CLASSES = {1: "body_trunc", 2: "body_extremities"}


@pytest.mark.parametrize("density", [0.0, 0.2, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("order", ["C", "F"])
def test_blobs_are_scipys(density, order):
    random = np.random.default_rng(0)
    for shape in ((1, 1, 1), (1, 7, 5), (13, 11, 17), (30, 31, 32)):
        mask = np.asarray(random.random(shape) < density, order=order)
        # scipy numbers blobs in C order, so its input is turned to the order in memory.
        view = mask if order == "C" else mask.T
        expected, count = ndimage.label(view)
        blobs, sizes = label_blobs(mask)
        np.testing.assert_array_equal(blobs if order == "C" else blobs.T, expected)
        assert sizes.tolist() == np.bincount(expected.ravel()).tolist()
        assert len(sizes) == count + 1


@pytest.mark.parametrize("order", ["C", "F"])
def test_first_of_several_largest_blobs_is_kept_in_any_memory_order(order):
    random = np.random.default_rng(1)
    ties = 0
    for density in (0.03, 0.06, 0.1, 0.2):
        for _ in range(20):
            labels = np.asarray(random.random((9, 8, 10)) < density, np.uint8, order=order)
            blobs, count = ndimage.label(labels)
            if count == 0:
                continue
            sizes = np.bincount(blobs.ravel())[1:]
            ties += np.count_nonzero(sizes == sizes.max()) > 1
            cleaned = clean_labels(labels, task="body", classes=CLASSES, voxel_mm3=np.float32(1))
            np.testing.assert_array_equal(cleaned, blobs == 1 + np.argmax(sizes))
    assert ties > 10
