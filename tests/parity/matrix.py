"""Inputs, flags and comparison of the parity pairs.

Each pair runs the installed ``TotalSegmentator`` command and totalfast, on one device and offline,
with tiny stand-in weights, and compares all files. The tests run some pairs,
scripts/parity_matrix.py runs all.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np
from isal import igzip
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from scipy import ndimage

from tests.dicom_series import write_series
from totalfast.upstream import CLASS_MAPS, TASK_CONFIGS, TASKS

from .dicom_files import dicom_problems, structures

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@functools.cache
def script(name: str):
    """Import one of the scripts, which are not a package."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


MINIMUM_CLASSES = 20
MAXIMUM_BOUNDARY = 0.25
"""Limits for a structured label map, for tasks with at least that many classes."""

EXTENT_MM = (150.0, 130.0, 120.0)
"""Field of view of the synthetic scans: a few tiny tiles along each axis."""


def phantom(spacing_mm: tuple[float, float, float]) -> nib.Nifti1Image:
    """Return a part of the demo's thorax, int16, RAS+."""
    base_mm = 2.0
    ct, affine = _phantom_2mm()
    size = [int(mm / base_mm) for mm in EXTENT_MM]
    # The centre of the phantom, with lung base, liver and vertebrae.
    start = [(n - s) // 2 for n, s in zip(ct.shape, size, strict=True)]
    part = ct[tuple(slice(a, a + s) for a, s in zip(start, size, strict=True))]
    zoomed = ndimage.zoom(part.astype(np.float32), base_mm / np.asarray(spacing_mm), order=1)
    noise = np.random.default_rng(0).normal(0, 8, zoomed.shape)
    image_affine = np.diag([*spacing_mm, 1.0])
    image_affine[:3, 3] = affine[:3, 3]
    return nib.Nifti1Image((zoomed + noise).astype(np.int16), image_affine)


@functools.cache
def _phantom_2mm():
    from totalfast.demo.phantom import make_phantom

    drawn = make_phantom(7, shape_xyz=(188, 150, 188), spacing_mm=2.0)
    return drawn.ct, drawn.affine


def reoriented(image: nib.Nifti1Image, axes: str) -> nib.Nifti1Image:
    transform = ornt_transform(io_orientation(image.affine), axcodes2ornt(axes))
    return image.as_reoriented(transform)


def oblique(image: nib.Nifti1Image) -> nib.Nifti1Image:
    tilt, turn = np.deg2rad(12.0), np.deg2rad(-7.0)
    about_x = np.eye(4)
    about_x[1:3, 1:3] = [[np.cos(tilt), -np.sin(tilt)], [np.sin(tilt), np.cos(tilt)]]
    about_z = np.eye(4)
    about_z[:2, :2] = [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]
    return nib.Nifti1Image(np.asarray(image.dataobj), about_z @ about_x @ image.affine)


def with_slope(image: nib.Nifti1Image) -> nib.Nifti1Image:
    scaled = nib.Nifti1Image(np.asarray(image.dataobj), image.affine)
    scaled.header.set_slope_inter(0.5, -24.0)
    scaled.header.set_qform(image.affine, code=1)
    scaled.header["descrip"] = b"int16 with slope"
    return scaled


def synthetic_scan(name: str) -> nib.Nifti1Image:
    """Return one of the synthetic scans by name."""
    match name:
        case "iso1.5":
            return phantom((1.5, 1.5, 1.5))
        case "near1.5":
            return phantom((1.501, 1.501, 1.501))
        case "iso3":
            return phantom((3.0, 3.0, 3.0))
        case "thick":
            return phantom((0.7, 0.7, 5.0))
        case "oblique":
            return oblique(phantom((1.8, 1.8, 2.5)))
        case "lps":
            return reoriented(phantom((1.8, 1.8, 2.5)), "LPS")
        case "rpi":
            return reoriented(phantom((1.8, 1.8, 2.5)), "RPI")
        case "permuted":
            return reoriented(phantom((1.8, 1.7, 2.5)), "SLP")
        case "slope":
            return with_slope(phantom((2.0, 2.0, 3.0)))
        case "float32":
            image = phantom((2.0, 2.0, 3.0))
            values = image.get_fdata(dtype=np.float32) + np.float32(0.37)
            return nib.Nifti1Image(values, image.affine)
        case "4d":
            image = phantom((2.0, 2.0, 3.0))
            volume = np.asarray(image.dataobj)
            return nib.Nifti1Image(np.stack([volume, volume // 2], axis=3), image.affine)
        case "one-slice":
            image = phantom((1.8, 1.8, 5.0))
            return image.slicer[:, :, 12:13]
        case "many-tiles":
            return phantom((1.0, 1.0, 1.0))
    raise ValueError(name)


@dataclasses.dataclass(frozen=True)
class Case:
    """One pair of runs."""

    scan: str
    flags: tuple[str, ...] = ()
    in_ci: bool = False
    structured: bool = True
    """Whether the label map must be structured. False for tasks with few classes, for one slice,
    for small public scans, and for five tiny models merged at 1.5 mm, whose borders cross."""

    expects_empty: bool = False
    """Whether the label map is empty, because the weights find no region or no structure."""

    @property
    def name(self) -> str:
        return " ".join((self.scan, *self.flags))

    @property
    def task(self) -> str:
        """The task of -ta."""
        return self.flags[self.flags.index("-ta") + 1] if "-ta" in self.flags else "total"

    @property
    def needs_head_weights(self) -> bool:
        """Whether the phantom lacks the region of the task or its classes."""
        region = TASK_CONFIGS[self.task].get("crop")
        classes = CLASS_MAPS[self.task].values()
        return bool(region) and not HEAD.keys().isdisjoint([*region, *classes])

    @property
    def target(self) -> str:
        """The name for -o."""
        if "-ot" in self.flags:
            return "seg.dcm"
        return "seg.nii.gz" if "-ml" in self.flags else "seg"


HEAD = {
    "skull": "aorta",
    "brain": "lung_lower_lobe_left",
    "hip_left": "superior_vena_cava",
    "clavicula_left": "inferior_vena_cava",
    "teeth_lower": "rib_left_8",
    "intracerebral_hemorrhage": "lung_middle_lobe_right",
    "hip_implant": "lung_upper_lobe_right",
    "coronary_arteries": "pulmonary_vein",
}
"""Structures that tasks need and the phantom lacks, to the structures of the phantom that replace
them in the weights in the folder ``head``."""

HEAD_IDS = (297, 298, 115, 150, 260, 507, 509)
"""Models with other weights in the folder ``head``."""

SYNTHETIC = (
    "thick",
    "iso1.5",
    "iso3",
    "oblique",
    "lps",
    "rpi",
    "permuted",
    "slope",
    "float32",
    "4d",
    "one-slice",
    "many-tiles",
)
ONE_WORKER = ("-ns", "1")
"""Upstream starts one export process per model instead of six, each of which imports torch. The
results are the same, and the matrix needs a third of the time."""

SIX_WORKERS = {
    ("ct", ("--fast",)),
    ("lps", ("-ta", "body")),
    ("oblique", ("-v1o", "--fast")),  # with one worker, upstream's masks have wrong names
}
"""Cases that run with upstream's default of six processes."""

PUBLIC = {
    "ct": "example_ct_sm.nii.gz",
    "mr": "example_mr_sm.nii.gz",
    "dicom": "example_ct_dicom",
    "dicom.zip": "example_ct_dicom",
}
"""Scans of TotalSegmentator's own tests, in the folder of TOTALFAST_TEST_DATA."""

IN_CI_BY_INPUT = {
    ("thick", True),
    ("iso1.5", False),
    ("iso3", True),
    ("oblique", True),
    ("permuted", True),
    ("one-slice", True),
}


def all_cases() -> list[Case]:
    """Return all pairs: each input in default and fast mode, and each other mode on some scans."""
    cases = [
        Case("ct", ("--fast",), in_ci=True, structured=False),
        Case("ct", ("-ml",), structured=False),
        Case("mr", ("-ta", "total_mr", "-ml"), in_ci=True, structured=False),
        Case("mr", ("-ta", "total_mr", "--fast"), structured=False),
    ]
    for scan in SYNTHETIC:
        for fast in (False, True):
            flags = ("--fast", "-ml") if fast else ("-ml",)
            in_ci = (scan, fast) in IN_CI_BY_INPUT
            cases.append(Case(scan, flags, in_ci=in_ci, structured=fast and scan != "one-slice"))
    modes: list[tuple[tuple[str, ...], bool]] = [
        (("--fastest", "-ml"), True),
        (("--fast",), False),
        (("--fast", "-ml", "-sl"), True),
        (("--fast", "-ml", "-ro", "0"), False),
        (("--fast", "-ml", "-ro", "3"), True),
        (("--fast", "-ml", "--higher_order_resampling_LEGACY"), False),
        (("--fast", "--higher_order_resampling_LEGACY", "-rs", "liver", "heart"), False),
    ]
    for flags, in_ci in modes:
        structured = "--fast" in flags and "-rs" not in flags
        cases.append(Case("oblique", flags, in_ci=in_ci, structured=structured))
        cases.append(Case("ct", flags, structured=False))
    # Subsets of the classes, with their models, regions and files.
    subsets: list[tuple[tuple[str, ...], bool]] = [
        (("-rs", "liver", "vertebrae_T12", "-ml"), True),
        (("-rs", "heart", "stomach", "aorta", "--fast", "-s", "-sii"), True),
        (("-rsr", "spleen", "rib_left_9"), False),
        (("-rs", "brain", "--fast"), False),
        (("-rs", "skull", "brain", "-ml", "-s"), False),
        (("-ta", "total_mr", "-rs", "liver", "spleen", "-ml"), False),
        (("-bs", "-ml", "-fs"), False),
        (("-bs", "--fast", "-rs", "liver", "-ml"), False),
        (("-ta", "body_mr", "-bs", "-ml"), False),
    ]
    # Statistics and clean-up of labels.
    extras: list[tuple[tuple[str, ...], bool]] = [
        (("-s", "-sii", "-sx", "-sa", "median", "--fastest", "-ml"), True),
        (("-s", "-sii", "-rmb", "900", "-v1o", "--fast", "-ml"), True),
        (("-s", "--fast", "-sl", "-ml"), False),
        (("-s", "-sii", "-sa", "median", "-ta", "total_mr", "-ml"), False),
        (("-s", "-ml"), False),
        (("-s", "-sii", "-rs", "liver", "heart", "-ml"), False),
        (("-s", "--fast", "-rmb"), False),
        (("-v1o", "--fast"), False),
        (("-v1o", "-ml", "-rs", "liver", "lung_upper_lobe_left", "skull"), False),
        (("-ta", "vertebrae_pp", "-ml"), False),
        (("-ta", "vertebrae_pp_refined", "-ml"), False),
    ]
    for flags, in_ci in subsets + extras:
        no_brain = "brain" in flags  # the phantom has no brain and no skull
        case = Case("oblique", flags, in_ci=in_ci, structured=False, expects_empty=no_brain)
        cases.append(case)
    # Statistics of a scan that is not resampled.
    cases.append(Case("iso3", ("-s", "-sii", "--fast", "-ml"), structured=False))
    tasks: list[tuple[str, ...]] = [
        ("-ta", "body"),
        ("-ta", "body", "--fast", "-ml"),
        ("-ta", "body", "-s", "-sii", "-rmb"),
        ("-ta", "total_mr", "--fastest", "-ml"),
        ("-ta", "body_mr", "-ml"),
        ("-ta", "vertebrae_mr", "-ml"),
        ("-ta", "vertebrae_body", "-ml"),
        ("-ta", "breasts"),
        ("-ta", "trunk_cavities"),
        ("-ta", "trunk_cavities", "-ml", "-fs"),
        ("-ta", "total_v3", "-ml"),
        ("-ta", "total_v3", "--fast", "-ml"),
    ]
    # Other flags.
    plain = (
        ("-ff", "-ml", "-nr", "2", "-q"),
        ("-ff", "-ml", "-v", "--debug"),
        ("-ff", "-ss", "-ml", "-s", "-sii"),
        ("-ff", "-ot", "nifti"),
        ("-rs", "liver", "heart", "--fast", "-ml"),
        ("-ta", "body", "-ndm"),
        ("-ta", "total_v3", "-ms", "small", "--fast", "-ml"),
    )
    cases += [Case("oblique", flags, structured=False) for flags in plain]
    # Tasks that crop to a region: nnU-Net's resampling (separate z, two folds), TotalSegmentator's
    # resampling, other trainers and configurations, several models, the region of the body.
    tasks += [
        ("-ta", "lung_vessels_LEGACY", "-ml"),
        ("-ta", "lung_vessels_LEGACY", "-s", "-sx", "-sii", "-ml"),
        ("-ta", "liver_vessels", "-ml", "-rc"),
        ("-ta", "cerebral_bleed", "-ml"),
        ("-ta", "hip_implant", "-ml"),
        ("-ta", "pleural_pericard_effusion"),
        ("-ta", "liver_segments", "-ml", "-ro", "3"),
        ("-ta", "liver_lesions", "-ml"),
        ("-ta", "abdominal_muscles", "-ml"),
        ("-ta", "headneck_muscles", "-ml"),
    ]
    in_ci_tasks = (
        ("-ta", "body"),
        ("-ta", "trunk_cavities", "-ml", "-fs"),
        ("-ta", "lung_vessels_LEGACY", "-ml"),
        ("-ta", "pleural_pericard_effusion"),
        ("-ta", "liver_segments", "-ml", "-ro", "3"),
    )
    for flags in tasks:
        cases.append(Case("lps", flags, in_ci=flags in in_ci_tasks, structured=False))
        if "-fs" not in flags:  # upstream fails if a third has fewer than 19 slices
            cases.append(Case("ct", flags, structured=False))
    # All other tasks once. Some remove voxels that are far from the region.
    others = [("-ta", name, "-ml") for name in TASKS if name != "test"]
    others += [("-ta", name) for name in TASKS if TASK_CONFIGS[name].get("remove_outside")]
    tested = {case.task for case in cases}
    for flags in others:
        case = Case("lps", flags, structured=False)
        if case.task not in tested or "-ml" not in flags:
            cases.append(case)
    # DICOM input and output. Upstream's writers fail if the input is a zip file.
    dicom: list[tuple[str, tuple[str, ...], bool]] = [
        ("synthetic.dicom", ("-ff", "-ot", "nifti", "dicom_seg", "dicom_rtstruct"), True),
        ("dicom.zip", ("-ff", "-ml"), True),
        ("dicom", ("-ff", "-ot", "dicom_seg,dicom_rtstruct,nifti"), False),
        ("dicom", ("-ff",), False),
        ("dicom", ("--fast", "-ot", "dicom_seg"), False),
        ("dicom", ("--fast", "-ot", "dicom_rtstruct"), False),
        ("dicom", ("-ot", "nifti,dicom_seg"), False),
        ("dicom", ("-rs", "liver", "aorta", "vertebrae_L1", "-ot", "dicom_seg"), False),
        ("synthetic.dicom", ("--fast", "-s", "-ot", "dicom_rtstruct,dicom_seg"), False),
        ("synthetic.dicom", ("-ta", "body", "-ot", "dicom_seg"), False),
        ("synthetic.zip", ("--fast",), False),
    ]
    cases += [Case(scan, flags, in_ci=ci, structured=False) for scan, flags, ci in dicom]
    unique = {case.name: case for case in reversed(cases)}
    return [case for case in cases if unique[case.name] is case]


def input_file(scan: str, folder: Path) -> Path | None:
    """Return the path of a synthetic scan, which is written, or of a public scan, or None."""
    if scan in PUBLIC:
        data = os.environ.get("TOTALFAST_TEST_DATA")
        path = (Path(data or ".") / PUBLIC[scan]).absolute()
        if not data or not path.exists():
            return None
        if scan.endswith(".zip") and not (folder / scan).exists():
            shutil.make_archive(str((folder / scan).with_suffix("")), "zip", path)
        return folder / scan if scan.endswith(".zip") else path
    if scan.startswith("synthetic."):
        return synthetic_series(folder, scan)
    path = folder / f"{scan}.nii.gz"
    if not path.exists():
        nib.save(synthetic_scan(scan), path)
    return path


def synthetic_series(folder: Path, name: str) -> Path:
    """Write a part of the demo's thorax as a folder of axial slices or as a zip file."""
    path = folder / name
    if path.exists():
        return path
    image = reoriented(phantom((1.8, 1.8, 2.5)), "LPS")
    series = write_series(
        folder / "series",
        np.asarray(image.dataobj).transpose(2, 1, 0),
        spacing_mm=(2.5, 1.8, 1.8),
        origin_mm=tuple(image.affine[:3, 3] * (-1, -1, 1)),
    )
    if name.endswith(".zip"):
        shutil.make_archive(str(path.with_suffix("")), "zip", folder, "series")
    else:
        series.rename(path)
    return path


WITH_DOUBLES = """
import runpy, sys
import totalsegmentator.config
totalsegmentator.config.has_valid_license_offline = lambda: ("yes", "a test double")
if sys.argv[1] != "totalfast":
    import totalsegmentator.python_api
    totalsegmentator.python_api.convert_device_to_string = str
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
"""Runs a program without TotalSegmentator's licence check. Also replaces a function of upstream
that makes the task teeth fail on the CPU (see known_differences.yaml)."""


def make_head_weights(home: Path) -> None:
    """Make weights whose rough models find a head and hips in the phantom's thorax."""
    done, results = home / "head", home / "nnunet" / "results"
    if done.exists():
        return
    head = home / "head.part"
    shutil.rmtree(head, ignore_errors=True)
    flags = [word for pair in HEAD.items() for word in ("--exchange", *pair)]
    maker = [sys.executable, SCRIPTS / "make_standin_weights.py"]
    subprocess.run(
        [*maker, head, "--tiny", "--ids", *map(str, HEAD_IDS), *flags],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    own = head / "nnunet" / "results"
    for folder in results.iterdir():
        if not (own / folder.name).exists():
            (own / folder.name).symlink_to(folder, target_is_directory=True)
    head.rename(done)


def make_small_v3_weights(home: Path) -> None:
    """Link the 3 mm model of ``total_v3`` under the name of the smaller model."""
    for folder in (home / "nnunet" / "results").glob("Dataset836_*/*__nnUNetPlans__3d_fullres"):
        small = folder.with_name(folder.name.replace("nnUNetPlans", "nnUNetResEncUNetLPlans_8"))
        if not small.exists():
            small.symlink_to(folder, target_is_directory=True)


@dataclasses.dataclass
class Comparison:
    """Result of a pair of runs."""

    case: str
    voxels: int = 0
    differing_voxels: int = 0
    problems: list[str] = dataclasses.field(default_factory=list)
    classes: int = 0
    boundary: float = 0.0
    upstream_s: float = 0.0
    totalfast_s: float = 0.0
    totalfast_stdout: str = ""


def run_pair(
    case: Case, scan: Path, home: Path, folder: Path, *, device: str = "cpu"
) -> Comparison:
    """Run both commands on one input and compare all files."""
    if case.needs_head_weights and (home / "head").exists():
        home = home / "head"
    environment = {**os.environ, "TOTALSEG_HOME_DIR": str(home), "PYTHONWARNINGS": "ignore"}
    environment.pop("TOTALSEG_WEIGHTS_PATH", None)
    environment["TOTALFAST_BACKEND"] = "torch"  # also if OpenVINO is installed
    outputs, seconds, texts = {}, {}, {}
    workers = () if (case.scan, case.flags) in SIX_WORKERS else ONE_WORKER
    # Upstream gets its own temporary folder, because the tests check ours for leaked files. It has
    # a short path, because the path of a socket may have at most 107 characters.
    with tempfile.TemporaryDirectory(prefix="u") as temporary:
        own = {"totalsegmentator.bin.TotalSegmentator": {"TMPDIR": temporary}, "totalfast": {}}
        for program, variables in own.items():
            output = folder / program.split(".")[0]
            output.mkdir(parents=True)  # upstream does not create it for DICOM or fast statistics
            target = output / case.target
            command = [sys.executable, "-m", program]
            if program != "totalfast" and device != "cpu":
                command = [sys.executable, SCRIPTS / "gpu" / "upstream.py"]  # without cucim
            if TASK_CONFIGS[case.task].keys() & {"commercial", "crop_model"}:
                command = [sys.executable, "-c", WITH_DOUBLES, program]
            command += ["-i", scan, "-o", target, "-d", device]
            began = time.perf_counter()
            done = subprocess.run(
                [*command, *case.flags, *workers],
                env={**environment, **variables},
                capture_output=True,
                text=True,
                check=False,
                timeout=1800,
            )
            if done.returncode:
                raise RuntimeError(
                    f"{program} failed on {case.name}:\n{done.stdout}\n{done.stderr}"
                )
            seconds[program] = time.perf_counter() - began
            outputs[program], texts[program] = output, done.stdout
    expected, actual = outputs.values()
    comparison = compare_folders(case.name, expected, actual)
    comparison.upstream_s, comparison.totalfast_s = seconds.values()
    comparison.totalfast_stdout = texts["totalfast"]
    return comparison


def compare_folders(name: str, expected: Path, actual: Path) -> Comparison:
    """Compare all files in two folders: names, voxels, headers, extensions."""
    result = Comparison(case=name)
    files = {path.relative_to(expected) for path in expected.rglob("*") if path.is_file()}
    ours = {path.relative_to(actual) for path in actual.rglob("*") if path.is_file()}
    result.problems += [f"only upstream writes {path}" for path in sorted(files - ours)]
    result.problems += [f"only totalfast writes {path}" for path in sorted(ours - files)]
    combined = None
    common = sorted(files & ours)
    for path in (path for path in common if path.suffix == ".json"):
        if (expected / path).read_text() != (actual / path).read_text():
            result.problems.append(f"{path}: the texts differ")
    for path in (path for path in common if path.suffix == ".dcm"):
        result.problems += dicom_problems(str(path), expected / path, actual / path)
        result.classes = structures(actual / path)
    images = [path for path in common if path.suffix not in (".json", ".dcm")]
    for number, path in enumerate(images, start=1):
        one, two = nib.load(expected / path), nib.load(actual / path)
        a, b = voxels_of(one), voxels_of(two)
        result.problems += header_problems(path, one, two)
        if a.shape != b.shape or a.dtype != b.dtype:
            result.problems.append(f"{path}: {a.shape} {a.dtype} upstream, {b.shape} {b.dtype}")
            continue
        result.voxels += a.size
        result.differing_voxels += int(np.count_nonzero(a != b))
        if combined is None:
            combined = np.zeros(a.shape, dtype=np.uint8, order="F")
        used = np.flatnonzero(a.any(axis=(0, 1)))
        if used.size:
            slab = (slice(None), slice(None), slice(used[0], used[-1] + 1))
            value = a[slab] if len(images) == 1 else np.uint8(number)
            np.copyto(combined[slab], value, where=a[slab] != 0)
    if combined is not None:
        result.classes = int(np.count_nonzero(np.unique(combined)))
        if min(combined.shape) > 1:
            _, result.boundary = script("label_map_facts").label_map_facts(combined)
    return result


def voxels_of(image: nib.Nifti1Image) -> np.ndarray:
    """Return the stored voxels of a file, which must have no scaling. igzip is fast."""
    proxy = image.dataobj
    opened = igzip.open if proxy.file_like.endswith(".gz") else open
    with opened(proxy.file_like, "rb") as stream:
        content = stream.read()
    values = np.frombuffer(content, dtype=proxy.dtype, offset=proxy.offset)
    return values.reshape(proxy.shape, order="F")


def header_problems(path: Path, one: nib.Nifti1Image, two: nib.Nifti1Image) -> list[str]:
    """Return the header fields, affine and extensions that differ."""
    problems = []
    for field in one.header:
        a, b = one.header[field], two.header[field]
        if a.tobytes() != b.tobytes() and not np.array_equal(a, b):
            problems.append(f"{path}: header field {field} is {a} upstream, {b} here")
    if not np.array_equal(one.affine, two.affine):
        problems.append(f"{path}: affine differs by {np.abs(one.affine - two.affine).max()}")
    content = [[e.get_content() for e in image.header.extensions] for image in (one, two)]
    if content[0] != content[1]:
        problems.append(f"{path}: header extensions differ")
    return problems
