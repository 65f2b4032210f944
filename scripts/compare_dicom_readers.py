"""Compare DICOM readers on synthetic series with known voxels and positions.

The readers are totalfast's own, dicom2nifti (as TotalSegmentator calls it), highdicom, SimpleITK
and dcm2niix. Readers that are not installed are skipped and named; install all of them with

    pip install highdicom dcm2niix imagecodecs

    python scripts/compare_dicom_readers.py [--json FILE] [--readme]
    python scripts/compare_dicom_readers.py --time [--json FILE]

The series are in ``dicom_cases.py``. Each result is one of

    right     all voxels are where the headers place them, with the right values
    refused   an error, and no image
    wrong     an image with other voxels, values or positions
    crashed   an error that the reader does not raise on purpose

With ``--time`` nothing is compared: totalfast and dicom2nifti read one ordinary series of 300
slices of 512 x 512 in turn, three times each, in child processes (Linux only).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import logging
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from dicom_cases import ODD, ORDINARY, Case, Volume, series
from readme import RESULTS, ROOT, write_table

SAME_MM, SAME_VALUE = 0.02, 0.01
"""Differences of positions and values that do not count: affines are float32 in NIfTI files, and
positions rounded in the headers."""

ANSWERS_S = 60

FILES_README = ROOT / "totalfast" / "files" / "README.md"
"""The file that explains the choice of the reader."""

Image = tuple[np.ndarray, np.ndarray]
"""Intensities (i, j, k), and the RAS+ affine of their indices."""


class Refused(Exception):  # noqa: N818 - a result, not an error
    """The reader refuses the series on purpose."""


def read_totalfast(folder: Path) -> list[Image]:
    """Read with this repository's reader."""
    from totalfast.errors import TotalfastError
    from totalfast.files.dicom.read import open_series
    from totalfast.files.read import read_image

    try:
        with open_series(folder) as opened:
            image = read_image(opened.image)
    except TotalfastError as error:
        raise Refused(str(error)) from error
    return [(image.scale(image.stored), image.grid.affine)]


def read_dicom2nifti(folder: Path) -> list[Image]:
    """Convert as upstream's ``dcm_to_nifti`` does."""
    import dicom2nifti
    from dicom2nifti.exceptions import ConversionError, ConversionValidationError

    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "image.nii.gz"
        try:
            dicom2nifti.dicom_series_to_nifti(folder, path, reorient_nifti=True)
        except (ConversionError, ConversionValidationError) as error:
            raise Refused(str(error)) from error
        return [loaded(path)] if path.exists() else []


def read_highdicom(folder: Path) -> list[Image]:
    """Give all files that pydicom reads to highdicom, which has no search for files of its own."""
    import highdicom
    from pydicom import dcmread
    from pydicom.errors import InvalidDicomError

    headers = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        try:
            headers.append(dcmread(path))
        except (InvalidDicomError, EOFError):
            continue
    if not headers:
        raise Refused("no DICOM files")
    options = {"apply_presentation_lut": False}  # stored values, as the other readers'
    try:
        if len(headers) == 1 and "NumberOfFrames" in headers[0]:
            image = highdicom.Image.from_dataset(headers[0]).get_volume(**options)
        else:
            image = highdicom.get_volume_from_series(headers, **options)
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise Refused(str(error)) from error
    return [(image.array, np.diag([-1.0, -1.0, 1.0, 1.0]) @ image.affine)]


def read_simpleitk(folder: Path) -> list[Image]:
    """Read each series that SimpleITK finds in the folder."""
    import SimpleITK as sitk

    reader = sitk.ImageSeriesReader()
    images = []
    for name in reader.GetGDCMSeriesIDs(str(folder)):
        reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder), name))
        try:
            image = reader.Execute()
        except RuntimeError as error:
            raise Refused(str(error)) from error
        affine = np.eye(4)
        direction = np.reshape(image.GetDirection(), (image.GetDimension(),) * 2)[:3, :3]
        affine[:3, :3] = direction * image.GetSpacing()[:3]
        affine[:3, 3] = image.GetOrigin()[:3]
        voxels = sitk.GetArrayFromImage(image)
        affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
        images.append((np.transpose(voxels).astype(np.float64), affine))
    if not images:
        raise Refused("no series found")
    return images


