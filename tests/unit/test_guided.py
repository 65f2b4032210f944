"""Guided runs: the box of each model, and the labels in it."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch

import totalfast
from totalfast.engine import predict as predict_module
from totalfast.engine.normalise import to_network_image
from totalfast.errors import OptionError
from totalfast.geometry import Grid, enlarged
from totalfast.labels.merge import merge_part
from totalfast.models.weights import find_part, parts_of
from totalfast.options import Options
from totalfast.run import pipeline, prediction
from totalfast.run.context import RunContext
from totalfast.run.empty_classes import NOT_GUIDED_TO
from totalfast.run.guide import box_in_piece, boxes_of_models
from totalfast.run.shared_scan import SharedScan
from totalfast.system.progress import Progress
from totalfast.tasks import Part, resolve_task

pytestmark = pytest.mark.usefixtures("standins_are_used")

TOTAL = {"backend": "torch", "device": "cpu", "quiet": True}
LIVER, AORTA, RIB = 5, 52, 92  # of models 291, 293 and 295


@pytest.fixture(scope="module")
def scan():
    """A scan of several tiles at 1.5 mm, and no resampling."""
    values = np.random.default_rng(0).normal(0, 300, (90, 70, 110)).astype(np.int16)
    return nib.Nifti1Image(values, np.diag([1.5, 1.5, 1.5, 1.0]))


class Bar(Progress):
    """Adds up the work, without a limit."""

    def __init__(self):
        self.done = self.total = 0.0

    def stage(self, name):
        pass

    def expect(self, total):
        self.total = total

    def advance(self, work):
        self.done += work

    def __exit__(self, *error):
        pass


def grid_of(shape_xyz, mm):
    return Grid(shape=shape_xyz, affine=np.diag([mm, mm, mm, 1.0]))


def test_a_box_encloses_the_classes_of_its_model_with_a_margin_of_20_mm():
    labels = np.zeros((55, 35, 45), dtype=np.uint8)  # (z, y, x) at 3 mm
    labels[20:22, 10:13, 30:34] = LIVER
    labels[54, 0, 0] = AORTA
    boxes = boxes_of_models(labels, resolve_task("total"), grid_of((90, 70, 110), 1.5))
    margin = int(20 / 1.5)
    organs, vertebrae, heart, muscles, ribs = boxes
    for part, (first, last), n in zip(
        organs, [(20, 21), (10, 12), (30, 33)], [110, 70, 90], strict=True
    ):
        # voxel k of n // 2 lies at 2 k (n - 1) / (n - 2) on the grid of n voxels
        scale = (n - 1) / (n // 2 - 1)
        assert part.start == pytest.approx(max((first - 0.5) * scale - margin, 0), abs=1)
        assert part.stop == pytest.approx(min((last + 0.5) * scale + 1 + margin, n), abs=1)
    assert [(part.start, part.stop) for part in heart][1:] == [(0, 2 + margin)] * 2
    assert heart[0].stop == 110
    assert vertebrae is muscles is ribs is None


def test_only_selected_classes_count():
    labels = np.zeros((55, 35, 45), dtype=np.uint8)
    labels[10, 10, 10], labels[50, 30, 40] = LIVER, 1  # the spleen
    task = resolve_task("total", roi_subset=["liver"])
    (box,) = boxes_of_models(labels, task, grid_of((90, 70, 110), 1.5))
    assert box[0].stop < 50
    whole = SimpleNamespace(parts=(Part(model_id=300, labels=None),), classes={1: "a", 5: "b"})
    (box,) = boxes_of_models(labels, whole, grid_of((90, 70, 110), 1.5))
    assert box[0].start < 10
    assert box[0].stop > 100


@pytest.mark.parametrize("seed", range(100))
def test_a_box_in_a_piece_and_enlarged_keeps_its_voxels(seed):
    random = np.random.default_rng(seed)
    shape = random.integers(1, 60, 3)
    first = int(random.integers(0, shape[0]))
    piece = slice(first, int(random.integers(first + 1, shape[0] + 1)))
    low = random.integers(0, shape)
    box = tuple(
        slice(int(a), int(random.integers(a + 1, n + 1))) for a, n in zip(low, shape, strict=True)
    )
    within = (piece.stop - piece.start, *(int(n) for n in shape[1:]))
    wanted = np.zeros(shape, bool)
    wanted[box] = True
    wanted = wanted[piece]
    found = box_in_piece(box, piece, within)
    if not wanted.any():
        assert found is None
        return
    assert wanted[found].all()
    assert wanted.sum() == wanted[found].size
    patch = [int(n) for n in random.integers(1, 40, 3)]
    large = enlarged(found, patch, [slice(0, n) for n in within])
    for part, own, n, least in zip(large, found, within, patch, strict=True):
        assert 0 <= part.start <= own.start < own.stop <= part.stop <= n
        assert part.stop - part.start == max(own.stop - own.start, min(least, n))


def nnunets_labels(task, part, voxels):
    """What nnU-Net's own predictor gives for a part of the image, (z, y, x)."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(
        tile_step_size=0.8, use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False
    )
    predictor.initialize_from_trained_model_folder(str(find_part(task, part)), (0,))
    spacing = {"spacing": [1.5, 1.5, 1.5]}
    return predictor.predict_single_npy_array(voxels[None].astype(np.float32), spacing)


