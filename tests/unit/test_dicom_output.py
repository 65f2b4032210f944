"""DICOM output: structures have the labels' positions, or the series is refused."""

from __future__ import annotations

import sys

import nibabel as nib
import numpy as np
import pydicom
import pytest

import totalfast
from tests.dicom_series import (
    AXIAL,
    ENHANCED_CT,
    ENHANCED_MR,
    write_multi_frame,
    write_series,
)
from totalfast import OptionError, OutputError
from totalfast.files.dicom.read import open_series
from totalfast.files.dicom.write import check_packages, check_series, write_dicom
from totalfast.files.targets import OutputPlan, nifti_instead, output_files
from totalfast.options import Options
from totalfast.system.pending_files import PendingFiles

from .test_dicom import ORIENTATIONS, VOXELS

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
    """Points (n, 3) of the contours of an RT structure set's only structure, RAS+."""
    structures = pydicom.dcmread(path)
    assert [item.ROIName for item in structures.StructureSetROISequence] == ["spleen"]
    contours = structures.ROIContourSequence[0].ContourSequence
    points = [np.reshape(contour.ContourData, (-1, 3)) for contour in contours]
    return np.concatenate(points).astype(float) * (-1, -1, 1)


def assert_same_points(one, two):
    assert len(one) == len(two)
    distances = np.linalg.norm(one[:, None] - two, axis=2)
    assert max(distances.min(axis=0).max(), distances.min(axis=1).max()) < 0.01