def read_dcm2niix(folder: Path) -> list[Image]:
    """Convert with dcm2niix's default settings, except for the JSON files."""
    with tempfile.TemporaryDirectory() as place:
        command = [_dcm2niix(), "-z", "n", "-b", "n", "-f", "%s_%e_%q", "-o", place, str(folder)]
        child = subprocess.run(command, capture_output=True, text=True, timeout=ANSWERS_S)
        if child.returncode < 0:
            raise RuntimeError(f"signal {-child.returncode}")
        images = [loaded(path) for path in sorted(Path(place).glob("*.nii"))]
        if not images:
            raise Refused(child.stdout.strip().rpartition("\n")[2])
    return images


def _dcm2niix() -> str | None:
    beside = shutil.which("dcm2niix", path=str(Path(sys.executable).parent))
    return beside or shutil.which("dcm2niix")


def loaded(path: Path) -> Image:
    """Intensities and affine of a NIfTI file."""
    image = nib.load(path)
    return np.asarray(image.dataobj, dtype=np.float64), image.affine


READERS: dict[str, Callable[[Path], list[Image]]] = {
    "totalfast": read_totalfast,
    "dicom2nifti": read_dicom2nifti,
    "highdicom": read_highdicom,
    "SimpleITK": read_simpleitk,
    "dcm2niix": read_dcm2niix,
}


def versions() -> dict[str, str]:
    """Versions of the readers that are installed."""
    found = {}
    for name in READERS:
        if name == "dcm2niix" and (program := _dcm2niix()):
            child = subprocess.run([program, "--version"], capture_output=True, text=True)
            found[name] = child.stdout.strip().rpartition("\n")[2]
        elif importlib.util.find_spec(name):
            found[name] = importlib.metadata.version(name)
    return found


def judge(images: list[Image], answers: list[Volume]) -> tuple[str, str]:
    """Compare what a reader returned with what is in the files."""
    volumes = [part for image in images for part in split(*image)]
    if not volumes:
        return "refused", "no image"
    if not answers:
        return "wrong", "an image of slices that are no volume"
    faults = [[difference(*image, answer) for answer in answers] for image in volumes]
    found = sum(any(fault[number] == "" for fault in faults) for number in range(len(answers)))
    if found == len(answers):  # further images, such as a scout, are not counted
        return "right", ""
    if len(volumes) == 1 == len(answers):
        return "wrong", faults[0][0]
    images_found = f"{len(volumes)} image{'' if len(volumes) == 1 else 's'}"
    return "wrong", f"{found} of {len(answers)} volumes in {images_found}"


def split(voxels: np.ndarray, affine: np.ndarray) -> list[Image]:
    """Volumes of an image of three or four axes."""
    if voxels.ndim == 3:
        return [(voxels, affine)]
    return [(voxels[..., number], affine) for number in range(voxels.shape[3])]