def test_each_model_labels_its_box_as_nnunet_labels_such_an_image(scan, monkeypatch, caplog):
    guide = np.zeros((55, 35, 45), dtype=np.uint8)
    guide[4:9, 8:20, 10:20], guide[30:50, 5:30, 30:44] = LIVER, RIB
    monkeypatch.setattr(pipeline, "_guiding_labels", lambda *_: guide)
    with caplog.at_level(logging.INFO, "totalfast"):
        labels = totalfast.segment(scan, guided=True, **TOTAL)
    task = resolve_task("total")
    voxels = np.asarray(scan.dataobj).transpose(2, 1, 0)
    expected = np.zeros(voxels.shape, dtype=np.uint8)
    boxes = boxes_of_models(guide, task, grid_of(scan.shape, 1.5))
    for part, box in zip(task.parts, boxes, strict=True):
        if box is not None:
            patch = prediction.ModelSummary.of(task, part).patch
            inside = enlarged(box, patch, [slice(0, n) for n in voxels.shape])
            own = nnunets_labels(task, part, np.ascontiguousarray(voxels[inside]))
            merge_part(expected[inside], own, part.labels)
    assert expected.any()
    assert not expected.all()
    np.testing.assert_array_equal(labels.dataobj, expected.transpose(2, 1, 0))
    (line,) = [text for text in caplog.messages if text.startswith("Guided: ")]
    few, many = (int(word) for word in line.split() if word.isdigit())
    assert 0 < few < many


def test_pieces_and_linear_export_are_guided_too(scan, monkeypatch):
    guide = np.zeros((55, 35, 45), dtype=np.uint8)
    guide[4:9, 8:20, 10:20] = LIVER
    monkeypatch.setattr(pipeline, "_guiding_labels", lambda *_: guide)
    task = resolve_task("total")
    depth = prediction.ModelSummary.of(task, task.parts[0]).patch[0]
    assert 2 * 9 + 13 < depth < scan.shape[2]
    for options in ({"force_split": True}, {"export": "linear"}):
        labels = np.asarray(totalfast.segment(scan, guided=True, **options, **TOTAL).dataobj)
        assert labels.any()
        assert not labels[:, :, depth:].any()


def test_the_fast_model_is_asked_and_what_it_does_not_find_stays_empty(scan, monkeypatch):
    asked, boxes = [], []
    predict = pipeline.predict

    def spy(context, model_image, task, **keywords):
        asked.append((task.name, task.resolution, context.options.deterministic))
        boxes.append(keywords.get("boxes"))
        return predict(context, model_image, task, **keywords)

    monkeypatch.setattr(pipeline, "predict", spy)
    fast = totalfast.segment(scan, fast=True, save_lowres=True, **TOTAL)
    totalfast.segment(scan, guided=True, **TOTAL)
    assert asked[1:] == [("total", "fast", True), ("total", "default", False)]
    rough = np.asarray(fast.dataobj).transpose(2, 1, 0)
    task = resolve_task("total", guided=True)
    assert boxes[2] == boxes_of_models(rough, task, grid_of(scan.shape, 1.5))
    assert [part.model_id for _, part in parts_of(task)] == [297, 291, 292, 293, 294, 295]
    monkeypatch.setattr(pipeline, "_guiding_labels", lambda *_: np.zeros_like(rough))
    assert not np.any(totalfast.segment(scan, guided=True, **TOTAL).dataobj)


def test_rough_labels_are_shared_for_the_whole_scan_and_not_for_a_region():
    shared, passes = SharedScan(), []
    scan = shared.scan("CT", object)
    region = object()
    for image in (scan, region, scan, region):
        shared.rough_labels(image, "key", lambda: passes.append(image) or len(passes))  # noqa: B023
    assert passes == [scan, region, region]


def test_a_box_of_zeros_which_nnunet_crops_gives_no_labels(monkeypatch):
    values = np.zeros((90, 70, 110), dtype=np.int16)
    values[:, :, 80:] = np.random.default_rng(0).normal(0, 300, (90, 70, 30))
    scan = nib.Nifti1Image(values, np.diag([1.5, 1.5, 1.5, 1.0]))
    guide = np.zeros((55, 35, 45), dtype=np.uint8)
    guide[:2, 8:20, 10:20] = LIVER
    monkeypatch.setattr(pipeline, "_guiding_labels", lambda *_: guide)
    for export in ("auto", "linear"):
        labels = totalfast.segment(scan, guided=True, export=export, **TOTAL)
        assert labels.shape == scan.shape
        assert not np.any(labels.dataobj)


