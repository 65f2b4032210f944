"""The clients, and one run of a client: its inputs, its command line and its results."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np

from .environment import Environment

MAKER = Path(__file__).resolve().parents[2] / "scripts" / "make_client_weights.py"
PROGRAMS = Path(__file__).parent / "programs"
PATCH = ("-m", "totalfast.patch")

MOOSE_TRAINERS = "nnunetv2/training/nnUNetTrainer/variants/MOOSE_custom_trainers.py"
"""The file that MOOSE copies into nnU-Net's folder."""


@dataclasses.dataclass(frozen=True)
class Weights:
    """Stand-in weights, where the clients look for theirs."""

    environment: Environment
    home: Path

    def variables(self) -> dict[str, str]:
        """Environment variables with which the clients find the weights, and no others."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("nnUNet_", "MRSEG_"))}
        return kept | {"HOME": str(self.home), "MRSEG_WEIGHTS_PATH": str(self.model.parent)}

    @property
    def model(self) -> Path:
        """MRSegmentator's model folder, which the small clients use too."""
        return self.home / "mrsegmentator" / "base"


def make_weights(environment: Environment, home: Path) -> Weights:
    """Make the stand-in weights, unless they exist. MOOSE's are a part of the environment."""
    weights = Weights(environment, home.absolute())
    ready = environment.folder / "weights.txt"
    if not ready.exists() or ready.read_text() != str(weights.home):
        weights.model.parent.mkdir(parents=True, exist_ok=True)
        command = [environment.python, "-W", "ignore", MAKER]
        subprocess.run(command, check=True, env=weights.variables(), stdout=subprocess.DEVNULL)
        ready.write_text(str(weights.home))
    return weights


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a client, in a folder of its own."""

    weights: Weights
    folder: Path

    @property
    def images(self) -> Path:
        return self.folder / "images"

    @property
    def target(self) -> Path:
        return self.folder / "target"

    def program(self, name: str) -> str:
        """Path of a console script of the clients."""
        return str(self.weights.environment.program(name))

    def command(self, words: list[str], *, patched: bool) -> list[str]:
        """Return the command line; ``words`` is a script or ``-m module``, and its arguments."""
        python = str(self.weights.environment.python)
        return [python, *(PATCH if patched else ()), *words]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Client:
    """A program that predicts with nnU-Net."""

    words: Callable[[Run], list[str]]
    """The words after ``python`` for a run."""
    images: int = 1
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 2.5)
    field_mm: tuple[float, float, float] = (320.0, 320.0, 300.0)
    """Size of the benchmark's images, (x, y, z)."""
    subjects: bool = False
    """Whether each image lies in a folder of its own, as MOOSE wants."""
    prepare: Callable[[Run], None] = lambda _: None
    """Called before each run."""

    def start(self, run: Run, images: list[Path], *, patched: bool) -> list[str]:
        """Make the folders of a run, and return its command line."""
        for number, image in enumerate(images):
            folder = run.images / f"subject{number}" if self.subjects else run.images
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(image, folder / f"CT_{number}.nii.gz")
        self.prepare(run)
        return run.command(self.words(run), patched=patched)


def hd_bet(run: Run) -> list[str]:
    flags = ["-device", "cpu", "--save_bet_mask"]
    return [run.program("hd-bet"), "-i", str(run.images), "-o", str(run.target), *flags]


def hd_bet_one_file(run: Run) -> list[str]:
    """The output is a file in the current folder."""
    words = ["-i", str(run.images / "CT_0.nii.gz"), "-o", "brain.nii.gz", "-device", "cpu"]
    return [run.program("hd-bet"), *words, "--disable_tta", "--save_bet_mask"]


def mrsegmentator(run: Run) -> list[str]:
    flags = ["--fast", "--cpu_only", "--no_tqdm"]
    return ["-m", "mrsegmentator.main", "-i", str(run.images), "-o", str(run.target), *flags]


def mrsegmentator_in_parts(run: Run) -> list[str]:
    return [*mrsegmentator(run), "--split_level", "1"]


def moose(run: Run) -> list[str]:
    return [run.program("moosez"), "-d", str(run.images), "-m", "clin_ct_organs"]


def moose_herd(run: Run) -> list[str]:
    return [*moose(run), "-herd", "2"]


def without_trainers(run: Run) -> None:
    """Remove MOOSE's trainers from nnU-Net, so that this run must copy and find them."""
    (run.weights.environment.packages / MOOSE_TRAINERS).unlink(missing_ok=True)


def small_client(name: str) -> Callable[[Run], list[str]]:
    """Return the words for one of ``PROGRAMS``."""

    def words(run: Run) -> list[str]:
        script = str(PROGRAMS / f"{name}.py")
        return [script, str(run.weights.model), str(run.images), str(run.target)]

    return words


HEAD = {"spacing_mm": (1.0, 1.0, 1.0), "field_mm": (180.0, 220.0, 160.0)}
BODY = {"spacing_mm": (2.0, 2.0, 2.0), "field_mm": (300.0, 240.0, 560.0), "subjects": True}
"""So long that MOOSE predicts two chunks."""

CLIENTS = {
    "HD-BET": Client(words=hd_bet, **HEAD),
    "HD-BET, one file": Client(words=hd_bet_one_file, **HEAD),
    "MRSegmentator --fast": Client(words=mrsegmentator),
    "MRSegmentator --split_level 1": Client(words=mrsegmentator_in_parts),
    "MOOSE": Client(words=moose, prepare=without_trainers, **BODY),
    "MOOSE -herd 2": Client(words=moose_herd, images=2, prepare=without_trainers, **BODY),
    "spawned processes": Client(words=small_client("spawning"), images=2),
    "subclasses": Client(words=small_client("subclassing")),
}


def results(run: Run) -> dict[str, Path]:
    """Return the label maps and images that a run wrote, by name without MOOSE's time."""
    inputs = set(run.images.rglob("CT_*.nii.gz"))
    return {
        "/".join(
            part for part in path.relative_to(run.folder).parts if not part.startswith("moosez-")
        ): path
        for path in sorted(run.folder.rglob("*.nii.gz"))
        if path not in inputs
    }


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The results of two runs of a client."""

    files: int
    voxels: int
    differing_voxels: int
    classes: int
    """Labels in the label map that has most."""
    problems: tuple[str, ...]
    """Files that only one run has, and differing shapes, affines and types."""


def compare(expected: Run, actual: Run) -> Comparison:
    """Compare the results of two runs voxel by voxel."""
    theirs, ours = results(expected), results(actual)
    problems = [f"only one run has {name}" for name in sorted(theirs.keys() ^ ours.keys())]
    voxels = differing = classes = 0
    for name in sorted(theirs.keys() & ours.keys()):
        one, two = nib.load(theirs[name]), nib.load(ours[name])
        first, second = np.asanyarray(one.dataobj), np.asanyarray(two.dataobj)
        if first.shape != second.shape or first.dtype != second.dtype:
            problems.append(f"{name}: {first.shape} {first.dtype}, {second.shape} {second.dtype}")
            continue
        if one.header.binaryblock != two.header.binaryblock:
            problems.append(f"{name}: the headers differ")
        voxels += first.size
        differing += int(np.count_nonzero(first != second))
        if first.dtype.itemsize == 1:  # a label map, not an image
            classes = max(classes, len(np.unique(first)) - 1)
    return Comparison(len(theirs), voxels, differing, classes, tuple(problems))


SUPPORTED = sys.platform == "linux"
"""The environment's layout and the sampling of the memory are for Linux."""
