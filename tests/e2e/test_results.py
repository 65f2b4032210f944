"""Results other than labels: statistics, reports, radiomics, entries in Nora."""

from __future__ import annotations

import json
import logging
import sys
import types
from importlib.machinery import ModuleSpec

import nibabel as nib
import numpy as np
import pytest

import totalfast
from tests.dicom_series import write_series
from totalfast.options import Options, check_radiomics
from totalfast.run.empty_classes import NO_REGION, NOT_FOUND, TOO_SMALL
from totalfast.upstream import CLASS_MAPS

QUICK = {"fastest": True, "device": "cpu", "quiet": True}


pytestmark = pytest.mark.usefixtures("standins_are_used")


@pytest.fixture(scope="module")
def scan():
    values = np.random.default_rng(0).normal(0, 300, (40, 36, 30)).astype(np.int16)
    return nib.Nifti1Image(values, np.diag([-2.0, 2.0, 3.0, 1.0]))


@pytest.fixture
def small_scan(scan):
    """Keywords of task body, which has two classes, and derived masks of two more."""
    return {"input": scan, "task": "body", "fast": True, "device": "cpu", "quiet": True}


def test_statistics_are_returned_and_written_to_a_new_folder(scan, tmp_path):
    path = str(tmp_path / "new" / "stats.json")
    image, results = totalfast.segment(
        scan, statistics=path, statistics_exclude_masks_at_border=False, **QUICK
    )
    labels, counts = np.unique(image.dataobj, return_counts=True)
    volumes = {CLASS_MAPS["total"][k]: 12.0 * n for k, n in zip(labels, counts, strict=True) if k}
    assert {name: row["volume"] for name, row in results.items() if row["volume"]} == volumes
    assert json.loads((tmp_path / "new" / "stats.json").read_text()) == results
    with pytest.raises(totalfast.OptionError, match="statistics needs the name of a file"):
        totalfast.segment(scan, statistics=str(tmp_path), **QUICK)


def test_statistics_with_skip_saving_are_written_to_the_mask_folder(scan, tmp_path):
    output = tmp_path / "a" / "masks"
    totalfast.segment(scan, output, statistics=True, skip_saving=True, **QUICK)
    assert [path.name for path in output.iterdir()] == ["statistics.json"]


def test_statistics_with_save_lowres_are_measured_on_the_model_grid(scan, tmp_path):
    image, results = totalfast.segment(
        scan,
        tmp_path / "new" / "masks",
        save_lowres=True,
        skip_saving=True,
        statistics=True,
        statistics_exclude_masks_at_border=False,
        **QUICK,
    )
    assert image.shape != scan.shape
    volumes = np.bincount(np.asarray(image.dataobj).ravel(), minlength=118) * 6.0**3
    assert [row["volume"] for row in results.values()] == pytest.approx(volumes[1:], rel=1e-6)
    assert sum(volumes[1:]) > 0
    assert (tmp_path / "new" / "masks" / "statistics.json").exists()


def test_statistics_are_zero_and_the_report_has_the_reason_if_no_region_is_found(scan, tmp_path):
    present = np.unique(totalfast.segment(scan, **QUICK).dataobj)
    absent = next(name for label, name in CLASS_MAPS["total"].items() if label not in present)
    image, results = totalfast.segment(
        scan,
        roi_subset=[absent],  # the same model looks for the region
        fast=True,
        statistics=True,
        report=tmp_path / "report.json",
        device="cpu",
        quiet=True,
    )
    assert not np.any(image.dataobj)
    assert results == {absent: {"volume": 0.0, "intensity": 0.0}}
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["totalfast"]["empty_classes"] == {absent: NO_REGION}


def test_version_1_order_renumbers_the_label_map_but_not_the_masks(scan, tmp_path):
    from totalsegmentator.libs import reorder_multilabel_like_v1

    plain = totalfast.segment(scan, tmp_path / "plain", **QUICK)
    ordered = totalfast.segment(scan, tmp_path / "ordered", v1_order=True, **QUICK)
    voxels = np.asarray(plain.dataobj)
    expected = reorder_multilabel_like_v1(voxels, CLASS_MAPS["total"], CLASS_MAPS["total_v1"])
    np.testing.assert_array_equal(ordered.dataobj, expected)
    assert not np.array_equal(expected, voxels)
    table = ordered.header.extensions[-1].get_content()
    assert table.count(b"<Label ") == len(CLASS_MAPS["total_v1"])
    masks = sorted((tmp_path / "plain").iterdir())
    assert len(masks) == 117
    for mask in masks:
        assert mask.read_bytes() == (tmp_path / "ordered" / mask.name).read_bytes()
    body = totalfast.segment(scan, task="body", v1_order=True, fast=True, device="cpu", quiet=True)
    assert b"body_trunc" in body.header.extensions[-1].get_content()


