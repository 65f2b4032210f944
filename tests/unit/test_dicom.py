"""DICOM input: which files form the scan, the positions of its voxels, and refused files."""

from __future__ import annotations

import contextlib
import shutil
import zipfile

import nibabel as nib
import numpy as np
import pytest
from pydicom import dcmread
from totalsegmentator.dicom_io import dcm_to_nifti

import totalfast
from tests.dicom_series import AXIAL, new_file, write_multi_frame, write_series
from totalfast import InputError, OptionError, TotalfastError
from totalfast.cli.parser import build_parser
from totalfast.cli.segment import segment_scan
from totalfast.files.dicom import find as dicom_files
from totalfast.files.dicom.header import read_slices
from totalfast.files.dicom.read import open_series
from totalfast.files.read import read_image

VOXELS = np.random.default_rng(0).integers(-1000, 1000, (6, 8, 7))
"""(slice, row, column)."""


def opened(source):
    with open_series(source) as series:
        image = read_image(series.image)
    return image.scale(image.stored), image.grid.affine, series


def upstreams(folder, tmp_path):
    dcm_to_nifti(folder, tmp_path / "upstream.nii.gz")
    image = nib.load(tmp_path / "upstream.nii.gz")
    return image.get_fdata(), image.affine


def test_folder_zip_and_unrelated_files_give_upstreams_image(tmp_path, caplog):
    plain = write_series(tmp_path / "plain", VOXELS)
    expected, affine = upstreams(plain, tmp_path)
    assert expected.shape == (7, 8, 6)
    # A localizer series, a structure set and a text file; the scan is in a subfolder.
    full = tmp_path / "full"
    shutil.copytree(plain, full / "CT" / "series 1")
    (full / "readme.txt").write_text("not DICOM")
    write_series(full / "scout", VOXELS[:2], SeriesInstanceUID="1.2.9", name="scout")
    write_series(full, VOXELS[:5], SeriesInstanceUID="1.2.8", ImageType=["O", "P", "LOCALIZER"])
    new_file(Modality="RTSTRUCT").save_as(full / "rtstruct.dcm", enforce_file_format=True)
    archive = shutil.make_archive(str(tmp_path / "ct"), "zip", full)
    for source in (plain, full, tmp_path / archive):
        actual, actual_affine, series = opened(source)
        np.testing.assert_array_equal(actual, expected)
        np.testing.assert_array_equal(actual_affine, affine)
        assert [each.orientation for each in series.slices] == [AXIAL] * 6
        told = "2 images of other series that have fewer than 4 slices, for example scout000.dcm"
        assert (told in caplog.text) == (source != plain)
        caplog.clear()


ORIENTATIONS = [
    AXIAL,
    (-1.0, 0.0, 0.0, 0.0, 1.0, 0.0),
    (1.0, 0.0, 0.0, 0.0, -1.0, 0.0),
    (0.0, 1.0, 0.0, 1.0, 0.0, 0.0),
    (1.0, 0.0, 0.0, 0.0, 0.0, -1.0),
    (-1.0, 0.0, 0.0, 0.0, 0.0, -1.0),
    (1.0, 0.0, 0.0, 0.0, 0.0, 1.0),
    (0.0, 1.0, 0.0, 0.0, 0.0, -1.0),
    (0.0, -1.0, 0.0, 0.0, 0.0, -1.0),
    (0.0, 0.0, 1.0, 0.0, 1.0, 0.0),
    (0.9848077530122081, 0.17364817766693033, 0.0, -0.17364817766693033, 0.9848077530122081, 0.0),
]


def patient_points(shape, orientation, spacing_mm, origin_mm):
    """RAS+ positions (n, 3) of all voxels (slice, row, column) of a series."""
    row, column = np.asarray(orientation[:3]), np.asarray(orientation[3:])
    steps = [np.cross(row, column) * spacing_mm[0], column * spacing_mm[1], row * spacing_mm[2]]
    points = np.indices(shape).reshape(3, -1).T @ np.asarray(steps) + origin_mm
    return points * (-1, -1, 1)


