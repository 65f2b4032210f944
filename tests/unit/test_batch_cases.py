"""Cases of a batch: what is found in folders, patterns and lists, what is left out, and names."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import shutil
import sys
import unicodedata
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.uid import DeflatedExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless

from tests.dicom_series import in_syntax, new_file, write_multi_frame, write_series
from totalfast import InputError, OptionError
from totalfast.batch.finding import series_cases
from totalfast.batch.finding.cases import Case, find_cases
from totalfast.batch.finding.names import LONGEST, Wish, folded_name, safe_name, unique_names
from totalfast.files.dicom import header, series
from totalfast.files.dicom.find import DicomFile, errors_of_damage, values_unchecked
from totalfast.files.dicom.header import NotASlice, read_slices
from totalfast.files.dicom.read import SeriesSource, open_series
from totalfast.files.dicom.survey import Survey, glance
from totalfast.files.targets import FOLDER_MARKER

VOXELS = np.random.default_rng(0).integers(-1000, 1000, (6, 4, 5))
"""(slice, row, column)."""


def write_nifti(path, shape=(4, 5, 6)):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.zeros(shape, np.int16), np.eye(4)), path)
    return path


def sources(found):
    return {case.name: (case.source, case.series) for case in found.cases}


def left_out(found):
    return {each.reason: each.count for each in found.left_out}


def series_in(folder, uid, voxels=VOXELS, **attributes):
    return write_series(folder, voxels, SeriesInstanceUID=uid, **attributes)


# Folders


def test_folder_holds_image_files_of_all_formats_and_series(tmp_path):
    write_nifti(tmp_path / "a.nii.gz")
    write_nifti(tmp_path / "sub" / "B.NII")
    nib.save(nib.Nifti1Pair(np.zeros((4, 5, 6), np.int16), np.eye(4)), tmp_path / "pair.hdr")
    assert (tmp_path / "pair.img").exists()
    image = sitk.GetImageFromArray(np.zeros((6, 5, 4), np.int16))
    for name in ("c.nrrd", "d.mha", "e.mhd"):
        sitk.WriteImage(image, str(tmp_path / name))
    series_in(tmp_path / "patient", "1.2.5")
    (tmp_path / "notes.txt").write_text("no scan")
    found = find_cases(tmp_path)
    assert sources(found) == {
        "a": (tmp_path / "a.nii.gz", None),
        "B": (tmp_path / "sub" / "B.NII", None),
        "pair": (tmp_path / "pair.hdr", None),
        "c": (tmp_path / "c.nrrd", None),
        "d": (tmp_path / "d.mha", None),
        "e": (tmp_path / "e.mhd", None),
        "1.2.5": (tmp_path / "patient", "1.2.5"),
    }
    assert left_out(found) == {"not DICOM": 2}  # the notes and e.raw


def test_each_series_of_a_tree_has_the_smallest_folder_and_can_be_read(tmp_path):
    series_in(tmp_path / "p1" / "study" / "thick", "1.2.1")
    series_in(tmp_path / "p1" / "study" / "thin", "1.2.2")
    both = tmp_path / "p2"
    series_in(both, "1.2.3", name="first", Modality="MR")
    series_in(both, "1.2.4", VOXELS[:5], name="second")
    whole = series_in(tmp_path / "p3", "1.2.6")
    (whole / "second half").mkdir()
    for number in (3, 4, 5):
        (whole / f"slice{number:03d}.dcm").rename(whole / "second half" / f"{number}")
    one = write_multi_frame(tmp_path / "p4" / "one.dcm", VOXELS, SeriesInstanceUID="1.2.7")
    found = find_cases(tmp_path)
    assert sources(found) == {
        "1.2.1": (tmp_path / "p1" / "study" / "thick", "1.2.1"),
        "1.2.2": (tmp_path / "p1" / "study" / "thin", "1.2.2"),
        "1.2.3": (both, "1.2.3"),
        "1.2.4": (both, "1.2.4"),
        "1.2.6": (whole, "1.2.6"),
        "1.2.7": (one, "1.2.7"),
    }
    for case in found.cases:
        with open_series(case.source, wanted=case.series) as series:
            assert len(series.slices) == (5 if case.name == "1.2.4" else 6)


def test_folder_with_many_series_is_told_where_their_files_are_not_listed(
    tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(series_cases, "MANY_HEADERS", 20)
    series_in(tmp_path / "own", "1.2.1")
    series_in(tmp_path / "listed", "1.2.2", name="a")
    series_in(tmp_path / "listed", "1.2.3", name="b")
    find_cases(tmp_path)
    assert not caplog.text
    for name in ("a", "b"):
        folder = series_in(tmp_path / "shared", f"1.2.4.{name == 'a':d}", name=name)
        (folder / name).mkdir()
        (folder / f"{name}000.dcm").rename(folder / name / "1")
    find_cases(tmp_path)
    assert "shared holds 2 series in 12 files, and each case reads" in caplog.text


def test_the_files_of_several_series_in_one_folder_are_listed_and_no_others_are_opened(
    tmp_path, monkeypatch
):
    shared = tmp_path / "shared"
    for number in range(3):
        series_in(shared, f"1.2.{number}", VOXELS + number, name=f"s{number}-")
    series_in(tmp_path / "own", "1.3")
    found = find_cases(tmp_path).cases
    assert [len(case.files or ()) for case in found] == [6, 6, 6, 0]
    opened = []
    read = header.read_slices
    monkeypatch.setattr(series, "read_slices", lambda file: opened.append(file) or read(file))
    for number, case in enumerate(found[:3]):
        with SeriesSource(case.source, wanted=case.series, only=case.files) as source:
            listed = np.asanyarray(source.series().image.dataobj)
        with open_series(case.source, wanted=case.series) as whole:
            assert np.array_equal(listed, np.asanyarray(whole.image.dataobj))
        assert len(opened) == (number + 1) * (6 + 18)


def test_parts_in_folders_side_by_side_are_one_series_and_copies_are_two(tmp_path):
    whole = series_in(tmp_path / "p" / "a", "1.2.6")
    (tmp_path / "p" / "b").mkdir()
    for number in (3, 4, 5):
        name = f"slice{number:03d}.dcm"
        (whole / name).rename(tmp_path / "p" / "b" / name)
    assert sources(find_cases(tmp_path)) == {"1.2.6": (tmp_path / "p", "1.2.6")}
    shutil.copytree(series_in(tmp_path / "x", "1.2.8"), tmp_path / "y")
    found = sources(find_cases(tmp_path))
    assert found == {
        "1.2.6": (tmp_path / "p", "1.2.6"),
        "1.2.8": (tmp_path / "x", "1.2.8"),
        "1.2.8_2": (tmp_path / "y", "1.2.8"),
    }


def test_what_is_no_scan_is_left_out_and_counted(tmp_path):
    scan = series_in(tmp_path / "p" / "ct", "1.2.1")
    series_in(tmp_path / "p" / "scout", "1.2.2", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    series_in(tmp_path / "p" / "few", "1.2.3", VOXELS[:3])
    coronal = (1.0, 0.0, 0.0, 0.0, 0.0, -1.0)
    mpr = ["DERIVED", "SECONDARY", "REFORMATTED"]
    series_in(tmp_path / "p" / "mpr", "1.2.4", orientation=coronal, ImageType=mpr)
    for modality in ("SEG", "RTSTRUCT", "SR", "PR", "KO"):
        new_file(Modality=modality).save_as(scan / f"{modality}.dcm", enforce_file_format=True)
    (scan / "empty.dcm").touch()
    (scan / "cut.dcm").write_bytes((scan / "slice000.dcm").read_bytes()[:-20])
    (scan / "._slice000.dcm").write_bytes(b"\x00\x05\x16\x07")
    (tmp_path / ".hidden").mkdir()
    write_nifti(tmp_path / ".hidden" / "a.nii")
    write_nifti(tmp_path / "__MACOSX" / "a.nii")
    write_nifti(tmp_path / ".totalfast-abc" / "new" / "a.nii.gz")
    sitk.WriteImage(
        sitk.GetImageFromArray(np.zeros((6, 5, 4), np.uint8)), str(tmp_path / "s.seg.nrrd")
    )
    found = find_cases(tmp_path)
    assert sources(found) == {"1.2.1": (scan, "1.2.1")}
    assert left_out(found) == {
        "scout (localizer)": 6,
        "series with fewer than 4 slices": 1,
        "series that is computed from another one of its study": 1,
        **{f"no scan, but {kind}": 1 for kind in ("SEG", "RTSTRUCT", "SR", "PR", "KO")},
        "empty (0 bytes)": 1,
        "cut off within the pixels": 1,
        "hidden": 4,
        "segmentation of 3D Slicer": 1,
    }
    assert found.left_out[0].examples[0] == tmp_path / "p" / "scout" / "slice000.dcm"
    assert len(found.left_out[0].examples) == 3


def test_derived_series_are_kept_where_the_study_has_no_original(tmp_path):
    series_in(tmp_path / "p1", "1.2.1", ImageType=["DERIVED", "SECONDARY"], StudyInstanceUID="1.1")
    series_in(
        tmp_path / "p2" / "a", "1.2.2", ImageType=["ORIGINAL", "PRIMARY"], StudyInstanceUID="1.2"
    )
    series_in(
        tmp_path / "p2" / "b", "1.2.3", ImageType=["DERIVED", "PRIMARY"], StudyInstanceUID="1.2"
    )
    assert set(sources(find_cases(tmp_path))) == {"1.2.1", "1.2.2", "1.2.3"}


def test_results_are_not_found_again(tmp_path):
    scan = write_nifti(tmp_path / "scan.nii.gz")
    masks = tmp_path / "scan_masks"
    for name in ("liver", "spleen", "stomach"):
        write_nifti(masks / f"{name}.nii.gz")
    assert left_out(find_cases(tmp_path)) == {
        "folder of masks, named like TotalSegmentator's classes": 1
    }
    write_nifti(masks / "deeper" / "scan2.nii.gz")
    (masks / FOLDER_MARKER).write_text("{}")
    write_nifti(tmp_path / "labels.nii.gz")
    (tmp_path / "labels.nii.gz.complete.json").write_text("{}")
    batch = tmp_path / "out"
    write_nifti(batch / "case" / "segmentation.nii.gz")
    (batch / "manifest-1-of-2.jsonl").write_text(json.dumps({"manifest": 1}, separators=(",", ":")))
    write_nifti(tmp_path / "later" / "x.nii.gz")
    found = find_cases(tmp_path, skip=tmp_path / "later")
    assert sources(found) == {"scan": (scan, None)}
    assert left_out(found) == {"result of totalfast": 4}
    with pytest.raises(InputError, match=r"No scans were found in .*out\. .*1 x result"):
        find_cases(batch)
    pattern = str(tmp_path / "**" / "*.nii.gz")
    assert sources(find_cases(pattern, skip=tmp_path / "later")) == {"scan": (scan, None)}


def test_two_images_with_names_of_classes_are_scans(tmp_path):
    write_nifti(tmp_path / "liver.nii.gz")
    write_nifti(tmp_path / "spleen.nii.gz")
    assert set(sources(find_cases(tmp_path))) == {"liver", "spleen"}


def test_slices_without_uids_are_one_series_if_they_are_alone(tmp_path):
    blank = series_in(tmp_path / "p1", "")
    each = tmp_path / "p2"
    for number in range(6):
        series_in(
            each, f"1.2.{number}", VOXELS[:1], origin_mm=(0, 0, 3.0 * number), name=f"{number}"
        )
    mixed = series_in(tmp_path / "p3", "", name="blank")
    series_in(mixed, "1.2.9", name="other")
    found = find_cases(tmp_path)
    assert sources(found) == {"p1": (blank, None), "p2": (each, None), "1.2.9": (mixed, "1.2.9")}
    assert left_out(found) == {"series without a SeriesInstanceUID, beside other series": 1}
    for case in found.cases:
        with open_series(case.source, wanted=case.series) as series:
            assert len(series.slices) == 6


def test_zip_files_are_sources(tmp_path):
    series_in(tmp_path / "in" / "a", "1.2.1")
    series_in(tmp_path / "in" / "b", "1.2.2")
    write_nifti(tmp_path / "in" / "__MACOSX" / "._x.dcm.nii")
    archive = Path(shutil.make_archive(str(tmp_path / "scans"), "zip", tmp_path / "in"))
    shutil.rmtree(tmp_path / "in")
    (tmp_path / "broken.zip").write_bytes(archive.read_bytes()[:-10])
    found = find_cases(tmp_path)
    assert sources(found) == {"1.2.1": (archive, "1.2.1"), "1.2.2": (archive, "1.2.2")}
    assert sources(find_cases(archive)) == sources(found)
    for case in found.cases:
        with open_series(case.source, wanted=case.series) as series:
            assert len(series.slices) == 6


def test_links_are_followed_once(tmp_path):
    scan = write_nifti(tmp_path / "a" / "scan.nii")
    (tmp_path / "a" / "loop").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "a" / "gone").symlink_to(tmp_path / "nothing")
    found = find_cases(tmp_path)
    assert sources(found) == {"scan": (scan, None)}
    assert left_out(found) == {"link to a missing file": 1}


@pytest.mark.skipif(sys.platform == "win32", reason="no such files")
def test_special_files_are_not_opened(tmp_path):
    write_nifti(tmp_path / "scan.nii")
    os.mkfifo(tmp_path / "pipe")
    assert left_out(find_cases(tmp_path)) == {"no regular file": 1}


def test_missing_and_empty_inputs_are_named(tmp_path):
    with pytest.raises(InputError, match=r"gone does not exist"):
        find_cases(tmp_path / "gone")
    with pytest.raises(InputError, match=r"No scans were found in .* there are no files"):
        find_cases(tmp_path)
    with pytest.raises(InputError, match=r"an empty list of inputs"):
        find_cases([])
    (tmp_path / "text.txt").write_text("no scan")
    with pytest.raises(InputError, match=r"Left out: 1 x not DICOM \(for example .*text\.txt\)"):
        find_cases(tmp_path)
    with pytest.raises(InputError, match=r"1 x pattern without a match"):
        find_cases(str(tmp_path / "*.nii"))


def test_folder_that_cannot_be_read_is_an_error_and_one_below_is_counted(tmp_path, monkeypatch):
    write_nifti(tmp_path / "scan.nii")
    (tmp_path / "closed").mkdir()
    real = os.scandir

    def refusing(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", refusing)
    assert left_out(find_cases(tmp_path)) == {"folder that can't be read": 1}
    with pytest.raises(InputError, match="closed can't be searched: Permission denied"):
        find_cases(tmp_path / "closed")


def test_no_message_holds_values_of_headers(tmp_path):
    secret = {"PatientName": "Secret^Name", "PatientID": "SECRET", "SeriesDescription": "SECRET"}
    series_in(tmp_path / "few", "1.2.777", VOXELS[:2], AccessionNumber="SECRET", **secret)
    with pytest.raises(InputError) as caught:
        find_cases(tmp_path)
    assert not any(word in str(caught.value).upper() for word in ("SECRET", "1.2.777"))


def test_every_file_is_told(tmp_path):
    series_in(tmp_path / "ct", "1.2.1")
    write_nifti(tmp_path / "scan.nii")
    seen = []
    find_cases(tmp_path, on_file=seen.append)
    assert sorted(seen) == sorted(path for path in tmp_path.rglob("*") if path.is_file())


# Patterns and single files


def test_patterns_find_files_and_folders_once(tmp_path):
    first, second = (
        write_nifti(tmp_path / "p1" / "ct.nii.gz"),
        write_nifti(tmp_path / "p2" / "ct.nii.gz"),
    )
    series = series_in(tmp_path / "p2" / "dicom", "1.2.1")
    assert sources(find_cases(str(tmp_path / "*" / "*.nii.gz"))) == {
        "p1_ct": (first, None),
        "p2_ct": (second, None),
    }
    assert sources(find_cases(str(tmp_path / "**" / "dicom"))) == {"1.2.1": (series, "1.2.1")}
    assert sources(find_cases(str(series / "*.dcm"))) == {"1.2.1": (series, "1.2.1")}
    everything = sources(find_cases([str(tmp_path / "**"), tmp_path, str(first)]))
    assert everything == sources(find_cases(tmp_path))


def test_name_with_brackets_is_a_file_first(tmp_path):
    scan = write_nifti(tmp_path / "scan[1].nii")
    assert sources(find_cases(str(scan))) == {"scan_1_": (scan, None)}


def test_single_files(tmp_path):
    scan = write_nifti(tmp_path / "scan.nii.gz")
    assert sources(find_cases(scan)) == {"scan": (scan, None)}
    frames = write_multi_frame(tmp_path / "frames", VOXELS, SeriesInstanceUID="1.2.1")
    assert sources(find_cases(frames)) == {"1.2.1": (frames, "1.2.1")}
    slices = series_in(tmp_path / "ct", "1.2.2")
    with pytest.raises(InputError, match="1 x series with fewer than 4 slices"):
        find_cases(slices / "slice000.dcm")


# Lists


def listing(tmp_path, text, name="list.csv", encoding="utf-8"):
    path = tmp_path / name
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize(
    ("text", "name", "encoding"),
    [
        ("case,path\nfirst,a.nii\nü second,sub/b.nii\n", "list.csv", "utf-8"),
        ("path;Name;age\r\na.nii;first;\r\n\r\nsub/b.nii;ü second;70\r\n", "l.CSV", "utf-8-sig"),
        ("Image\tCase\na.nii\tfirst\nsub/b.nii\tü second\n", "list.tsv", "utf-8-sig"),
        ('file,case\n"a.nii",first\n"sub/b.nii","ü second"\n', "list.csv", "utf-8"),
    ],
)
def test_list_names_cases(tmp_path, text, name, encoding):
    write_nifti(tmp_path / "a.nii")
    found = find_cases(listing(tmp_path, text, name, encoding))
    assert sources(found) == {
        "first": (tmp_path / "a.nii", None),
        "ü_second": (tmp_path / "sub" / "b.nii", None),  # missing: the case fails, by its name
    }


def test_list_without_names_and_with_series(tmp_path):
    ct = series_in(tmp_path / "ct", "1.2.1")
    found = find_cases(listing(tmp_path, f"path,series\n{ct},1.2.1\nct,\n"))
    assert sorted((case.name, case.series) for case in found.cases) == [
        ("ct", "1.2.1"),
        ("ct_2", None),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("case,where\na,b\n", r"columns 'case', 'where'; .* 'path', 'image' or 'file'"),
        ("", "list.csv is empty"),
        ("case,path\na,b.nii\nc,\n", "line 3 of .*list.csv has no path"),
        ("case,path\na,b.nii,c\n", "line 2 of .*list.csv has 3 values, but there are 2 columns"),
        ("case,path,image\na,b.nii,c\n", "2 columns for the same values: 'path', 'image'"),
        ("case,path\nA,a.nii\na,b.nii\n", "line 3 of .* has the name 'a', .* line 2 of"),
        ('case,path\n"a,b.nii\n', "can't be read as a list of cases"),
        ("case,path\n", "No scans were found in .*list.csv"),
    ],
)
def test_errors_of_lists_name_the_line(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        find_cases(listing(tmp_path, text))


def test_list_that_is_not_utf8(tmp_path):
    with pytest.raises(InputError, match="it is not UTF-8"):
        find_cases(listing(tmp_path, "case,path\nä,b.nii\n", encoding="latin-1"))


class Stdin:
    def __init__(self, content):
        self.buffer = io.BytesIO(content)


@pytest.mark.parametrize(
    "content", [b"a.nii\nfirst\tsub/b.nii\r\n\n", b"a.nii\0first\tsub/b.nii\0"]
)
def test_lines_of_standard_input(monkeypatch, content):
    monkeypatch.setattr(sys, "stdin", Stdin(content))
    assert sources(find_cases("-")) == {
        "a": (Path("a.nii"), None),
        "first": (Path("sub/b.nii"), None),
    }


def test_null_separated_paths_may_hold_line_ends(monkeypatch):
    monkeypatch.setattr(sys, "stdin", Stdin(b"a\nb.nii\0c.nii\0"))
    assert {case.source for case in find_cases("-").cases} == {Path("a\nb.nii"), Path("c.nii")}


def test_empty_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", Stdin(b"\n"))
    with pytest.raises(InputError, match="No scans were found in the standard input"):
        find_cases("-")


def test_name_in_a_list_replaces_the_one_that_is_found(tmp_path):
    write_nifti(tmp_path / "a.nii")
    write_nifti(tmp_path / "b.nii")
    csv = listing(tmp_path, "case,path\nb,a.nii\n")
    assert sources(find_cases([tmp_path, csv])) == {
        "b": (tmp_path / "a.nii", None),
        f"{tmp_path.name}_b": (tmp_path / "b.nii", None),
    }


# Filters


def test_filters(tmp_path):
    series_in(tmp_path / "a", "1.2.1", Modality="CT", SeriesDescription="Abdomen 1.0 B30f")
    series_in(tmp_path / "b", "1.2.2", VOXELS[:4], Modality="MR", SeriesDescription="T1 vibe")
    write_nifti(tmp_path / "deep.nii.gz", (4, 5, 8))
    write_nifti(tmp_path / "flat.nii", (4, 5, 3))
    write_nifti(tmp_path / "along_fourth.nii", (4, 5, 1, 9))
    (tmp_path / "broken.nii.gz").write_bytes(gzip.compress(b"no header"))
    images = {"deep", "flat", "along_fourth", "broken"}

    def names(**filters):
        found = find_cases(tmp_path, **filters)
        return set(sources(found)), left_out(found)

    assert names(modality="ct") == (
        images | {"1.2.1"},
        {"series of another modality than CT": 1},
    )
    assert names(series_description="t1|T2")[0] == images | {"1.2.2"}
    assert names(series_description="b30F$")[0] == images | {"1.2.1"}
    assert names(min_slices=5) == (
        images - {"flat"} | {"1.2.1"},
        {"image file with fewer than 5 slices": 1, "series with fewer than 5 slices": 1},
    )
    with pytest.raises(OptionError, match="is no regular expression"):
        names(series_description="(")
    with pytest.raises(OptionError, match="min_slices is 0"):
        names(min_slices=0)
    with pytest.raises(OptionError, match="names is 'patient'"):
        names(names="patient")


def test_third_axis_of_metaimage(tmp_path):
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((9, 5, 4), np.int16)), str(tmp_path / "a.mha"))
    assert len(find_cases(tmp_path, min_slices=9).cases) == 1
    with pytest.raises(InputError, match="image file with fewer than 10 slices"):
        find_cases(tmp_path, min_slices=10)


def test_filters_choose_a_series_of_a_listed_folder(tmp_path):
    both = tmp_path / "both"
    series_in(both, "1.2.1", Modality="CT", name="ct")
    series_in(both, "1.2.2", Modality="MR", name="mr")
    csv = listing(tmp_path, "case,path\na,both\n")
    assert sources(find_cases(csv)) == {"a": (both, None)}
    assert sources(find_cases(csv, modality="MR")) == {"a": (both, "1.2.2")}
    with pytest.raises(InputError, match="series of another modality than PT"):
        find_cases(csv, modality="PT")


# Names


def test_names_by_accession_number(tmp_path):
    for number, (uid, accession) in enumerate([("1.2.1", "A1"), ("1.2.2", "A1"), ("1.2.3", "B/2")]):
        series_in(tmp_path / uid, uid, AccessionNumber=accession, SeriesNumber=number + 1)
    series_in(tmp_path / "without", "1.2.4")
    listed = listing(tmp_path, "path\n1.2.3\n")
    assert set(sources(find_cases(tmp_path, names="accession"))) == {"A1_1", "A1_2", "B_2", "1.2.4"}
    assert set(sources(find_cases(tmp_path, names="uid"))) == {"1.2.1", "1.2.2", "1.2.3", "1.2.4"}
    assert set(sources(find_cases(listed, names="accession"))) == {"B_2"}


def test_names_of_files_with_one_name(tmp_path):
    for name in ("p1/ct.nii.gz", "p1/ct.nrrd", "p2/ct.nii.gz", "x/y/t1.nii", "z/y/t1.nii", "u.nii"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert set(sources(find_cases(tmp_path))) == {
        "p1_ct_niigz",
        "p1_ct_nrrd",
        "p2_ct",
        "x_y_t1",
        "z_y_t1",
        "u",
    }


def test_old_cases_keep_their_names(tmp_path):
    old = write_nifti(tmp_path / "p1" / "ct.nii.gz")
    (first,) = find_cases(tmp_path).cases
    assert first.name == "ct"
    new = write_nifti(tmp_path / "p2" / "ct.nii.gz")
    assert sources(find_cases(tmp_path)).keys() == {"p1_ct", "p2_ct"}
    earlier = {(str(first.source), first.series): first.name}
    assert sources(find_cases(tmp_path, earlier=earlier)) == {
        "ct": (old, None),
        "p2_ct": (new, None),
    }


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("CON", "case_CON"),
        ("con.1", "case_con.1"),
        ("LPT1", "case_LPT1"),
        ("COM\u00b9", "case_COM\u00b9"),
        ("console", "console"),
        ("trailing...", "trailing"),
        ("..", "case"),
        ("", "case"),
        ("a/b\\c:d*e?f", "a_b_c_d_e_f"),
        ("-rf", "rf"),
        (".hidden", "hidden"),
        ("manifest.jsonl", "case_manifest.jsonl"),
        ("a b\tc\n", "a_b_c_"),
        ("e\u0301", "\u00e9"),
        ("\udcff", "case_"),
    ],
)
def test_safe_names(text, name):
    assert safe_name(text) == name


TEXTS = st.text(max_size=150) | st.text("aAbB.-_ \u00df\u00e9e\u0301\u212a", max_size=8)


@given(TEXTS)
def test_names_are_safe_on_all_systems(text):
    name = safe_name(text)
    assert 0 < len(name) <= LONGEST
    assert len(name.encode()) < 200
    assert not set(name) & set('<>:"/\\|?* \0')
    assert not any(unicodedata.category(letter)[0] in "CZ" for letter in name)
    assert name[0] not in ".-"
    assert name[-1] not in ". "
    assert name.split(".")[0].upper() not in {"CON", "PRN", "AUX", "NUL", "COM1", "LPT9"}
    assert safe_name(text) == name


def test_long_names_differ():
    long = "x" * 300
    assert safe_name(long) != safe_name(long + "y")
    assert safe_name(long).startswith("x" * 90)


WISHES = st.lists(st.lists(TEXTS, min_size=1, max_size=3), min_size=1, max_size=8)


def wishes_of(texts):
    return [Wish(candidates=tuple(each), order=f"{n:03d}") for n, each in enumerate(texts)]


@given(WISHES, st.lists(TEXTS.map(safe_name), max_size=3), st.randoms())
@settings(max_examples=300)
def test_names_are_different_and_do_not_depend_on_the_order(texts, taken, rng: random.Random):
    wishes = wishes_of(texts)
    names = unique_names(wishes, taken=taken)
    folded = [folded_name(name) for name in names]
    assert len(set(folded)) == len(names)
    assert not set(folded) & set(map(folded_name, taken))
    assert all(len(name) <= LONGEST and len(name.encode()) < 200 for name in names)
    order = list(range(len(wishes)))
    rng.shuffle(order)
    shuffled = unique_names([wishes[index] for index in order], taken=taken)
    assert shuffled == [names[index] for index in order]


@given(
    st.lists(st.lists(st.sampled_from("abcdAB"), min_size=2, max_size=3), min_size=2, max_size=6)
)
def test_further_case_with_a_name_of_its_own_changes_no_other(texts):
    wishes = wishes_of(texts)
    *old, new = unique_names([*wishes, Wish(candidates=("unlike",), order="x")])
    assert new == "unlike"
    assert old == unique_names(wishes)


# Fingerprints


def fingerprints(path, **options):
    return {case.name: case.fingerprint() for case in find_cases(path, **options).cases}


def test_fingerprint_of_a_series_changes_with_its_own_files_only(tmp_path):
    series_in(tmp_path, "1.2.1", name="a")
    series_in(tmp_path, "1.2.2", name="b")
    before = fingerprints(tmp_path)
    assert fingerprints(tmp_path) == before
    assert before["1.2.1"] != before["1.2.2"]
    os.utime(tmp_path / "b000.dcm", ns=(1, 1))
    touched = fingerprints(tmp_path)
    assert touched["1.2.1"] == before["1.2.1"]
    assert touched["1.2.2"] != before["1.2.2"]
    (tmp_path / "a005.dcm").unlink()
    assert fingerprints(tmp_path)["1.2.1"] != before["1.2.1"]


@pytest.mark.parametrize(
    "changed", ["pair.hdr", "pair.img", "image.mhd", "image.raw", "ct/slice001.dcm"]
)
def test_fingerprint_changes_with_each_file_of_a_case(tmp_path, changed):
    nib.save(nib.Nifti1Pair(np.zeros((4, 5, 6), np.int16), np.eye(4)), tmp_path / "pair.hdr")
    image = sitk.GetImageFromArray(np.zeros((6, 5, 4), np.int16))
    sitk.WriteImage(image, str(tmp_path / "image.mhd"))
    series_in(tmp_path / "ct", "1.2.1")
    cases = [
        Case(name="x", source=tmp_path / name, series=None)
        for name in ("pair.hdr", "image.mhd", "ct")
    ]
    before = [case.fingerprint() for case in cases]
    assert before == [case.fingerprint() for case in cases]
    os.utime(tmp_path / changed, ns=(1, 1))
    assert sum(old != case.fingerprint() for old, case in zip(before, cases, strict=True)) == 1


def test_fingerprint_of_a_missing_file_and_of_another_series(tmp_path):
    gone = Case(name="x", source=tmp_path / "gone.nii", series=None)
    before = gone.fingerprint()
    assert before == gone.fingerprint()
    assert before != Case(name="x", source=gone.source, series="1.2.3").fingerprint()
    write_nifti(tmp_path / "gone.nii")
    assert gone.fingerprint() != before


# Survey


def many_kinds(folder):
    """DICOM files, ordinary and odd ones."""
    series_in(folder / "ct", "1.2.1")
    series_in(folder / "mr", "1.2.2", Modality="MR", AccessionNumber="A1", SeriesNumber=3)
    series_in(folder / "scout", "1.2.3", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    series_in(folder / "colour", "1.2.4", SamplesPerPixel=3)
    series_in(folder / "bits", "1.2.5", BitsAllocated=12)
    series_in(folder / "skewed", "1.2.6", orientation=(1.0, 0.5, 0.0, 0.0, 1.0, 0.0))
    write_multi_frame(folder / "frames.dcm", VOXELS, SeriesInstanceUID="1.2.7")
    one = write_series(folder / "one frame", VOXELS, SeriesInstanceUID="1.2.8", NumberOfFrames=1)
    from pydicom import dcmread

    for syntax in (DeflatedExplicitVRLittleEndian, ImplicitVRLittleEndian):
        for path in sorted(one.iterdir())[:2]:
            header = in_syntax(dcmread(path), syntax)
            header.save_as(folder / f"{path.stem}{syntax[-2:]}.dcm", enforce_file_format=True)
    packed = dcmread(sorted(one.iterdir())[0])
    packed.compress(RLELossless)
    packed.save_as(folder / "rle.dcm", enforce_file_format=True)
    for name in ("no position", "no size"):
        header = dcmread(sorted(one.iterdir())[0])
        del header[{"no position": "ImagePositionPatient", "no size": "Rows"}[name]]
        header.save_as(folder / f"{name}.dcm", enforce_file_format=True)
    new_file(Modality="SR").save_as(folder / "sr.dcm", enforce_file_format=True)
    content = (folder / "ct" / "slice000.dcm").read_bytes()
    for size in (0, 100, 140, 300, 500, len(content) - 1):
        (folder / f"cut{size}.dcm").write_bytes(content[:size])


def read_alone(file):
    try:
        return read_slices(file), ""
    except NotASlice as reason:
        return None, str(reason)
    except errors_of_damage():
        return None, "damaged, or cut off within the header"


def test_survey_agrees_with_the_reader_of_one_series(tmp_path):
    many_kinds(tmp_path)
    if "TOTALFAST_TEST_DATA" in os.environ:
        shutil.copytree(
            Path(os.environ["TOTALFAST_TEST_DATA"]) / "example_ct_dicom", tmp_path / "example"
        )
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    outcomes = {"slice": 0, "other": 0}
    with values_unchecked():
        survey = Survey()
        for path in files:
            file = DicomFile(name=path.name, path=path, size=path.stat().st_size)
            contents = survey.sort(file, glance(file))
            slices, refusal = read_alone(file)
            if slices is None:
                assert contents.series is None
                assert contents.reason == refusal
                outcomes["other"] += 1
                continue
            first, series = slices[0], contents.series
            assert (series.uid, series.number) == (first.series, first.number)
            assert (series.description, series.modality) == (first.description, first.modality)
            assert contents.positions == tuple(each.position for each in slices)
            outcomes["slice"] += 1
    assert outcomes["slice"] > 20
    assert outcomes["other"] > 20


def test_example_data_are_found():
    folder = os.environ.get("TOTALFAST_TEST_DATA")
    if folder is None:
        pytest.skip("set TOTALFAST_TEST_DATA to the folder of the example data")
    found = sources(find_cases(folder))
    assert {"example_ct_sm", "example_mr_sm", "example_ct_dicom"} <= set(found)