def test_report_equals_upstreams_and_adds_the_reasons_for_empty_classes(scan, tmp_path, caplog):
    from totalsegmentator.python_api import build_run_report

    output, path = tmp_path / "masks", tmp_path / "new" / "report.json"
    with caplog.at_level(logging.DEBUG, logger="totalfast"):
        image = totalfast.segment(scan, output, report=path, remove_small_blobs=1e8, **QUICK)
    report = json.loads(path.read_text())
    own, seconds = report.pop("totalfast"), report.pop("runtime_seconds")
    expected = build_run_report(
        scan, output, "total", "cpu", False, True, False, "nifti", None, runtime_seconds=1
    )
    expected.pop("runtime_seconds")
    assert list(report.items()) == list(expected.items())
    assert len(report["output_files"]) == 117
    assert seconds > 0
    assert own["version"] == totalfast.__version__
    assert not np.any(image.dataobj)
    assert own["empty_classes"].keys() == set(CLASS_MAPS["total"].values())
    assert set(own["empty_classes"].values()) == {NOT_FOUND, TOO_SMALL}
    assert any(message.startswith(f"Empty, {TOO_SMALL}: ") for message in caplog.messages)


NORA = """#!/bin/sh
for word in "$@"; do printf '%s|' "$word"; done >> {log}
test -s "$4" && echo exists >> {log}
"""


def test_nora_gets_existing_files_and_no_shell_interprets_the_tag(
    small_scan, tmp_path, monkeypatch
):
    program, log = tmp_path / "nora", tmp_path / "log"
    program.write_text(NORA.format(log=log))
    program.chmod(0o755)
    monkeypatch.setattr("totalfast.files.nora.NORA", str(program))
    masks, tag = tmp_path / "masks", f"a; touch {tmp_path}/executed"
    totalfast.segment(output=masks, nora_tag=tag, **small_scan)
    totalfast.segment(output=tmp_path / "seg.nii.gz", ml=True, nora_tag="b", **small_scan)
    assert log.read_text().splitlines() == [
        f"-p|{tag}|--add|{masks}/body_trunc.nii.gz|--addtag|mask|exists",
        f"-p|{tag}|--add|{masks}/body_extremities.nii.gz|--addtag|mask|exists",
        f"-p|b|--add|{tmp_path}/seg.nii.gz|--addtag|atlas|exists",
    ]
    assert not (tmp_path / "executed").exists()


def test_nora_is_not_started_if_dicom_is_written(tmp_path, monkeypatch):
    pytest.importorskip("rt_utils")
    program, log = tmp_path / "nora", tmp_path / "log"
    program.write_text(NORA.format(log=log))
    program.chmod(0o755)
    monkeypatch.setattr("totalfast.files.nora.NORA", str(program))
    voxels = np.random.default_rng(0).normal(0, 300, (12, 40, 36)).astype(np.int16)
    totalfast.segment(
        write_series(tmp_path / "dicom", voxels),
        tmp_path / "out.nii.gz",
        nora_tag="a",
        output_type=["nifti", "dicom_rtstruct"],
        **QUICK,
    )
    assert {path.name for path in tmp_path.glob("out*")} == {"out.nii.gz", "out_rtstruct.dcm"}
    assert not log.exists()


def test_missing_nora_only_gives_a_warning(small_scan, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("totalfast.files.nora.NORA", str(tmp_path / "none"))
    totalfast.segment(output=tmp_path / "masks", nora_tag="a", **small_scan)
    assert "Nora can't be started" in caplog.text
    assert (tmp_path / "masks" / "body_trunc.nii.gz").exists()


def test_radiomics_are_upstreams_features_of_our_masks(small_scan, tmp_path, monkeypatch):
    def features(mask, image):
        voxels = nib.load(image).get_fdata()[nib.load(mask).get_fdata() > 0]
        return mask.name.split(".")[0], {"sum": float(voxels.sum())}

    module = types.ModuleType("radiomics")
    module.__spec__ = ModuleSpec("radiomics", None)
    monkeypatch.setitem(sys.modules, "radiomics", module)
    monkeypatch.setattr("totalsegmentator.statistics.get_radiomics_features", features)
    labels = totalfast.segment(
        output=tmp_path / "masks", radiomics=True, no_derived_masks=True, **small_scan
    )
    radiomics = json.loads((tmp_path / "masks" / "statistics_radiomics.json").read_text())
    trunc = np.asarray(small_scan["input"].dataobj)[np.asarray(labels.dataobj) == 1]
    assert radiomics["body_trunc"] == {"sum": float(trunc.sum())}
    assert set(radiomics) == {"body_trunc", "body_extremities"}


@pytest.mark.parametrize(
    ("source", "output", "keywords", "message"),
    [
        ("ct.nii.gz", None, {}, "Output path is required"),
        ("ct.nii.gz", "seg.nii.gz", {"ml": True}, "not supported for multilabel"),
        ("ct.nii.gz", "masks", {"skip_saving": True}, "do not skip saving"),
        ("slices", "masks", {}, "not supported for DICOM"),
        ("ct.nii.gz", "masks", {}, "pyradiomics, which is not installed"),
    ],
)
def test_impossible_radiomics_are_an_error_before_any_work(
    source, output, keywords, message, monkeypatch
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(totalfast.OptionError, match=message):
        check_radiomics(source, output, Options(radiomics=True, **keywords))
    check_radiomics(source, output, Options())
