"""The Python functions: sessions, threads, images in memory."""

from __future__ import annotations

import gc
import json
import logging
import threading
import weakref
from collections import Counter

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image

import totalfast
from tests.dicom_series import write_series
from totalfast.models import store
from totalfast.options import Options
from totalfast.run import prediction

pytestmark = pytest.mark.usefixtures("standins_are_used")


@pytest.fixture
def scan():
    values = np.random.default_rng(0).normal(0, 300, (40, 36, 30)).astype(np.int16)
    return nib.Nifti1Image(values, np.diag([-2.0, 2.0, 3.0, 1.0]))


QUICK = {"fastest": True, "device": "cpu", "quiet": True}


def test_segment_takes_an_image_and_returns_a_label_map(scan, tmp_path):
    result = totalfast.segment(scan, **QUICK)
    assert isinstance(result, nib.Nifti1Image)
    assert result.shape == scan.shape
    assert result.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(result.affine, scan.affine)
    assert b"urinary_bladder" in result.header.extensions[0].get_content()
    nib.save(scan, tmp_path / "scan.nii.gz")
    from_file = totalfast.segment(tmp_path / "scan.nii.gz", tmp_path / "seg.nii", ml=True, **QUICK)
    np.testing.assert_array_equal(result.dataobj, from_file.dataobj)
    np.testing.assert_array_equal(nib.load(tmp_path / "seg.nii").dataobj, from_file.dataobj)


def test_open_file_nrrd_and_dicom_give_the_labels_of_the_nifti_file(scan, tmp_path):
    nib.save(scan, tmp_path / "scan.nii.gz")
    sitk.WriteImage(sitk.ReadImage(tmp_path / "scan.nii.gz"), tmp_path / "scan.nrrd")
    lps = np.asarray(scan.dataobj)[:, ::-1]  # the x axis already points to the left
    folder = write_series(
        tmp_path / "dicom",
        lps.transpose(2, 1, 0),
        spacing_mm=(3.0, 2.0, 2.0),
        origin_mm=(0.0, -2.0 * 35, 0.0),
    )
    expected = np.asarray(totalfast.segment(scan, **QUICK).dataobj)
    assert expected.any()
    with (tmp_path / "scan.nii.gz").open("rb") as stream:
        for source in (stream, str(tmp_path / "scan.nrrd")):
            result = totalfast.segment(source, **QUICK)
            np.testing.assert_array_equal(result.dataobj, expected)
    converted = totalfast.segment(folder, **QUICK)
    assert nib.aff2axcodes(converted.affine) == ("L", "A", "S")
    np.testing.assert_array_equal(converted.dataobj, expected)


def test_failed_run_leaves_no_converted_dicom_files(scan, tmp_path, monkeypatch):
    folder = write_series(tmp_path / "dicom", np.zeros((5, 4, 4), np.int16))
    monkeypatch.setenv("TOTALSEG_WEIGHTS_PATH", str(tmp_path / "empty"))
    monkeypatch.setenv("TOTALFAST_OFFLINE", "1")
    with pytest.raises(totalfast.WeightsError):
        totalfast.segment(folder, tmp_path / "out", **QUICK)
    assert [path.name for path in tmp_path.iterdir()] == ["dicom"]


def test_second_call_of_a_session_loads_no_model(scan, monkeypatch):
    loads = []
    load = store.load_model
    monkeypatch.setattr(store, "load_model", lambda *a, **k: loads.append(a) or load(*a, **k))
    session = totalfast.Session(device="cpu")
    first = session.segment(scan, fastest=True, quiet=True)
    assert len(loads) == 1
    second = session.segment(scan, fastest=True, quiet=True)
    assert len(loads) == 1
    np.testing.assert_array_equal(first.dataobj, second.dataobj)