def test_a_tile_has_no_padding_where_there_is_an_image_inside_a_border_of_zeros(monkeypatch):
    """nnU-Net crops the border; a box near it grows to the other side."""
    values = np.zeros((90, 70, 170), dtype=np.int16)
    values[:, :, :90] = np.random.default_rng(0).normal(0, 300, (90, 70, 90))
    scan = nib.Nifti1Image(values, np.diag([1.5, 1.5, 1.5, 1.0]))
    guide = np.zeros((85, 35, 45), dtype=np.uint8)
    guide[40:44, 8:20, 10:20] = LIVER
    monkeypatch.setattr(pipeline, "_guiding_labels", lambda *_: guide)
    seen = []
    queue = predict_module._queue_network_image
    monkeypatch.setattr(
        predict_module,
        "_queue_network_image",
        lambda image, *a, **k: seen.append(image) or queue(image, *a, **k),
    )
    totalfast.segment(scan, guided=True, **TOTAL)
    task = resolve_task("total")
    depth = prediction.ModelSummary.of(task, task.parts[0]).patch[0]
    (image,) = seen
    assert image.box[0] == slice(90 - depth, 90)
    assert image.voxels.shape[1] == depth


def test_the_progress_bar_counts_tiles_of_zeros_too(monkeypatch):
    values = np.zeros((90, 70, 170), dtype=np.int16)
    values[:, :, :90] = np.random.default_rng(0).normal(0, 300, (90, 70, 90))
    scan = nib.Nifti1Image(values, np.diag([1.5, 1.5, 1.5, 1.0]))
    guide = np.zeros((85, 35, 45), dtype=np.uint8)
    guide[60:80, 8:20, 10:20] = LIVER  # where there are only zeros
    guide[10:20, 8:20, 10:20] = RIB
    monkeypatch.setattr(
        pipeline, "_guiding_labels", lambda c, *_: c.progress.advance(c.work.guide) or guide
    )
    for keywords in ({}, {"guided": True}):
        bar = Bar()
        with totalfast.Session() as session:
            session.segment_shown(scan, None, {**keywords, **TOTAL}, bar)
        assert bar.done == pytest.approx(bar.total, rel=0.02)


def test_a_scan_thinner_than_a_voxel_of_the_fast_model_is_not_guided(caplog):
    values = np.random.default_rng(0).normal(0, 300, (60, 60, 1)).astype(np.int16)
    scan = nib.Nifti1Image(values, np.diag([1.5, 1.5, 1.0, 1.0]))
    plain = totalfast.segment(scan, task="body", **TOTAL)
    with caplog.at_level(logging.INFO, "totalfast"):
        guided = totalfast.segment(scan, task="body", guided=True, **TOTAL)
    np.testing.assert_array_equal(guided.dataobj, plain.dataobj)
    assert "Not guided: " in caplog.text


def test_the_report_tells_classes_whose_model_did_not_run(scan, monkeypatch, tmp_path):
    guide = np.zeros((55, 35, 45), dtype=np.uint8)
    guide[4:9, 8:20, 10:20] = LIVER
    monkeypatch.setattr(pipeline, "_guiding_labels", lambda *_: guide)
    loaded = []
    take = RunContext.take
    monkeypatch.setattr(
        RunContext, "take", lambda s, t, p: loaded.append(p.model_id) or take(s, t, p)
    )
    totalfast.segment(scan, guided=True, report=tmp_path / "report.json", **TOTAL)
    report = json.loads((tmp_path / "report.json").read_text())["totalfast"]
    assert report["guided"] is True
    assert report["empty_classes"]["heart"] == NOT_GUIDED_TO
    assert NOT_GUIDED_TO not in {report["empty_classes"].get(name) for name in ("liver", "spleen")}
    assert loaded == [291]


def test_an_image_that_the_plans_resample_is_not_cut(scan):
    model = SimpleNamespace(
        folder="model",
        plans=SimpleNamespace(
            transpose_forward=[0, 1, 2], foreground_intensity_properties_per_channel={"0": {}}
        ),
        configuration=SimpleNamespace(
            normalization_schemes=["NoNormalization"],
            use_mask_for_norm=[False],
            spacing=[1.5, 1.5, 1.5],
            resampling_fn_data=lambda data, shape, *_: np.zeros((1, *shape), np.float32),
        ),
    )
    voxels = np.ones((1, 20, 30, 40), np.float32)
    same = to_network_image(voxels, spacing_mm=(1.5, 1.5, 1.5), model=model)
    box = (slice(5, 9), slice(0, 30), slice(10, 20))
    assert same.within(box, (2, 2, 2)).voxels.shape == (1, 4, 30, 10)
    assert same.within(box, (2, 2)).box == box
    assert same.within(box, (6, 60, 12)).box == (slice(4, 10), slice(0, 30), slice(9, 21))
    other = to_network_image(voxels, spacing_mm=(3.0, 1.5, 1.5), model=model)
    assert other.within(box, (2, 2, 2)) is other


def test_combinations_that_can_not_be_guided_are_refused():
    for keywords, words in (
        ({"fast": True}, "does not work with fast"),
        ({"fastest": True}, "does not work with fast"),
        ({"higher_order_resampling": True}, "higher_order_resampling"),
        ({"save_probabilities": "p.npz"}, "save_probabilities"),
        ({"task": "lung_vessels"}, "tasks total, .* have one, task lung_vessels has none"),
    ):
        with pytest.raises(OptionError, match=words):
            Options.from_keywords({"guided": True, **keywords}).resolved_task()