PRONE = (-1.0, 0.0, 0.0, 0.0, -1.0, 0.0)
FEET_FIRST = (-1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
DECUBITUS = (0.0, 1.0, 0.0, -1.0, 0.0, 0.0)
TILTED = (1.0, 0.0, 0.0, 0.0, 0.9396926, -0.3420201)
TWICE_OBLIQUE = (0.7071068, 0.5, -0.5, 0.0, 0.7071068, 0.7071068)


@pytest.mark.parametrize(
    "orientation", [*ORIENTATIONS, PRONE, FEET_FIRST, DECUBITUS, TILTED, TWICE_OBLIQUE]
)
@pytest.mark.parametrize("case", ["ordered", "shuffled", "scout first", "sheared"])
def test_structures_have_the_labels_positions(tmp_path, orientation, case):
    needs_writers()
    step = np.cross(orientation[:3], orientation[3:]) * 3.0
    if case == "sheared":
        step = step + 0.1 * np.asarray(orientation[3:])
    folder = write_series(
        tmp_path / "ct", VOXELS, orientation=orientation, spacing_mm=(3.0, 2.0, 1.5), step=step
    )
    if case == "shuffled":
        for number, path in enumerate(sorted(folder.iterdir())):
            path.rename(folder / f"{number * 5 % 6}.dcm")
    if case == "scout first":
        scout = np.roll(orientation, 1)
        write_series(folder, VOXELS[:1], orientation=tuple(scout), name="a_scout")
    with open_series(folder) as series, PendingFiles() as files:
        labels, expected = labelled(series)
        check_series(series, TYPES)
        for kind in TYPES:
            target = tmp_path / f"{kind}.dcm"
            write_dicom(kind, labels, NAMES, series=series, target=target, files=files)
            assert not target.exists()
        files.commit()
    assert_same_points(points_of_seg(tmp_path / "dicom_seg.dcm"), expected)
    points = points_of_rtstruct(tmp_path / "dicom_rtstruct.dcm")
    distances = np.linalg.norm(points[:, None] - expected, axis=2)
    assert distances.min(axis=1).max() < 0.01  # every point is the place of a labelled voxel
    assert distances[:, [0, -1]].min(axis=0).max() < 0.01  # corners of the box are points


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
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ct", "s.dcm"]


def change(folder, **attributes):
    """Set attributes of all files of a series; None deletes one."""
    with pydicom.config.disable_value_validation():
        for number, path in enumerate(sorted(folder.iterdir())):
            header = pydicom.dcmread(path)
            for keyword, value in attributes.items():
                if value is None:
                    delattr(header, keyword)
                else:
                    setattr(header, keyword, value(number) if callable(value) else value)
            header.save_as(path)


def written(folder, tmp_path):
    """Both results of one box."""
    with open_series(folder) as series, PendingFiles() as files:
        check_series(series, TYPES)
        for kind in TYPES:
            target = tmp_path / f"{kind}.dcm"
            write_dicom(kind, labelled(series)[0], NAMES, series=series, target=target, files=files)
        files.commit()
    return [pydicom.dcmread(tmp_path / f"{kind}.dcm") for kind in TYPES]


@pytest.mark.parametrize(
    ("attributes", "repaired"),
    [
        ({"PatientSex": "U"}, "PatientSex"),
        ({"PatientSex": "f"}, "PatientSex"),
        ({"PatientBirthDate": "0000"}, "PatientBirthDate"),
        ({"PatientBirthDate": "1.1.1970"}, "PatientBirthDate"),
        ({"StudyDate": "19000000"}, "StudyDate"),
        ({"StudyDate": None}, None),
        ({"StudyTime": "noon"}, "StudyTime"),
        ({"PatientAge": "old"}, "PatientAge"),
        ({"FrameOfReferenceUID": None}, "FrameOfReferenceUID"),
        ({"FrameOfReferenceUID": ""}, "FrameOfReferenceUID"),
        ({"SliceThickness": None}, "SliceThickness"),
        ({"StudyID": None, "PatientID": None, "PatientName": None}, None),
        ({"StudyInstanceUID": "anonymous"}, "StudyInstanceUID"),
        ({"SeriesInstanceUID": None}, "SeriesInstanceUID"),
    ],
)
def test_what_an_anonymiser_broke_is_put_right_in_the_results_only(
    tmp_path, attributes, repaired, caplog
):
    needs_writers()
    folder = write_series(tmp_path / "ct", VOXELS)
    change(folder, **attributes)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    results = written(folder, tmp_path)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert (repaired or "") in caplog.text
    uids = set()
    for result in results:
        assert result.PatientSex in ("", "F", None)
        assert result.StudyDate in ("", "20200101", None)
        uids.add(
            result.FrameOfReferenceUID
            if "FrameOfReferenceUID" in result
            else result.ReferencedFrameOfReferenceSequence[0].FrameOfReferenceUID
        )
    assert len(uids) == 1
    assert uids.pop()


@pytest.mark.parametrize("keyword", ["StudyInstanceUID", "PatientID", "FrameOfReferenceUID"])
def test_slices_of_different_studies_are_refused_before_the_network_runs(tmp_path, keyword):
    folder = write_series(tmp_path / "ct", VOXELS)
    change(folder, **{keyword: lambda number: f"1.2.{number % 2}"})
    with (
        open_series(folder) as series,
        pytest.raises(OutputError, match=f"different values of {keyword}"),
    ):
        check_series(series, TYPES)


@pytest.mark.parametrize(
    ("characters", "name"),
    [
        ("ISO_IR 100", "Müller^Jörg"),
        ("ISO_IR 101", "Dvořák^Žofie"),
        ("ISO_IR 127", "قباني^لنزار"),
        ("ISO_IR 144", "Люкceмбypг"),
        ("ISO_IR 192", "Wang^XiaoDong=王^小东"),
        (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎=やまだ^たろう"),
        (["", "ISO 2022 IR 149"], "Hong^Gildong=洪^吉洞=홍^길동"),
        (["ISO 2022 IR 6", "ISO 2022 IR 100"], "Buc^Jérôme"),
    ],
)
def test_names_of_all_character_sets_are_in_both_results(tmp_path, characters, name):
    needs_writers()
    folder = write_series(tmp_path / "ct", VOXELS)
    change(folder, SpecificCharacterSet=characters, PatientName=name)
    for result in written(folder, tmp_path):
        result.decode()
        assert str(result.PatientName) == name


def slices_of(points, step):
    """Numbers of the slices in which points (n, 3), RAS+, lie; slices are 3 mm apart."""
    return {float(number) for number in (points * (-1, -1, 1) - (-30.0, -40.0, 50.0)) @ step / 9}


def references(dataset, keyword):
    """(class, instance, frame) of all items of the sequences with this keyword."""
    return [
        (
            item.ReferencedSOPClassUID,
            item.ReferencedSOPInstanceUID,
            item.get("ReferencedFrameNumber"),
        )
        for element in dataset.iterall()
        if element.keyword == keyword
        for item in element.value
    ]


@pytest.mark.parametrize("orientation", [AXIAL, *ORIENTATIONS[3:5], DECUBITUS, TWICE_OBLIQUE])
@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_results_of_a_multi_frame_file_have_its_positions_and_name_its_frames(
    tmp_path, orientation, modality
):
    needs_writers()
    order = [2, 0, 1, 5, 4, 3]
    kind = ENHANCED_CT if modality == "CT" else ENHANCED_MR
    path = write_multi_frame(
        tmp_path / "many.dcm",
        VOXELS,
        orientation=orientation,
        spacing_mm=(3.0, 2.0, 1.5),
        order=order,
        Modality=modality,
        SOPClassUID=kind,
        SOPInstanceUID="1.2.3.4.5",
    )
    with open_series(path) as series:
        _, expected = labelled(series)
    structures, seg = written(path, tmp_path)
    assert_same_points(points_of_seg(tmp_path / "dicom_seg.dcm"), expected)
    distances = np.linalg.norm(
        points_of_rtstruct(tmp_path / "dicom_rtstruct.dcm")[:, None] - expected, axis=2
    )
    assert distances.min(axis=1).max() < 0.01
    assert distances[:, [0, -1]].min(axis=0).max() < 0.01

    assert references(seg, "ReferencedInstanceSequence") == [(kind, "1.2.3.4.5", None)]
    step = np.cross(orientation[:3], orientation[3:]) * 3.0
    for group in seg.PerFrameFunctionalGroupsSequence:
        ((_, instance, frame),) = references(group, "SourceImageSequence")
        place = np.asarray(group.PlanePositionSequence[0].ImagePositionPatient, dtype=float)
        slice_ = round((place - (-30.0, -40.0, 50.0)) @ step / 9)
        assert (instance, order[frame - 1]) == ("1.2.3.4.5", slice_)
    import highdicom

    by_frame = highdicom.seg.segread(tmp_path / "dicom_seg.dcm").get_pixels_by_source_frame(
        "1.2.3.4.5", range(1, 7), combine_segments=True, assert_missing_frames_are_empty=True
    )
    with_voxels = {order[frame] for frame in range(6) if by_frame[frame].any()}
    assert with_voxels == {round(slice_) for slice_ in slices_of(expected, step)}

    frame_of_reference = structures.ReferencedFrameOfReferenceSequence[0]
    named = references(frame_of_reference, "ContourImageSequence")
    assert sorted(named) == [(kind, "1.2.3.4.5", number) for number in range(1, 7)]
    for contour in structures.ROIContourSequence[0].ContourSequence:
        ((_, _, frame),) = references(contour, "ContourImageSequence")
        place = np.reshape(np.asarray(contour.ContourData, dtype=float), (-1, 3))[0]
        assert order[frame - 1] == round((place - (-30.0, -40.0, 50.0)) @ step / 9)


def test_enhanced_files_of_one_frame_each_are_named_in_results(tmp_path, caplog):
    needs_writers()
    folder = tmp_path / "ct"
    for number in range(6):
        write_multi_frame(
            folder / f"{number}.dcm",
            VOXELS[number : number + 1],
            origin_mm=(-30.0, -40.0, 50.0 + 3.0 * number),
            SOPInstanceUID=f"1.2.9.{number}",
        )
    with open_series(folder) as series:
        _, expected = labelled(series)
    _, seg = written(folder, tmp_path)
    assert_same_points(points_of_seg(tmp_path / "dicom_seg.dcm"), expected)
    for group in seg.PerFrameFunctionalGroupsSequence:
        number = round((float(group.PlanePositionSequence[0].ImagePositionPatient[2]) - 50) / 3)
        (reference,) = references(group, "SourceImageSequence")
        assert reference == (ENHANCED_CT, f"1.2.9.{number}", 1)
    assert "completed or left empty" not in caplog.text


def test_duplicates_are_left_out(tmp_path):
    needs_writers()
    twice = write_series(tmp_path / "twice", VOXELS)
    write_series(twice, VOXELS, name="again")
    structures, seg = written(twice, tmp_path)
    frame = structures.ReferencedFrameOfReferenceSequence[0]
    study = frame.RTReferencedStudySequence[0]
    assert len(study.RTReferencedSeriesSequence[0].ContourImageSequence) == 6
    assert seg.SegmentSequence[0].SegmentLabel == "spleen"


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