def test_session_with_keep_models_false_has_one_model_at_a_time_on_a_cpu(scan, monkeypatch):
    alive, most = weakref.WeakSet(), []
    load = store.load_model

    def counted(*arguments, **keywords):
        model = load(*arguments, **keywords)
        alive.add(model.forwards[0].body)
        most.append(len(alive))
        return model

    monkeypatch.setattr(store, "load_model", counted)
    results = []
    for keep in (False, True):
        most.clear()
        session = totalfast.Session(device="cpu", keep_models=keep)
        results.append(session.segment(scan, quiet=True))
        assert len(most) == 5
        assert max(most) == (5 if keep else 1)
        session = None
        gc.collect()
        assert not alive
    np.testing.assert_array_equal(*(result.dataobj for result in results))


def test_each_backend_loads_its_own_models(scan, monkeypatch):
    chosen, loads = [], []
    choose, load = store.choose_backend, store.load_model
    monkeypatch.setattr(
        store, "choose_backend", lambda *a: chosen.append(a[0]) or choose("torch", a[1])
    )
    monkeypatch.setattr(store, "load_model", lambda *a, **k: loads.append(k) or load(*a, **k))
    session = totalfast.Session(device="cpu")
    for backend in ("torch", "compile", "torch", "auto"):
        session.segment(scan, fastest=True, quiet=True, backend=backend)
    assert chosen == ["torch", "compile"]  # "auto" is torch in tests
    assert len(loads) == 2


def test_two_threads_of_one_session_give_equal_labels(scan):
    session = totalfast.Session(device="cpu")
    results, errors = [], []

    def work():
        try:
            results.append(session.segment(scan, fastest=True, quiet=True))
        except totalfast.TotalfastError as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    np.testing.assert_array_equal(results[0].dataobj, results[1].dataobj)


def test_failed_load_of_a_model_is_repeated_by_the_next_call(scan, monkeypatch):
    session = totalfast.Session(device="cpu")
    load = store.load_model

    def broken(*arguments, **keywords):
        raise totalfast.WeightsError("damaged")

    monkeypatch.setattr(store, "load_model", broken)
    with pytest.raises(totalfast.WeightsError, match="damaged"):
        session.segment(scan, fastest=True, quiet=True)
    monkeypatch.setattr(store, "load_model", load)
    assert session.segment(scan, fastest=True, quiet=True).shape == scan.shape


def test_the_library_prints_nothing(scan, capsys):
    totalfast.segment(scan, **QUICK)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_log_messages_are_upstreams(scan, caplog):
    with caplog.at_level(logging.INFO, logger="totalfast"):
        totalfast.segment(scan, **QUICK)
    assert "Using 'fastest' option: resampling to lower resolution (6mm)" in caplog.messages


@pytest.mark.parametrize("split", [False, True])
def test_scans_of_few_slices_and_only_zeros_are_segmented(split):
    for shape in ((40, 36, 7), (40, 36, 1)):
        scan = nib.Nifti1Image(np.zeros(shape, np.int16), np.diag([2.0, 2.0, 5.0, 1.0]))
        result = totalfast.segment(scan, force_split=split, **QUICK)
        assert result.shape == shape


def test_unknown_keywords_and_invalid_values_are_errors():
    session = totalfast.Session(device="cpu")
    with pytest.raises(totalfast.OptionError, match="unknown option 'fasst'"):
        session.segment("x.nii.gz", fasst=True)
    with pytest.raises(totalfast.OptionError, match="between 0 and 5, not 7"):
        session.segment("x.nii.gz", resampling_order=7)
    for step in (0, 1.01, float("nan")):
        with pytest.raises(totalfast.OptionError, match="tile_step_size must be above 0"):
            session.segment("x.nii.gz", tile_step_size=step)
    with pytest.raises(totalfast.UnsupportedError, match="accepts test=0 only"):
        session.segment("x.nii.gz", test=1)
    with pytest.raises(ValueError, match="Invalid device"):
        totalfast.Session(device="tpu")


