"""`totalfast demo`, with its default options and no network."""

import os
import re
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from totalfast.cli.demo import MODEL

MODEL_BYTES = 2_000_000
LEAST_DICE = 0.88
"""A little below the mean Dice of the default phantom."""


def test_the_models_size_is_limited_and_its_layout_is_upstreams():
    assert sum(path.stat().st_size for path in MODEL.rglob("*") if path.is_file()) <= MODEL_BYTES
    (dataset,) = MODEL.iterdir()
    assert dataset.name.startswith("Dataset297_")
    (folder,) = dataset.iterdir()
    assert sorted(path.name for path in folder.iterdir()) == [
        "dataset.json",
        "fold_0",
        "plans.json",
    ]


def test_demo_writes_scan_masks_and_picture_and_segments_the_organs(tmp_path):
    before = sorted(MODEL.rglob("*"))
    nowhere = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    environment = {**os.environ, "HOME": str(tmp_path), **nowhere}
    for name in ("TOTALSEG_HOME_DIR", "TOTALSEG_WEIGHTS_PATH", "no_proxy", "NO_PROXY"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-m", "totalfast", "demo"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "totalfast-demo"
    assert sorted(path.name for path in folder.iterdir()) == [
        "ct.nii.gz",
        "preview.png",
        "segmentation.nii.gz",
        "segmentations",
    ]
    assert len(list((folder / "segmentations").iterdir())) == 117
    liver = np.asarray(nib.load(folder / "segmentations/liver.nii.gz").dataobj)
    labels = np.asarray(nib.load(folder / "segmentation.nii.gz").dataobj)
    assert np.array_equal(liver, labels == 5)
    with Image.open(folder / "preview.png") as picture:
        assert min(picture.size) > 800
    mean = re.search(r"(\d+) structures .* mean Dice ([\d.]+)", done.stdout)
    assert mean
    assert int(mean.group(1)) >= 40
    assert float(mean.group(2)) >= LEAST_DICE
    assert "demonstration model" in done.stdout
    assert [path.name for path in tmp_path.iterdir() if path != folder] == []
    assert sorted(MODEL.rglob("*")) == before


def test_demo_names_a_folder_that_it_cannot_write_to(tmp_path, capsys):
    from totalfast.cli.main import main

    blocked = tmp_path / "file"
    blocked.write_text("")
    assert main(["demo", "-o", str(blocked / "below")]) == 1
    assert "can't write" in capsys.readouterr().err


def test_demo_restores_the_users_weights_path(monkeypatch):
    from totalfast.cli.demo import _demonstration_model

    monkeypatch.setenv("TOTALSEG_WEIGHTS_PATH", "mine")
    with pytest.raises(ValueError, match="stop"), _demonstration_model():
        assert os.environ["TOTALSEG_WEIGHTS_PATH"] == str(MODEL)
        raise ValueError("stop")
    assert os.environ["TOTALSEG_WEIGHTS_PATH"] == "mine"