def difference(voxels: np.ndarray, affine: np.ndarray, answer: Volume) -> str:
    """What differs from the answer; empty if nothing does."""
    truth = answer.voxels.transpose(2, 1, 0)
    if sorted(voxels.shape) != sorted(truth.shape):
        return f"{' x '.join(map(str, voxels.shape))} voxels"
    places = np.argwhere(np.ones(truth.shape, dtype=np.bool_))
    points = nib.affines.apply_affine(answer.affine, places)
    try:
        indices = nib.affines.apply_affine(np.linalg.inv(affine), points)
    except np.linalg.LinAlgError:
        return "affine without inverse"
    nearest = np.rint(indices).astype(int)
    inside = ((nearest >= 0) & (nearest < voxels.shape)).all(axis=1)
    off_mm = np.abs(nib.affines.apply_affine(affine, nearest) - points).max()
    if not inside.all() or off_mm > SAME_MM:
        ends = np.argwhere(np.ones((2, 2, 2))) * (np.array(voxels.shape) - 1)
        corners = points[(places % (np.array(truth.shape) - 1) == 0).all(axis=1)]
        away = np.linalg.norm(nib.affines.apply_affine(affine, ends)[:, None] - corners, axis=2)
        return f"positions (a corner {away.min(axis=1).max():.2g} mm away)"
    values = voxels[tuple(nearest.T)]
    wrong = np.abs(values - truth[tuple(places.T)]) > SAME_VALUE
    return f"values of {wrong.mean():.0%} of the voxels" if wrong.any() else ""


def ask(
    reader: Callable[[Path], list[Image]], folder: Path, answers: list[Volume]
) -> dict[str, str]:
    """Read a series, and judge the result."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result, detail = judge(reader(folder), answers)
    except Refused as error:
        result, detail = "refused", str(error)
    except Exception as error:  # noqa: BLE001 - the result is that the reader raises this
        result, detail = "crashed", f"{type(error).__name__}: {error}"
    without_paths = re.sub(r"\S*/\S+", "FILE", detail.replace("\n", " "))
    return {"result": result, "detail": without_paths[:300]}


def is_good(cell: dict[str, str], volumes: int) -> bool:
    """Whether it is the answer that a user needs: the one volume, or else a refusal."""
    return cell["result"] == "right" or (cell["result"] == "refused" and volumes != 1)


def compare() -> dict[str, Any]:
    """Read all series with all installed readers."""
    installed = versions()
    for name in READERS.keys() - installed.keys():
        print(f"{name} is not installed and was skipped.")
    rows = []
    for kind, cases in (("ordinary", ORDINARY), ("odd", ODD)):
        for case in cases:
            rows.append({"kind": kind, **row_of(case, list(installed))})
            cells = {name: cell["result"] for name, cell in rows[-1]["readers"].items()}
            print(rows[-1]["series"], cells, flush=True)
    return {"versions": installed, "series": rows}


def row_of(case: Case, readers: list[str]) -> dict[str, Any]:
    """Write one series and read it with all readers, each from a copy of its own."""
    cells = {}
    with tempfile.TemporaryDirectory(prefix="totalfast-readers-") as place:
        folder = Path(place) / "series"
        folder.mkdir()
        answers = case(folder)
        for name in readers:
            copy = Path(place) / name
            shutil.copytree(folder, copy)
            cells[name] = ask(READERS[name], copy, answers)
    return {"series": (case.__doc__ or "").rstrip("."), "volumes": len(answers), "readers": cells}


def table(content: dict[str, Any]) -> str:
    """Return all results as Markdown."""
    names = list(content["versions"])
    lines = [f"| series | needed | {' | '.join(names)} |", f"|{'---|' * (len(names) + 2)}"]
    for row in content["series"]:
        volumes = row["volumes"]
        needed = {0: "refusal", 1: "volume"}.get(volumes, f"refusal, or {volumes} volumes")
        cells = []
        for name in names:
            cell = row["readers"][name]
            text = cell["result"]
            if text == "wrong":
                text += f": {cell['detail']}"
            cells.append(text if is_good(cell, volumes) else f"**{text}**")
        lines.append(f"| {row['series']} | {needed} | {' | '.join(cells)} |")
    used = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    lines += ["", f"Results that are not as needed are bold. {used}."]
    return "\n".join(lines) + "\n"


def summary(content: dict[str, Any]) -> str:
    """Return the number of series with each result as Markdown."""
    kinds = [row["kind"] for row in content["series"]]
    lines = [
        f"| reader | as needed: {kinds.count('ordinary')} ordinary series | "
        f"{kinds.count('odd')} odd series | wrong, without an error | refused or crashed, but "
        "readable |",
        "|---|---|---|---|---|",
    ]
    for name in content["versions"]:
        good = {"ordinary": 0, "odd": 0}
        wrong = needless = 0
        for row in content["series"]:
            cell = row["readers"][name]
            fits = is_good(cell, row["volumes"])
            good[row["kind"]] += fits
            wrong += cell["result"] == "wrong"
            needless += not fits and cell["result"] != "wrong"
        lines.append(f"| {name} | {good['ordinary']} | {good['odd']} | {wrong} | {needless} |")
    return "\n".join(lines) + "\n"


CHILD = """
import json, sys, time
from pathlib import Path
folder, name = Path(sys.argv[1]), sys.argv[2]
if name == "totalfast":
    from totalfast.files.dicom.read import open_series
    from totalfast.files.read import read_image
    import pydicom.pixels