def test_tile_step_size_changes_the_task_but_not_its_rough_model():
    task = Options(task="lung_vessels").resolved_task()
    changed = Options(task="lung_vessels", tile_step_size=0.9).resolved_task()
    assert (task.tile_step, changed.tile_step) == (0.5, 0.9)
    assert changed.crop == task.crop
    assert changed.crop.rough.tile_step == 0.8
    assert Options().resolved_task().tile_step == 0.8


def test_larger_tile_step_size_predicts_fewer_tiles(monkeypatch):
    counts = []
    place = prediction._windows
    monkeypatch.setattr(prediction, "_windows", lambda *a: counts.append(place(*a)) or counts[-1])
    scan = nib.Nifti1Image(np.zeros((20, 20, 130), np.int16), np.diag([6.0, 6.0, 6.0, 1.0]))
    for step in (None, 1.0):
        totalfast.segment(scan, tile_step_size=step, **QUICK)
    default, few = (prediction._tile_count(windows) for windows in counts)
    assert few < default


def test_licence_number_is_checked_once_by_upstream_and_stored(monkeypatch, tmp_path):
    checked = []
    monkeypatch.setattr(
        "totalsegmentator.config.is_valid_license",
        lambda number: checked.append(number) or number == "a" * 18,
    )
    monkeypatch.setenv("TOTALSEG_HOME_DIR", str(tmp_path))
    with pytest.raises(totalfast.LicenseError, match="Invalid license number"):
        totalfast.segment("none.nii.gz", license_number="wrong", **QUICK)
    for _ in range(2):
        with pytest.raises(totalfast.InputError, match="does not exist"):
            totalfast.segment("none.nii.gz", license_number="a" * 18, **QUICK)
    assert checked == ["wrong", "a" * 18]
    assert json.loads((tmp_path / "config.json").read_text())["license_number"] == "a" * 18
    assert "aaa" not in repr(Options(license_number="a" * 18))


def test_legacy_resampling_changes_the_labels_and_excludes_linear_export(scan):
    nearest = totalfast.segment(scan, **QUICK)
    smooth = totalfast.segment(scan, higher_order_resampling_LEGACY=True, **QUICK)
    assert 0.01 < np.mean(np.asarray(nearest.dataobj) != np.asarray(smooth.dataobj)) < 0.7
    with pytest.raises(totalfast.OptionError, match="does not work with"):
        Options(export="linear", higher_order_resampling_LEGACY=True)


def test_missing_scan_is_an_error_before_a_model_is_downloaded(tmp_path, monkeypatch):
    monkeypatch.setenv("TOTALSEG_WEIGHTS_PATH", str(tmp_path / "empty"))
    monkeypatch.setattr(
        "totalfast.weights.install.fetch", lambda *a, **k: pytest.fail("downloaded a model")
    )
    with pytest.raises(totalfast.InputError, match=r"nothere\.nii\.gz does not exist"):
        totalfast.segment(tmp_path / "nothere.nii.gz", **QUICK)
    assert list(tmp_path.iterdir()) == []


def test_linear_export_equals_the_argmax_of_interpolated_logits(scan):
    """The reference resamples all logits with scipy, class by class. The scan is not RAS+."""
    from scipy import ndimage

    from totalfast.engine.normalise import to_network_image
    from totalfast.engine.sliding_window import predict_logits
    from totalfast.engine.tiles import Tiling
    from totalfast.files.read import open_scan, read_image
    from totalfast.resampling.model_grid import to_model_grid

    result = totalfast.segment(scan, export="linear", **QUICK)
    session = totalfast.Session(device="cpu")
    options = Options(fastest=True, device="cpu")
    task = options.resolved_task()
    model = session.models.load(task, task.parts[0], device="cpu").result()
    image = to_model_grid(
        read_image(open_scan(scan)), spacing_mm=task.spacing_mm, order=1, threads=1
    )
    network = to_network_image(image.voxels[None], spacing_mm=(6.0, 6.0, 6.0), model=model)
    assert network.cropped_shape == network.full_shape == tuple(network.voxels.shape[1:])
    logits = predict_logits(model, network.voxels, Tiling(step=task.tile_step))
    target = image.canonical.shape[::-1]
    zoom = [m / n for n, m in zip(logits.shape[1:], target, strict=True)]
    resampled = np.stack(
        [
            ndimage.zoom(channel, zoom, output=np.float64, order=1, mode="nearest")
            for channel in logits.numpy().astype(np.float64)
        ]
    ).astype(np.float16)
    expected = resampled.argmax(0).T[::-1]  # (x, y, z); the scan's x axis points to the left
    np.testing.assert_array_equal(np.asarray(result.dataobj), expected)
    nearest = np.asarray(totalfast.segment(scan, **QUICK).dataobj)
    assert 0 < np.mean(nearest != expected) < 0.7


