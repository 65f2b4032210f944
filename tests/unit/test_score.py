import numpy as np
import pytest

from totalfast.demo.score import score

NAMES = {1: "liver", 2: "spleen", 3: "aorta"}


def test_dice_and_volumes_of_a_shifted_cube():
    truth = np.zeros((20, 20, 20), np.uint8)
    truth[2:12, :10, :10] = 1
    labels = np.zeros_like(truth)
    labels[4:14, :10, :10] = 1
    (row,) = score(labels, truth, NAMES, voxel_ml=0.01)
    assert row.name == "liver"
    assert row.true_ml == pytest.approx(10)
    assert row.found_ml == pytest.approx(10)
    assert row.dice == pytest.approx(0.8)


def test_missed_structures_score_zero_and_small_ones_are_left_out():
    truth = np.zeros((10, 10, 10), np.uint8)
    truth[:5] = 2
    truth[9, 9, 9] = 3
    rows = score(np.zeros_like(truth), truth, NAMES, voxel_ml=0.01)
    assert [(row.name, row.dice) for row in rows] == [("spleen", 0.0)]