@pytest.mark.parametrize(
    ("orientation", "backwards"),
    [(each, False) for each in ORIENTATIONS] + [(ORIENTATIONS[n], True) for n in (0, 7)],
)
def test_voxel_positions_match_the_slices_headers(tmp_path, orientation, backwards):
    spacing_mm, origin_mm = (3.0, 2.0, 1.5), (-30.0, -40.0, 50.0)
    step = np.cross(orientation[:3], orientation[3:]) * spacing_mm[0]
    if backwards:
        step = -step
        origin_mm = tuple(np.subtract(origin_mm, (len(VOXELS) - 1) * step))
    voxels = VOXELS[::-1] if backwards else VOXELS
    folder = write_series(
        tmp_path / "ct",
        voxels,
        spacing_mm=spacing_mm,
        orientation=orientation,
        origin_mm=origin_mm,
        step=step,
    )
    actual, affine, _ = opened(folder)
    points = patient_points(VOXELS.shape, orientation, spacing_mm, (-30.0, -40.0, 50.0))
    indices = nib.affines.apply_affine(np.linalg.inv(affine), points)
    np.testing.assert_allclose(indices, np.rint(indices), atol=1e-4)
    index = np.rint(indices).astype(int)
    np.testing.assert_array_equal(actual[tuple(index.T)], VOXELS.ravel())


def refusal(source):
    with pytest.raises(InputError) as caught, open_series(source):
        pass
    return str(caught.value)


