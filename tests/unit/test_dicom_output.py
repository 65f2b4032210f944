"""DICOM output: structures have the labels' positions, or the series is refused."""

from __future__ import annotations

import sys

import nibabel as nib
import numpy as np
import pydicom
import pytest

import totalfast
from tests.dicom_series import write_series
from totalfast import OptionError, OutputError
from totalfast.files.dicom.read import open_series
from totalfast.files.dicom.write import check_packages, check_series, write_dicom
from totalfast.files.targets import OutputPlan, nifti_instead, output_files
from totalfast.options import Options
from totalfast.system.pending_files import PendingFiles

from .test_dicom import ORIENTATIONS, VOXELS, multi_frame

TYPES = ("dicom_rtstruct", "dicom_seg")
NAMES = {1: "liver", 2: "spleen", 3: "stomach"}
BOX = (slice(1, 4), slice(2, 7), slice(1, 3))


def needs_writers():
    pytest.importorskip("rt_utils")
    pytest.importorskip("highdicom")


def labelled(series):
    """Labels with one box, and its voxels' positions, RAS+."""
    labels = np.zeros(series.image.shape, dtype=np.uint8, order="F")
    labels[BOX] = 2
    return labels, nib.affines.apply_affine(series.image.affine, np.argwhere(labels))


def points_of_seg(path):
    """Positions, RAS+, of the voxels of a DICOM SEG's only segment."""
    seg = pydicom.dcmread(path)
    assert [item.SegmentLabel for item in seg.SegmentSequence] == ["spleen"]
    shared = seg.SharedFunctionalGroupsSequence[0]
    row, column = np.reshape(shared.PlaneOrientationSequence[0].ImageOrientationPatient, (2, 3))
    down, right = shared.PixelMeasuresSequence[0].PixelSpacing
    points = []
    frames = seg.pixel_array.reshape(-1, seg.Rows, seg.Columns)
    for frame, group in zip(frames, seg.PerFrameFunctionalGroupsSequence, strict=True):
        corner = np.asarray(group.PlanePositionSequence[0].ImagePositionPatient, dtype=float)
        for r, c in np.argwhere(frame):
            points.append(corner + r * down * column + c * right * row)
    return np.asarray(points) * (-1, -1, 1)


def points_of_rtstruct(path):
    """Points of the contours of an RT structure set's only structure, RAS+."""
    structures = pydicom.dcmread(path)
    assert [item.ROIName for item in structures.StructureSetROISequence] == ["spleen"]
    contours = structures.ROIContourSequence[0].ContourSequence
    points = [np.reshape(contour.ContourData, (-1, 3)) for contour in contours]
    points = np.concatenate(points).astype(float) * (-1, -1, 1)
    return {tuple(point) for point in np.round(points, 2) + 0.0}


def same_points(one, two):
    return {tuple(point) for point in np.round(one, 2) + 0.0} == {
        tuple(point) for point in np.round(two, 2) + 0.0
    }


SAGITTAL, TRANSPOSED = ORIENTATIONS[7], (ORIENTATIONS[3], ORIENTATIONS[9])
PRONE = (-1.0, 0.0, 0.0, 0.0, -1.0, 0.0)


@pytest.mark.parametrize("orientation", [*ORIENTATIONS, PRONE])
def test_structures_have_the_labels_positions_or_the_series_is_refused(tmp_path, orientation):
    needs_writers()
    normal = np.cross(orientation[:3], orientation[3:])
    sagittal = np.argmax(np.abs(normal)) == 0
    folder = write_series(
        tmp_path / "ct", VOXELS[:, :7] if sagittal else VOXELS, orientation=orientation
    )
    with open_series(folder) as series, PendingFiles() as files:
        labels, expected = labelled(series)
        if orientation in TRANSPOSED:
            with pytest.raises(OptionError, match="would rotate"):
                check_series(series, TYPES)
            return
        check_series(series, TYPES)
        for kind in TYPES:
            target = tmp_path / f"{kind}.dcm"
            write_dicom(kind, labels, NAMES, series=series, target=target, files=files)
            assert not target.exists()
        files.commit()
    assert same_points(points_of_seg(tmp_path / "dicom_seg.dcm"), expected)
    points = points_of_rtstruct(tmp_path / "dicom_rtstruct.dcm")
    assert {tuple(point) for point in np.round(expected[[0, -1]], 2) + 0.0} <= points
    assert len(points) < len(expected)


def test_sagittal_slices_that_are_not_square_are_refused_for_dicom_seg(tmp_path):
    with open_series(write_series(tmp_path / "ct", VOXELS, orientation=SAGITTAL)) as series:
        check_series(series, ["dicom_rtstruct"])
        with pytest.raises(OptionError, match="needs square sagittal slices, not 8 x 7"):
            check_series(series, ["dicom_seg"])


def test_writers_print_nothing_and_do_not_change_the_root_logger(tmp_path, capfd, caplog):
    needs_writers()
    import logging

    before = list(logging.getLogger().handlers)
    folder = write_series(tmp_path / "ct", VOXELS)
    with open_series(folder) as series, PendingFiles() as files:
        for kind in TYPES:
            target = tmp_path / f"{kind}.dcm"
            write_dicom(kind, labelled(series)[0], NAMES, series=series, target=target, files=files)
        files.commit()
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger().handlers == before


def test_a_seg_in_a_folder_is_named_after_its_series_uid(tmp_path):
    needs_writers()
    folder, target = write_series(tmp_path / "ct", VOXELS), tmp_path / "out"
    target.mkdir()
    with open_series(folder) as series, PendingFiles() as files:
        labels, _ = labelled(series)
        write_dicom("dicom_seg", labels, NAMES, series=series, target=target, files=files)
        assert not list(target.glob("*.dcm"))
        files.commit()
    (written,) = target.iterdir()
    assert written.name == f"{pydicom.dcmread(written).SeriesInstanceUID}.dcm"


