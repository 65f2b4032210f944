"""Guided runs: the tiles of each model, and the labels that they give."""

from __future__ import annotations

import itertools
import json
import logging
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch

import totalfast
from totalfast.engine.predict import _erase_unfinished
from totalfast.engine.tiles import plan_tiles
from totalfast.errors import OptionError
from totalfast.geometry import Grid, linear_weights
from totalfast.labels.merge import merge_part
from totalfast.models.model_summary import ModelSummary
from totalfast.models.weights import find_part, parts_of
from totalfast.options import Options
from totalfast.run import pipeline
from totalfast.run.context import RunContext
from totalfast.run.empty_classes import NOT_GUIDED_TO
from totalfast.run.guide import boxes_of_models
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
    labels[40, 30, 41:] = LIVER  # a speck
    labels[54, 0, 0] = AORTA  # another, but there is nothing larger
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
    labels[10, 10, 10:22], labels[50, 30, 20:35] = LIVER, 1  # the spleen
    task = resolve_task("total", roi_subset=["liver"])
    (box,) = boxes_of_models(labels, task, grid_of((90, 70, 110), 1.5))
    assert box[0].stop < 50
    one_model = (Part(model_id=300, labels=None),)
    whole = replace(resolve_task("body"), parts=one_model, classes={1: "a", 5: "b"})
    (box,) = boxes_of_models(labels, whole, grid_of((90, 70, 110), 1.5))
    assert box[0].start < 10
    assert box[0].stop > 100


def test_a_thin_oblique_vessel_is_no_speck():
    labels = np.zeros((55, 35, 45), dtype=np.uint8)
    labels[2:7, 2:7, 2:7] = 51  # the heart
    for k in range(20):
        labels[30 + k, 5 + k, 15 + k] = AORTA
    boxes = boxes_of_models(labels, resolve_task("total"), grid_of((90, 70, 110), 1.5))
    assert boxes[2][0].stop > 2 * 49


def inside_of(box, shape):
    """A mask, (z, y, x), of the voxels of a box."""
    mask = np.zeros(shape, bool)
    mask[tuple(slice(max(part.start, 0), max(part.stop, 0)) for part in box)] = True
    return mask


def kept_voxels(box, shape, patch, step=0.8):
    """The voxels, (z, y, x), of which all of nnU-Net's tiles touch a box."""
    wanted = inside_of(box, shape)
    tiles = plan_tiles(shape, patch, step)
    kept = np.ones(shape, bool)
    for corner in itertools.product(*tiles.starts):
        place = tuple(
            slice(max(first - below, 0), first - below + size)
            for first, below, size in zip(corner, tiles.below, tiles.patch, strict=True)
        )
        if not wanted[place].any():
            kept[place] = False
    return kept


@pytest.mark.parametrize("seed", range(100))
def test_the_tiles_that_touch_a_box_are_run_and_cells_tell_where_all_were_run(seed):
    random = np.random.default_rng(seed)
    shape = tuple(int(n) for n in random.integers(1, 60, 3))
    patch = tuple(int(n) for n in random.integers(1, 30, 2 if seed % 4 == 0 else 3))
    every = plan_tiles(shape, patch, float(random.choice([0.3, 0.5, 0.8, 1.0])))
    if seed % 3:
        low = [int(n) for n in random.integers(-9, np.array(shape) + 9)]
        box = tuple(slice(first, first + int(random.integers(1, 40))) for first in low)
        tiles, wanted = every.that_touch(box), inside_of(box, shape)
    else:  # any tiles
        skipped = random.random([len(axis) for axis in every.starts]) < random.random()
        tiles, wanted = replace(every, skipped=skipped), None
    run = [corner for _, boxes in tiles.rows() for corner in boxes]
    assert tiles.count == len(run)
    assert wanted is None or tiles.skipped is None or tiles.skipped.any()
    missing = np.zeros(tiles.padded_shape, bool)
    for number in np.ndindex(*(len(axis) for axis in every.starts)):
        place = tuple(
            slice(axis[k], axis[k] + n)
            for axis, k, n in zip(tiles.starts, number, tiles.patch, strict=True)
        )
        is_run = tiles.skipped is None or not tiles.skipped[number]
        if wanted is not None:
            padded = np.pad(wanted, list(zip(tiles.below, tiles.above, strict=True)))
            assert is_run == padded[place].any()
        assert not is_run or place in run
        missing[place] |= not is_run
    z, plane = tiles.inside
    missing = missing[(z, *plane)]
    if wanted is not None:
        assert not missing[wanted].any()
    slices, complete = tiles.cells()
    for cell in np.ndindex(complete.shape):
        place = tuple(axis[k] for axis, k in zip(slices, cell, strict=True))
        assert missing[place].size
        assert (missing[place] == (not complete[cell])).all()
    assert sum(missing[tuple(c)].size for c in itertools.product(*slices)) == missing.size