def test_error_names_a_source_without_a_scan(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "empty holds no DICOM image slices" in refusal(tmp_path / "empty")
    assert "none.zip does not exist" in refusal(tmp_path / "none.zip")
    (tmp_path / "notes.txt").write_text("hello")
    assert "notes.txt holds no DICOM image slices with" in refusal(tmp_path / "notes.txt")
    (tmp_path / "report").mkdir()
    new_file(Modality="SR").save_as(tmp_path / "report" / "a", enforce_file_format=True)
    assert "1 x no scan, but SR" in refusal(tmp_path / "report")
    folder = write_series(tmp_path / "few", VOXELS[:3])
    assert "few can't be converted: it has fewer than 4 slices" in refusal(folder)
    assert "give the folder with its series" in refusal(folder / "slice000.dcm")


def test_two_series_in_one_folder(tmp_path):
    write_series(tmp_path / "both", VOXELS, name="a", SeriesDescription="lung")
    write_series(
        tmp_path / "both", VOXELS, name="b", SeriesDescription="bone", SeriesInstanceUID="1.2.7"
    )
    message = refusal(tmp_path / "both")
    assert "both holds 2 DICOM series: " in message
    for name, uid in (("lung", "1.2.3.4"), ("bone", "1.2.7")):
        assert f"'{name}' (CT, 6 slices of 7 x 8, UID {uid})" in message
    assert "--series NUMBER" in message


def test_a_tilted_gantry_a_missing_slice_and_slices_that_are_not_parallel(tmp_path):
    tilted = write_series(tmp_path / "tilted", VOXELS, step=np.array([0.0, 1.0, 3.0]))
    assert "sheared, for example by a tilted gantry" in refusal(tilted)
    gap = write_series(tmp_path / "gap", VOXELS)
    (gap / "slice002.dcm").unlink()
    assert "not evenly spaced" in refusal(gap)
    mixed = write_series(tmp_path / "mixed", VOXELS)
    write_series(mixed, VOXELS, orientation=ORIENTATIONS[4], name="coronal")
    assert "mixed can't be converted: its slices are not parallel" in refusal(mixed)
    assert "6 coronal of 7 x 8; 6 axial of 7 x 8" in refusal(mixed)
    sizes = write_series(tmp_path / "sizes", VOXELS)
    write_series(sizes, VOXELS[:, :5], name="small", origin_mm=(-30.0, -40.0, 68.0))
    assert "not of one size; it holds several volumes" in refusal(sizes)


def test_untrusted_zip_files(tmp_path, monkeypatch, caplog):
    series = write_series(tmp_path / "ct", VOXELS)
    with zipfile.ZipFile(tmp_path / "up.zip", "w") as archive:
        for path in sorted(series.iterdir()):
            archive.write(path, f"../../{path.name}")
    before = sorted(tmp_path.rglob("*"))
    actual, _, _ = opened(tmp_path / "up.zip")
    np.testing.assert_array_equal(actual, opened(series)[0])
    assert sorted(tmp_path.rglob("*")) == before
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros", bytes(20_000_000))
    monkeypatch.setattr(dicom_files, "BOMB_BYTES", 10_000_000)
    assert "bomb.zip would grow from 0.0 MB to 20 MB" in refusal(tmp_path / "bomb.zip")
    content = bytearray((tmp_path / "up.zip").read_bytes())
    content[content.index(b"DICM") + 300] ^= 0xFF  # in the first file's attributes
    (tmp_path / "damaged.zip").write_bytes(content)
    opened(tmp_path / "damaged.zip")
    assert "1 file, for example slice000.dcm: damaged" in caplog.text
    content = bytearray((tmp_path / "up.zip").read_bytes())
    content[content.index(b"PK\x01\x02") - 10] ^= 0xFF  # in the last file's pixels
    (tmp_path / "pixels.zip").write_bytes(content)
    opened(tmp_path / "pixels.zip")
    assert "1 file, for example slice005.dcm: damaged" in caplog.text


def test_a_multi_frame_file_is_read_as_a_scan(tmp_path):
    single, affine, _ = opened(write_series(tmp_path / "single", VOXELS))
    path = write_multi_frame(tmp_path / "many" / "ct.dcm", VOXELS)
    for source in (path, path.parent):
        actual, actual_affine, series = opened(source)
        np.testing.assert_array_equal(actual, single)
        np.testing.assert_allclose(actual_affine, affine)
        assert [each.frame for each in series.slices] == list(range(6))


def test_frames_are_ordered_by_position_with_their_own_or_a_shared_rescaling(tmp_path):
    expected, affine, _ = opened(write_multi_frame(tmp_path / "ct.dcm", VOXELS))
    for name, arguments in (
        ("shared", {"per_frame": None, "shared": (1, -1024)}),
        ("turned", {"order": range(5, -1, -1)}),
        ("mixed", {"order": (2, 0, 1, 5, 4, 3)}),
    ):
        actual, actual_affine, _ = opened(
            write_multi_frame(tmp_path / f"{name}.dcm", VOXELS, **arguments)
        )
        np.testing.assert_array_equal(actual, expected)
        np.testing.assert_array_equal(actual_affine, affine)


class Stopped(Exception):
    pass


@pytest.fixture
def tasks(monkeypatch):
    """The tasks of runs, which stop before they begin."""
    started = []

    def run(*_, options, **__):
        started.append(options.task)
        raise Stopped

    monkeypatch.setattr("totalfast.run.pipeline.run", run)
    return started


@pytest.mark.parametrize(
    ("asked", "modality", "expected"),
    [
        ("total", "MR", "total_mr"),
        ("total_mr", "CT", "total"),
        ("total", "CT", "total"),
        ("total", "PT", "total"),
        ("body", "MR", "body"),
    ],
)
def test_the_command_runs_the_task_of_the_modality_and_python_warns(
    tmp_path, tasks, caplog, asked, modality, expected
):
    folder = write_series(tmp_path / "scan", VOXELS, Modality=modality)
    words = ["-i", str(folder), "-o", str(tmp_path / "masks"), "-ta", asked, "-d", "cpu"]
    with pytest.raises(Stopped):
        segment_scan(build_parser().parse_args(words))
    with pytest.raises(Stopped):
        totalfast.Session(device="cpu").segment(folder, task=asked)
    assert tasks == [expected, asked]
    swapped = f"input modality is {modality}. Will run {modality} model instead."
    other = f"The input's modality is {modality}, but task {asked} was trained on"
    assert (swapped in caplog.text) == (other in caplog.text) == (asked != expected)
    assert other not in caplog.text.partition(swapped)[0]


def test_headers_are_read_once(tmp_path, tasks, monkeypatch):
    folder = write_series(tmp_path / "scan", VOXELS, Modality="MR")
    names = []

    def counted(file):
        names.append(file.name)
        return read_slices(file)

    monkeypatch.setattr("totalfast.files.dicom.series.read_slices", counted)
    session = totalfast.Session(device="cpu", follow_modality=True)
    with pytest.raises(Stopped):
        session.segment(folder)
    assert tasks == ["total_mr"]
    assert names == [path.name for path in sorted(folder.iterdir())]


def test_names_of_classes_are_those_of_the_modality_s_task(tmp_path, tasks):
    folder = write_series(tmp_path / "scan", VOXELS, Modality="MR")
    session = totalfast.Session(device="cpu", follow_modality=True)
    with pytest.raises(OptionError, match="task 'total_mr' has no class"):
        session.segment(folder, roi_subset=["vertebrae_L1"])  # a class of total only
    assert tasks == []


def test_mr_slices_in_the_order_of_acquisition_are_ordered_by_position(tmp_path):
    folder = write_series(tmp_path / "mr", VOXELS, Modality="MR", Manufacturer="SIEMENS")
    expected, affine, _ = opened(folder)
    for number, path in enumerate(sorted(folder.iterdir())):
        header = dcmread(path)
        header.InstanceNumber = number // 2 + 1 + 3 * (number % 2)
        header.save_as(path)
    actual, actual_affine, _ = opened(folder)
    np.testing.assert_array_equal(actual, expected)
    np.testing.assert_array_equal(actual_affine, affine)


def test_several_echoes_and_a_spacing_that_drifts_are_refused(tmp_path):
    echoes = write_series(tmp_path / "echoes", VOXELS, Modality="MR", EchoTime=10)
    write_series(echoes, VOXELS + 1, Modality="MR", EchoTime=20, name="second")
    message = refusal(echoes)
    assert "at 6 of 6 positions it has 2 images: several echoes (EchoTime differs)" in message
    drift = write_series(tmp_path / "drift", np.tile(VOXELS, (4, 1, 1)), spacing_mm=(1.0, 2.0, 2.0))
    for number, path in enumerate(sorted(drift.iterdir())):
        header = dcmread(path)
        header.ImagePositionPatient = [-30, -40, number if number < 12 else 1.1 * number - 1.2]
        header.save_as(path)
    assert "the spacing changes" in refusal(drift)


def test_one_of_several_series_is_chosen_by_number_or_uid(tmp_path):
    for number, name in ((3, "a"), (7, "b")):
        write_series(
            tmp_path / "both",
            VOXELS + number,
            name=name,
            SeriesNumber=number,
            SeriesInstanceUID=f"1.2.{number}",
        )
    assert "series 3: 'synthetic'" in refusal(tmp_path / "both")
    for wanted, number in (("3", 3), ("1.2.7", 7)):
        with open_series(tmp_path / "both", wanted=wanted) as series:
            np.testing.assert_array_equal(
                np.asarray(series.image.dataobj).max(), (VOXELS + number).max()
            )
    with (
        pytest.raises(OptionError, match="has no series 5"),
        open_series(tmp_path / "both", wanted="5"),
    ):
        pass


def test_slices_with_a_series_uid_each_are_one_series_if_they_form_a_volume(tmp_path, caplog):
    folder = write_series(tmp_path / "ct", VOXELS)
    expected, affine, _ = opened(folder)
    for number, path in enumerate(sorted(folder.iterdir())):
        header = dcmread(path)
        header.SeriesInstanceUID = f"1.2.4.{number // 2}"
        header.save_as(path)
    actual, actual_affine, _ = opened(folder)
    np.testing.assert_array_equal(actual, expected)
    np.testing.assert_array_equal(actual_affine, affine)
    assert "have 3 different values of SeriesInstanceUID" in caplog.text
    (folder / "slice003.dcm").unlink()
    assert "not evenly spaced" in refusal(folder)


def test_derived_slices_are_kept_where_they_continue_the_volume(tmp_path, caplog):
    folder = write_series(tmp_path / "ct", VOXELS, ImageType=["ORIGINAL", "PRIMARY", "AXIAL"])
    expected, _, _ = opened(folder)
    kind = ["DERIVED", "PRIMARY", "AXIAL"]
    for path in sorted(folder.iterdir())[4:]:
        header = dcmread(path)
        header.ImageType = kind
        header.save_as(path)
    np.testing.assert_array_equal(opened(folder)[0], expected)
    assert "derived" not in caplog.text
    projections = write_series(tmp_path / "more", VOXELS, ImageType=["ORIGINAL", "PRIMARY"])
    write_series(projections, VOXELS[:4] + 1, name="projection", ImageType=kind)
    np.testing.assert_array_equal(opened(projections)[0], expected)
    assert "4 images of the same series that were derived from the slices" in caplog.text


def test_reconstructions_of_one_series_are_named(tmp_path):
    folder = write_series(tmp_path / "ct", VOXELS, ConvolutionKernel="B30f")
    write_series(folder, VOXELS + 1, name="sharp", ConvolutionKernel="B70f")
    assert "several reconstructions (ConvolutionKernel differs)" in refusal(folder)


def test_files_that_are_no_slices_are_left_out_and_told(tmp_path, caplog):
    folder = write_series(tmp_path / "ct", VOXELS)
    expected, _, _ = opened(folder)
    (folder / "empty.dcm").write_bytes(b"")
    (folder / "cut.dcm").write_bytes((folder / "slice000.dcm").read_bytes()[:200])
    (folder / "short.dcm").write_bytes((folder / "slice000.dcm").read_bytes()[:-20])
    (folder / "._slice000.dcm").write_bytes(b"\x00\x05\x16\x07" + bytes(300))
    for keyword in ("ImageOrientationPatient", "ImagePositionPatient"):
        header = dcmread(folder / "slice000.dcm")
        setattr(header, keyword, None)
        header.SeriesInstanceUID = "1.2.9"
        header.save_as(folder / f"{keyword}.dcm")
    caplog.set_level("INFO")
    np.testing.assert_array_equal(opened(folder)[0], expected)
    for name, reason in (
        ("empty.dcm", "empty (0 bytes)"),
        ("cut.dcm", "no image, or cut off before it"),
        ("short.dcm", "cut off within the pixels"),
        ("._slice000.dcm", "attributes that macOS keeps"),
        ("ImageOrientationPatient.dcm", "no ImageOrientationPatient"),
        ("ImagePositionPatient.dcm", "no ImagePositionPatient"),
    ):
        assert f"for example {name}: {reason}" in caplog.text


def test_random_damage_is_refused_or_read(tmp_path):
    folder = write_series(tmp_path / "ct", VOXELS)
    files = {path: path.read_bytes() for path in sorted(folder.iterdir())}
    random = np.random.default_rng(3)
    for _ in range(200):
        path = random.choice(list(files))
        content = bytearray(files[path])
        for place in random.integers(128, len(content), random.integers(1, 5)):
            content[place] = random.integers(256)
        path.write_bytes(
            content[: random.integers(100, len(content)) if random.random() < 0.2 else None]
        )
        with contextlib.suppress(TotalfastError):
            opened(folder)
        path.write_bytes(files[path])
