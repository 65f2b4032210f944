"""Parts of scripts/benchmark_gpu.py that need no GPU."""

from __future__ import annotations

import importlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture
def part(monkeypatch):
    """Imports a module of the benchmark by name."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module


def save(labels: np.ndarray, path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    nib.save(nib.Nifti1Image(labels, np.eye(4)), path)
    return path


def test_differing_counts_voxels_and_finds_the_lowest_dice(part, tmp_path):
    one = np.zeros((10, 20, 30), dtype=np.uint8)
    one[:5], one[5:, :10] = 1, 2  # 3000 and 1500 voxels
    other = one.copy()
    other[0, :, :15] = 0  # 300 voxels of label 1 are background
    other[5, 0, :10] = 1  # 10 voxels of label 2 are label 1
    other[9, 19, 29] = 3  # a structure of one voxel does not count
    found = part("gpu.labels").differing(
        save(one, tmp_path / "one.nii.gz"), save(other, tmp_path / "other.nii.gz")
    )
    assert (found["differing"], found["voxels"]) == (311, 6000)
    assert found["lowest_dice_of_100_voxels"] == pytest.approx(2 * 2700 / (3000 + 2710))
    assert found["where"] == "one.nii.gz:1"


def test_differing_adds_up_the_masks_of_two_folders(part, tmp_path):
    mask = np.zeros((8, 8, 8), dtype=np.uint8)
    mask[:4] = 1
    smaller = mask.copy()
    smaller[0] = 0
    for folder, second in (("a", mask), ("b", smaller)):
        save(mask, tmp_path / folder / "liver.nii.gz")
        save(second, tmp_path / folder / "spleen.nii.gz")
    found = part("gpu.labels").differing(tmp_path / "a", tmp_path / "b")
    assert (found["differing"], found["voxels"]) == (64, 1024)
    assert found["where"] == "spleen.nii.gz:1"


def test_differing_names_files_that_only_one_folder_has(part, tmp_path):
    mask = np.ones((2, 2, 2), dtype=np.uint8)
    save(mask, tmp_path / "a" / "liver.nii.gz")
    save(mask, tmp_path / "b" / "heart.nii.gz")
    found = part("gpu.labels").differing(tmp_path / "a", tmp_path / "b")
    assert found == {"other files": ["heart.nii.gz", "liver.nii.gz"]}


@pytest.mark.parametrize(
    ("without", "searched", "tiles"),
    [
        ((0.3, 13.0), (2.3, 10.5), 800.0),  # 2 s for 2.5 ms a tile
        ((0.3, 13.0), (0.2, 10.5), 0.0),
        ((0.3, 13.0), (2.3, 13.0), None),
    ],
)
def test_search_pays_from_its_cost_divided_by_its_gain(part, without, searched, tiles):
    keys = ("first_tile_s", "ms_per_tile")
    rows = {
        setting: {"model": dict(zip(keys, values, strict=True))}
        for setting, values in (("default", without), ("search", searched))
    }
    assert part("gpu.calls").break_even(rows) == {"default": {"model": tiles}}


def test_import_times_are_added_up_by_package(part):
    lines = [
        "import time: self [us] | cumulative | imported package",
        "import time:       500 |        500 |   torch._C",
        "import time:      1500 |       2000 | torch",
        "import time:       250 |        250 | numpy",
        "Done in 3 s",
    ]
    found = part("gpu.commands").import_ms(lines)
    assert found == {"all": 2.2, "torch": 2.0, "numpy": 0.2}


def test_table_has_times_ratio_and_differing_voxels(part):
    results = {
        "fast_per_class": {
            "upstream": {"wall_s": 30.0, "rc": 0, "vram_mb": 9000},
            "totalfast": {"wall_s": 5.0, "rc": 0, "vram_mb": 1500},
            "ours_vs_upstream": {"differing": 12, "voxels": 12_000_000},
        },
        "total_ml": {"totalfast": {"wall_s": 8.0, "rc": 0}, "upstream": {"killed_after_s": 150.0}},
    }
    rows = part("gpu.table").tables(results).splitlines()
    assert "| 30.0 s | 5.0 s | 6.0x | 12 (1e-06) |" in rows[2]
    assert "| over 150 s | 8.0 s |  |" in rows[3]


def test_list_has_all_steps_in_their_order(part):
    benchmark = part("benchmark_gpu")
    table = benchmark.__doc__.partition("cores:\n\n")[2].partition("\n\n")[0].splitlines()
    assert [line.split()[0] for line in table[3:-1]] == list(benchmark.STEPS)
    assert all(int(line.split()[1]) > 0 for line in table[3:-1])
