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
from scipy import ndimage

import totalfast
from totalfast.engine.rough_mask import RoughMask
from totalfast.engine.tiles import plan_tiles
from totalfast.errors import OptionError
from totalfast.geometry import Grid, nearest_indices
from totalfast.labels.merge import merge_part
from totalfast.models.model_summary import ModelSummary
from totalfast.models.weights import find_part, parts_of
from totalfast.options import Options
from totalfast.run import pipeline
from totalfast.run.context import RunContext
from totalfast.run.empty_classes import NOT_GUIDED_TO
from totalfast.run.guide import masks_of_models
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


def expanded(mask):
    """The voxels of the image that are in a rough mask, (z, y, x), by another way."""
    axes = [nearest_indices(n, m) for n, m in zip(mask.voxels.shape, mask.shape, strict=True)]
    voxels = np.asarray(mask.voxels)[np.ix_(*axes)]
    size = [2 * n + 1 for n in mask.margin]
    wide = ndimage.maximum_filter(voxels.astype(np.uint8), size, mode="constant").astype(bool)
    return wide[tuple(slice(first, None) for first in mask.start)]


def kept_voxels(mask, patch, step=0.8):
    """The voxels, (z, y, x), of which all of nnU-Net's tiles touch a mask."""
    wanted = expanded(mask)
    tiles = plan_tiles(wanted.shape, patch, step)
    kept = np.ones(wanted.shape, bool)
    for corner in itertools.product(*tiles.starts):
        place = tuple(
            slice(max(first - below, 0), first - below + size)
            for first, below, size in zip(corner, tiles.below, tiles.patch, strict=True)
        )
        if not wanted[place].any():
            kept[place] = False
    return kept


def patch_of(task, part):
    return ModelSummary.of(task, part).patch