def test_empty_labels_and_a_header_without_a_date(tmp_path):
    needs_writers()
    folder = write_series(tmp_path / "ct", VOXELS)
    with open_series(folder) as series, PendingFiles() as files:
        nothing = np.zeros(series.image.shape, dtype=np.uint8)
        target = tmp_path / "s.dcm"
        with pytest.raises(OutputError, match="no structure was found"):
            write_dicom("dicom_seg", nothing, NAMES, series=series, target=target, files=files)
        write_dicom("dicom_rtstruct", nothing, NAMES, series=series, target=target, files=files)
        files.commit()
    assert len(pydicom.dcmread(target).StructureSetROISequence) == 0
    for path in folder.iterdir():
        header = pydicom.dcmread(path)
        del header.StudyDate
        header.save_as(path)
    with pytest.raises(OutputError, match="no attribute 'StudyDate'"):  # noqa: SIM117
        with open_series(folder) as series, PendingFiles() as files:
            labels, _ = labelled(series)
            target = tmp_path / "t.dcm"
            write_dicom("dicom_rtstruct", labels, NAMES, series=series, target=target, files=files)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ct", "s.dcm"]


def test_series_for_which_the_writers_would_fail_are_refused(tmp_path):
    with open_series(multi_frame(tmp_path / "ct.dcm")) as series:
        check_series(series, ())
        with pytest.raises(OptionError, match="can't be written for multi-frame files"):
            check_series(series, TYPES)
    twice = write_series(tmp_path / "twice", VOXELS)
    write_series(twice, VOXELS, name="again")
    with open_series(twice) as series:
        check_series(series, ("dicom_seg",))
        with pytest.raises(OptionError, match="12 files, but its image has shape 7 x 8 x 6"):
            check_series(series, ("dicom_rtstruct",))


def test_missing_packages_are_named_before_anything_is_read(tmp_path, monkeypatch):
    for kind, package in (("dicom_seg", "highdicom"), ("dicom_rtstruct", "rt_utils")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(OptionError, match=rf"'{kind}' needs the package {package} .*\[dicom\]"):
            check_packages([kind])
        with pytest.raises(OptionError, match=f"needs the package {package}"):
            totalfast.segment(tmp_path, tmp_path / "s.dcm", output_type=kind)


def options(*types, **keywords):
    return Options.from_keywords({"output_type": list(types), **keywords})


@pytest.mark.parametrize(
    ("given", "types"),
    [
        ("nifti", ("nifti",)),
        ("dicom", ("dicom_rtstruct",)),
        ("nifti,dicom_seg", ("nifti", "dicom_seg")),
        (["dicom_seg", "nifti,dicom"], ("dicom_seg", "nifti", "dicom_rtstruct")),
    ],
)
def test_output_types_are_parsed_like_upstreams_command(given, types):
    from totalsegmentator.bin.TotalSegmentator import normalize_output_types

    assert Options.from_keywords({"output_type": given}).output_type == types
    assert tuple(normalize_output_types([given] if isinstance(given, str) else given)) == types


def test_invalid_combinations_of_output_types():
    with pytest.raises(OptionError, match="save_lowres only supports nifti"):
        options("dicom_seg", save_lowres=True, fast=True)
    for wrong in ("png", [], ["nifti", "png"], ""):
        with pytest.raises(OptionError, match="Invalid output types"):
            Options.from_keywords({"output_type": wrong})


def test_files_have_upstreams_names(tmp_path):
    several = options("nifti", "dicom_rtstruct", "dicom_seg", task="body")
    assert several.multilabel
    for output, base in (
        ("x", "x"),
        ("x.nii.gz", "x"),
        ("x.nii", "x"),
        ("x.dcm", "x"),
        ("1.2.840.113.5", "1.2.840.113.5"),  # upstream's would be "1"
        ("1.2.840.113.6.nii.gz", "1.2.840.113.6"),
    ):
        names = [path.name for path in output_files(tmp_path / output, several).values()]
        assert names == [f"{base}.nii.gz", f"{base}_rtstruct.dcm", f"{base}_seg.dcm"]
    files = output_files(tmp_path, several)
    assert files["dicom_seg"] == tmp_path / "body_segmentation_seg.dcm"
    for name in ("x", "x.dcm"):
        files = output_files(tmp_path / name, options("dicom"))
        assert files == {"dicom_rtstruct": tmp_path / "x.dcm"}
    assert output_files(tmp_path / "x", options("dicom_seg")) == {"dicom_seg": tmp_path / "x"}


def test_output_paths_that_exist_already(tmp_path):
    (tmp_path / "s.dcm").mkdir()
    plan(tmp_path / "s.dcm", options("dicom_seg"))
    for types in (["dicom_rtstruct"], ["nifti"]):
        with pytest.raises(OutputError, match=r"s\.dcm is a directory"):
            plan(tmp_path / "s.dcm", options(*types, ml=True))
    (tmp_path / "x_seg.dcm").mkdir()
    plan(tmp_path / "x", options("nifti", "dicom_rtstruct"))


def plan(output, chosen):
    return OutputPlan.of(output, chosen.resolved_task(), chosen)


def test_labels_that_can_not_become_dicom_get_a_free_name_as_nifti(tmp_path):
    assert nifti_instead(tmp_path / "s.dcm").name == "s.dcm.nii.gz"
    (tmp_path / "s.dcm.nii.gz").touch()
    assert nifti_instead(tmp_path / "s.dcm").name == "s.dcm-1.nii.gz"
    assert nifti_instead(tmp_path) == tmp_path / "segmentation.nii.gz"