@pytest.mark.parametrize("finer", [1, 2])
def test_interpolated_labels_are_erased_where_a_neighbour_with_weight_lacks_a_tile(finer):
    tiles = plan_tiles((8, 8, 30), (8, 8, 8), 1.0)
    tiles = tiles.that_touch((slice(0, 8), slice(0, 8), slice(9, 14)))  # the tile from 7 to 15
    target = (8, 8, 29 * finer + 1)
    axes = [linear_weights(n, m) for n, m in zip(tiles.shape, target, strict=True)]
    labels = np.ones(target, np.uint8)
    _erase_unfinished(labels, tiles, axes)
    kept = np.flatnonzero(labels.any(axis=(0, 1)))
    starts = tiles.starts[2]
    first, last = starts[0] + 8, starts[2] - 1  # in the second tile only
    assert (kept[0], kept[-1]) == (finer * first, finer * last)
    plain = np.ones(tiles.shape, np.uint8)
    _erase_unfinished(plain, tiles, None)
    np.testing.assert_array_equal(np.flatnonzero(plain[0, 0]), np.arange(first, last + 1))


def nnunets_labels(task, part, voxels):
    """What nnU-Net's own predictor gives for an image, (z, y, x)."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(
        tile_step_size=0.8, use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False
    )
    predictor.initialize_from_trained_model_folder(str(find_part(task, part)), (0,))
    spacing = {"spacing": [1.5, 1.5, 1.5]}
    return predictor.predict_single_npy_array(voxels[None].astype(np.float32), spacing)


def test_each_model_labels_voxels_as_nnunet_labels_the_whole_image(scan, monkeypatch, caplog):
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
            own = nnunets_labels(task, part, np.ascontiguousarray(voxels))
            own[~kept_voxels(box, own.shape, ModelSummary.of(task, part).patch)] = 0
            merge_part(expected, own, part.labels)
    assert expected.any()
    assert not expected.all()
    np.testing.assert_array_equal(labels.dataobj, expected.transpose(2, 1, 0))
    (line,) = [text for text in caplog.messages if text.startswith("Guided: ")]
    few, many = (int(word) for word in line.split() if word.isdigit())
    assert 0 < few < many


@pytest.mark.parametrize("options", [{"force_split": True}, {"export": "linear"}])
def test_pieces_and_linear_export_are_guided_too(options, scan, monkeypatch):
    guide = np.zeros((55, 35, 45), dtype=np.uint8)
    guide[4:9, 8:20, 10:20] = LIVER
    monkeypatch.setattr(pipeline, "_guiding_labels", lambda *_: guide)
    labels = np.asarray(totalfast.segment(scan, guided=True, **options, **TOTAL).dataobj)
    plain = np.asarray(totalfast.segment(scan, roi_subset=None, **options, **TOTAL).dataobj)
    (box, *others) = boxes_of_models(guide, resolve_task("total"), grid_of(scan.shape, 1.5))
    assert not any(others)
    first = np.isin(plain, list(resolve_task("total").parts[0].labels.values()))
    # later models overwrite the first one, but where its classes are left they are its own
    inside = first & inside_of(box, plain.shape[::-1]).T
    assert inside.any()
    np.testing.assert_array_equal(labels[inside], plain[inside])
    assert not labels.all(axis=(0, 1)).any()
    differs = (labels != plain) & first
    assert differs.any()
    assert not labels[differs].any()


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
    assert boxes == [None, None, boxes_of_models(rough, task, grid_of(scan.shape, 1.5))]
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


def test_a_box_in_zeros_which_nnunet_crops_gives_no_labels(monkeypatch):
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


@pytest.mark.parametrize("export", ["auto", "linear"])
def test_in_a_border_of_zeros_labels_are_those_of_a_full_run(export, monkeypatch):
    values = np.zeros((60, 50, 200), dtype=np.int16)
    values[:, 5:, 20:180] = np.random.default_rng(0).normal(0, 300, (60, 45, 160))
    scan = nib.Nifti1Image(values, np.diag([1.5, 1.5, 1.5, 1.0]))
    monkeypatch.setattr(pipeline, "clean", lambda context, labels, *_: labels)
    full = np.asarray(totalfast.segment(scan, task="body", export=export, **TOTAL).dataobj).copy()
    guide = np.zeros((50, 12, 15), dtype=np.uint8)
    guide[8:11, 4:9, 10:14] = 1
    monkeypatch.setattr(pipeline, "_guiding_labels", lambda *_: guide)
    labels = totalfast.segment(scan, task="body", guided=True, export=export, **TOTAL)
    labels = np.asarray(labels.dataobj)
    (box,) = boxes_of_models(guide, resolve_task("body"), grid_of(scan.shape, 1.5))
    inside = inside_of(box, full.shape[::-1]).T
    assert full[inside].any()
    np.testing.assert_array_equal(labels[inside], full[inside])
    assert not labels[labels != full].any()
    assert np.any(labels != full)


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