else:
    import dicom2nifti, nibabel as nib, numpy as np
def peak():
    # Not getrusage, whose peak includes that of the parent process before exec.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("VmHWM"))
before, began = peak(), time.perf_counter()
if name == "totalfast":
    with open_series(folder) as series:
        shape = read_image(series.image).stored.shape
else:
    target = folder.parent / "image.nii.gz"
    dicom2nifti.dicom_series_to_nifti(folder, target, reorient_nifti=True)
    shape = np.asanyarray(nib.load(target).dataobj).shape
    target.unlink()
print(json.dumps({"s": time.perf_counter() - began, "mb": peak(), "mb_before": before}))
"""


def measure(slices: int = 300, repeats: int = 3) -> dict[str, Any]:
    """Time and peak memory of totalfast and dicom2nifti, in turn; imports are not timed."""
    from benchmark_command import machine

    runs: dict[str, list[dict[str, float]]] = {"totalfast": [], "dicom2nifti": []}
    with tempfile.TemporaryDirectory(prefix="totalfast-readers-") as place:
        folder = Path(place) / "series"
        voxels = np.random.default_rng(0).integers(-1000, -900, (slices, 512, 512), dtype=np.int16)
        voxels[:, 100:400, 60:450] += 950  # a body, because gzip's time depends on the content
        series(folder, voxels, spacing_mm=(1.5, 0.8, 0.8))
        for number in range(repeats + 1):  # the first run fills the system's file cache
            for name, results in runs.items():
                child = subprocess.run(
                    [sys.executable, "-c", CHILD, str(folder), name],
                    capture_output=True,
                    check=True,
                    text=True,
                    cwd=ROOT,
                )
                result = json.loads(child.stdout.strip().rpartition("\n")[2])
                if number:
                    results.append(result)
                    print(name, result, flush=True)
    medians = {
        name: {key: statistics.median(run[key] for run in results) for key in results[0]}
        for name, results in runs.items()
    }
    return {"slices": slices, "machine": machine(), "runs": runs, "medians": medians}


def write_tables(content: dict[str, Any]) -> None:
    """Write both tables into their Markdown files."""
    write_table(Path(__file__).name, table(content))
    write_table(Path(__file__).name, summary(content), FILES_README)


def main() -> None:
    """Compare or time the readers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--time", action="store_true", help="measure time and memory instead")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument(
        "--readme",
        action="store_true",
        help="also write the tables in scripts/results and totalfast/files",
    )
    options = parser.parse_args()
    logging.getLogger("totalfast").setLevel(logging.CRITICAL)
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
    content = measure() if options.time else compare()
    name = "dicom_reading" if options.time else "dicom_readers"
    target = options.json or RESULTS / f"{name}.json"
    target.write_text(json.dumps(content, indent=1) + "\n")
    if options.time:
        print(json.dumps(content["medians"], indent=1))
        return
    print(table(content))
    print(summary(content))
    if options.readme:
        write_tables(content)


if __name__ == "__main__":
    main()