def test_a_mask_has_the_classes_of_its_model_with_a_margin_of_20_mm():
    labels = np.zeros((55, 35, 45), dtype=np.uint8)  # (z, y, x) at 3 mm
    labels[20:22, 10:13, 30:34] = LIVER
    labels[54, 0, 0] = AORTA  # a speck, but there is nothing else
    labels[40, 30, 40:] = LIVER  # five voxels beside a liver of 24
    masks = masks_of_models(labels, resolve_task("total"), grid_of((90, 70, 110), 1.5))
    margin = int(20 / 1.5)
    organs, vertebrae, heart, muscles, ribs = masks
    inside = np.argwhere(expanded(organs))
    for axis, (first, last), n in zip(
        range(3), [(20, 21), (10, 12), (30, 33)], [110, 70, 90], strict=True
    ):
        # voxel k of n // 2 lies at 2 k (n - 1) / (n - 2) on the grid of n voxels
        scale = (n - 1) / (n // 2 - 1)
        low, high = inside[:, axis].min(), inside[:, axis].max() + 1
        assert low == pytest.approx(max((first - 0.5) * scale - margin, 0), abs=1)
        assert high == pytest.approx(min((last + 0.5) * scale + 1 + margin, n), abs=1)
    assert np.argwhere(expanded(heart)).max(axis=0).tolist() == [109, 1 + margin, 1 + margin]
    assert vertebrae is muscles is ribs is None


def test_only_selected_classes_count():
    labels = np.zeros((55, 35, 45), dtype=np.uint8)
    labels[10, 10, 10:22], labels[50, 30, 20:35] = LIVER, 1  # the spleen
    task = resolve_task("total", roi_subset=["liver"])
    (mask,) = masks_of_models(labels, task, grid_of((90, 70, 110), 1.5))
    assert mask.voxels.sum() == 12
    one_model = (Part(model_id=300, labels=None),)
    whole = replace(resolve_task("body"), parts=one_model, classes={1: "a", 5: "b"})
    (mask,) = masks_of_models(labels, whole, grid_of((90, 70, 110), 1.5))
    assert mask.voxels.sum() == 12 + 15


@pytest.mark.parametrize("seed", range(100))
def test_the_tiles_of_a_mask_are_those_that_touch_it_and_cells_tell_where_all_were_run(seed):
    random = np.random.default_rng(seed)
    shape = tuple(int(n) for n in random.integers(1, 60, 3))
    patch = tuple(int(n) for n in random.integers(1, 30, 2 if seed % 4 == 0 else 3))
    step = float(random.choice([0.3, 0.5, 0.8, 1.0]))
    rough = tuple(int(random.integers(1, n + 1)) for n in shape)
    mask = RoughMask(
        voxels=random.random(rough) < random.choice([0, 0.001, 0.01, 0.1]),
        shape=shape,
        margin=tuple(int(n) for n in random.integers(0, 5, 3)),
    )
    if seed % 3:
        low = [int(random.integers(0, n)) for n in shape]
        mask = mask.part(tuple(slice(first, n) for first, n in zip(low, shape, strict=True)))
        axes = random.permutation(3)
        np.testing.assert_array_equal(
            expanded(mask.transposed(axes)), expanded(mask).transpose(axes)
        )
        mask = mask.transposed(axes)
    wanted = expanded(mask)
    tiles = plan_tiles(wanted.shape, patch, step).that_touch(mask)
    run = [corner for _, boxes in tiles.rows() for corner in boxes]
    assert tiles.count == len(run)
    missing = np.zeros(tiles.padded_shape, bool)
    padded = np.pad(wanted, list(zip(tiles.below, tiles.above, strict=True)))
    for corner in itertools.product(*tiles.starts):
        box = tuple(slice(a, a + n) for a, n in zip(corner, tiles.patch, strict=True))
        assert (box in run) == padded[box].any()
        if box not in run:
            missing[box] = True
    z, plane = tiles.inside
    missing = missing[(z, *plane)]
    assert not missing[wanted].any()
    slices, complete = tiles.cells()
    for cell in np.ndindex(complete.shape):
        place = tuple(axis[k] for axis, k in zip(slices, cell, strict=True))
        assert missing[place].size
        assert (missing[place] == (not complete[cell])).all()
    assert sum(missing[tuple(c)].size for c in itertools.product(*slices)) == missing.size


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
    masks = masks_of_models(guide, task, grid_of(scan.shape, 1.5))
    for part, mask in zip(task.parts, masks, strict=True):
        if mask is not None:
            own = nnunets_labels(task, part, np.ascontiguousarray(voxels))
            own[~kept_voxels(mask, patch_of(task, part))] = 0
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
    (mask, *others) = masks_of_models(guide, resolve_task("total"), grid_of(scan.shape, 1.5))
    assert not any(others)
    first = np.isin(plain, list(resolve_task("total").parts[0].labels.values()))
    # later models overwrite the first one, but where its classes are left they are its own
    inside = first & expanded(mask).T
    assert inside.any()
    np.testing.assert_array_equal(labels[inside], plain[inside])
    assert not labels.all(axis=(0, 1)).any()
    differs = (labels != plain) & first
    assert differs.any()
    assert not labels[differs].any()


def test_the_fast_model_is_asked_and_what_it_does_not_find_stays_empty(scan, monkeypatch):
    asked, masks = [], []
    predict = pipeline.predict

    def spy(context, model_image, task, **keywords):
        asked.append((task.name, task.resolution, context.options.deterministic))
        masks.append(keywords.get("masks"))
        return predict(context, model_image, task, **keywords)

    monkeypatch.setattr(pipeline, "predict", spy)
    fast = totalfast.segment(scan, fast=True, save_lowres=True, **TOTAL)
    totalfast.segment(scan, guided=True, **TOTAL)
    assert asked[1:] == [("total", "fast", True), ("total", "default", False)]
    rough = np.asarray(fast.dataobj).transpose(2, 1, 0)
    task = resolve_task("total", guided=True)
    expected = masks_of_models(rough, task, grid_of(scan.shape, 1.5))
    assert masks[:2] == [None, None]
    for mask, other in zip(masks[2], expected, strict=True):
        np.testing.assert_array_equal(mask.voxels, other.voxels)
        assert (mask.shape, mask.margin) == (other.shape, other.margin)
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


def test_a_mask_in_zeros_which_nnunet_crops_gives_no_labels(monkeypatch):
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
    (mask,) = masks_of_models(guide, resolve_task("body"), grid_of(scan.shape, 1.5))
    inside = expanded(mask).T
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
