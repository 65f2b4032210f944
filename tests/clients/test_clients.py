"""Programs of others that use nnU-Net give the same files with ``python -m totalfast.patch``.

The programs are installed from PyPI into an environment of their own. Set ``TOTALFAST_CLIENTS`` to
a folder to keep the environment and the weights for the next time.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from tests.parity.matrix import phantom

from .clients import CLIENTS, SUPPORTED, Run, Weights, compare, make_weights, results
from .environment import InstallError, install

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SUPPORTED, reason="the environment is for Linux"),
]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Weights:
    """The environment, and the stand-in weights where the clients look for theirs."""
    kept = os.environ.get("TOTALFAST_CLIENTS")
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    folder = Path(kept, worker) if kept else tmp_path_factory.mktemp("clients")
    try:
        environment = install(folder / "environment")
    except InstallError as error:
        if "CI" in os.environ:
            raise
        pytest.skip(str(error))
    return make_weights(environment, folder / "home")


def cropped(image: nib.Nifti1Image) -> nib.Nifti1Image:
    """Return the first tiles of an image, so that nnU-Net needs seconds."""
    size = [
        min(n, round(80 / mm)) for n, mm in zip(image.shape, image.header.get_zooms(), strict=True)
    ]
    return image.slicer[: size[0], : size[1], : size[2]]


def long(image: nib.Nifti1Image) -> nib.Nifti1Image:
    """Return a narrow image that is so long that MOOSE predicts it in chunks."""
    voxels = np.tile(np.asarray(image.dataobj)[20:50, 20:50], (1, 1, 6))
    return nib.Nifti1Image(voxels, image.affine)


def run(
    name: str, weights: Weights, folder: Path, *, patched: bool, images: list[Path]
) -> tuple[Run, str]:
    """Run a client; return the run and what it printed."""
    client = CLIENTS[name]
    folder.mkdir()
    one = Run(weights, folder)
    command = client.start(one, images, patched=patched)
    variables = weights.variables() | {"TOTALFAST_BACKEND": "torch"}
    done = subprocess.run(
        command,
        env=variables,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return one, done.stdout


def run_both(name: str, weights: Weights, folder: Path, shape=cropped) -> tuple[Run, str, str]:
    """Run a client without and with the patch, and compare; return a run and what both printed."""
    client = CLIENTS[name]
    images = [folder / f"image{number}.nii.gz" for number in range(client.images)]
    for path in images:
        nib.save(shape(phantom(client.spacing_mm)), path)
    theirs, their_text = run(name, weights, folder / "unpatched", patched=False, images=images)
    ours, our_text = run(name, weights, folder / "patched", patched=True, images=images)
    compared = compare(theirs, ours)
    assert not compared.problems
    assert compared.files >= client.images
    assert compared.differing_voxels == 0
    assert compared.classes
    return theirs, their_text, our_text


PUBLISHED = [name for name in CLIENTS if name not in ("spawned processes", "subclasses")]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_clients_write_the_same_files(name, weights, tmp_path):
    run_both(name, weights, tmp_path)


def test_moose_predicts_chunks_of_long_images(weights, tmp_path):
    theirs, *_ = run_both("MOOSE", weights, tmp_path, long)
    logs = theirs.images.glob("moosez-*.log")
    assert any("Image split into 2 chunks" in log.read_text() for log in logs)


def test_spawned_processes_are_patched(weights, tmp_path):
    _, their_text, our_text = run_both("spawned processes", weights, tmp_path)
    assert "method of nnunetv2." in their_text
    assert "method of totalfast." in our_text


def test_subclasses_change_the_labels_as_they_change_nnunets(weights, tmp_path):
    theirs, their_text, our_text = run_both("subclasses", weights, tmp_path)
    assert "method of nnunetv2." in their_text
    assert "method of totalfast." in our_text
    plain, *changed = (
        np.asanyarray(nib.load(path).dataobj)
        for name, path in sorted(results(theirs).items(), key=lambda item: "nnUNet" not in item[0])
    )
    assert len(changed) == 2
    for labels in changed:
        assert np.count_nonzero(labels != plain)