def test_linear_export_works_with_several_models(scan):
    smooth = totalfast.segment(scan, task="total_mr", export="linear", device="cpu", quiet=True)
    assert smooth.shape == scan.shape
    assert len(np.unique(smooth.dataobj)) > 1


def test_linear_export_with_incompatible_options_is_an_error(scan):
    for wrong in ({"save_lowres": True}, {"force_split": True}):
        with pytest.raises(totalfast.OptionError, match="export='linear'"):
            totalfast.segment(scan, export="linear", **QUICK, **wrong)


@pytest.mark.parametrize(
    ("ml", "output", "picture"),
    [
        (False, "masks", "masks/preview_total.png"),
        (True, "label/seg.nii.gz", "label/preview_total.png"),
    ],
)
def test_preview_is_drawn_beside_the_result(scan, tmp_path, ml, output, picture):
    totalfast.segment(
        scan, tmp_path / output, fastest=True, ml=ml, preview=True, device="cpu", quiet=True
    )
    with Image.open(tmp_path / picture) as drawn:
        assert min(drawn.size) > 300


def test_preview_without_an_output_gives_a_warning_and_no_picture(scan, caplog):
    with caplog.at_level("WARNING", logger="totalfast"):
        totalfast.segment(scan, fastest=True, preview=True, device="cpu", quiet=True)
    assert any("Skipping preview" in message for message in caplog.messages)


def test_several_tasks_give_the_files_of_single_runs_and_read_the_scan_once(
    scan, tmp_path, monkeypatch
):
    from totalfast.run import pipeline

    tasks = ["liver_segments", "body", "total"]
    calls = []
    for name in ("read_image", "to_model_grid", "predict"):
        function = getattr(pipeline, name)
        monkeypatch.setattr(
            pipeline, name, lambda *a, _f=function, _n=name, **k: calls.append(_n) or _f(*a, **k)
        )
    keywords = {"device": "cpu", "quiet": True, "backend": "torch"}
    with totalfast.Session() as session:
        single = {}
        for task in tasks:
            single[task] = session.segment(scan, tmp_path / "one" / task, task=task, **keywords)
        alone = Counter(calls)
        calls.clear()
        together = session.segment_tasks(scan, tmp_path / "all", tasks, **keywords)
    assert list(together) == tasks
    for task in tasks:
        np.testing.assert_array_equal(together[task].dataobj, single[task].dataobj)
        files = sorted(path.name for path in (tmp_path / "one" / task).iterdir())
        assert files
        assert sorted(path.name for path in (tmp_path / "all" / task).iterdir()) == files
        for name in files:
            one, other = (tmp_path / place / task / name for place in ("one", "all"))
            assert one.read_bytes() == other.read_bytes()
    assert (alone["read_image"], Counter(calls)["read_image"]) == (3, 1)
    assert Counter(calls)["to_model_grid"] < alone["to_model_grid"]
    with pytest.raises(totalfast.OptionError, match="named twice"):
        session.segment_tasks(scan, tmp_path / "x", ["body", "body"], **keywords)
    with pytest.raises(totalfast.OptionError, match="can't be shared"):
        session.segment_tasks(
            scan, tmp_path / "x", ["body", "total"], report=tmp_path / "r.json", **keywords
        )
    assert not (tmp_path / "x").exists()
