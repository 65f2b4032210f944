"""Both commands on the same input: all files, voxels and header fields must be equal."""

from __future__ import annotations

import pytest

from tests.dicom_series import new_file

from .dicom_files import dicom_problems
from .matrix import (
    MAXIMUM_BOUNDARY,
    MINIMUM_CLASSES,
    PUBLIC,
    all_cases,
    compare_folders,
    input_file,
    run_pair,
)

CASES = [case for case in all_cases() if case.in_ci]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_command_writes_the_files_of_totalsegmentator(case, scans, standin_home, tmp_path):
    if "-ot" in case.flags:
        pytest.importorskip("rt_utils")
        pytest.importorskip("highdicom")
    scan = input_file(case.scan, scans)
    if scan is None:
        pytest.skip(f"TOTALFAST_TEST_DATA has no {PUBLIC[case.scan]}")
    result = run_pair(case, scan, standin_home, tmp_path)
    print(
        f"\n{case.name}: {result.differing_voxels} of {result.voxels} voxels differ, "
        f"{result.classes} classes, {result.boundary:.1%} boundary cells, "
        f"{result.upstream_s:.1f} s upstream, {result.totalfast_s:.1f} s totalfast"
    )
    assert result.differing_voxels == 0
    assert result.problems == []
    assert result.classes > 0
    if case.structured:
        assert result.classes >= MINIMUM_CLASSES
        assert result.boundary <= MAXIMUM_BOUNDARY
    assert "Done in" in result.totalfast_stdout.splitlines()[-1]


def test_comparison_reports_a_voxel_a_header_field_and_a_missing_file(tmp_path):
    import nibabel as nib
    import numpy as np

    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    voxels = np.zeros((4, 5, 6), dtype=np.uint8)
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), one / "a.nii.gz")
    voxels[1, 2, 3] = 1
    changed = nib.Nifti1Image(voxels, np.eye(4))
    changed.header["descrip"] = b"other"
    nib.save(changed, two / "a.nii.gz")
    nib.save(changed, two / "b.nii.gz")
    result = compare_folders("case", one, two)
    assert result.differing_voxels == 1
    assert any("descrip" in problem for problem in result.problems)
    assert any("only totalfast writes b.nii.gz" in problem for problem in result.problems)


def test_comparison_reports_a_dicom_value_and_ignores_generated_identifiers(tmp_path):
    first, second = new_file(), new_file(StudyTime="235959")
    for number, header in enumerate((first, second, second)):
        header.PixelData = bytes(range(8))
        header.SegmentSequence = [new_file(PatientID=str(number // 2))]
        header.save_as(tmp_path / f"{number}.dcm", enforce_file_format=True)
    assert dicom_problems("x", tmp_path / "0.dcm", tmp_path / "1.dcm") == []
    (problem,) = dicom_problems("x", tmp_path / "0.dcm", tmp_path / "2.dcm")
    assert problem == "x SegmentSequence[0] PatientID: 0 and 1"
