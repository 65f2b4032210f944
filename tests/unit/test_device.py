"""What a CUDA device is asked to do, on a double that counts; see ``device_double``."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from nnunetv2.preprocessing.normalization import default_normalization_schemes as schemes

import totalfast
from tests.device_double import DEVICE, device_double
from totalfast.engine.device_queue import TILES_AHEAD, TileQueue
from totalfast.engine.normalise import _normalise_ct
from totalfast.engine.source_image import SourceImage
from totalfast.engine.tiles import Tiling
from totalfast.run import device_plan, pipeline, prediction, warm_up
from totalfast.system import progress
from totalfast.system.memory import free_device_bytes

pytestmark = pytest.mark.usefixtures("standins_are_used")

FASTEST = {"fastest": True, "backend": "torch", "quiet": True}
TOTAL = {"backend": "torch", "quiet": True}


@pytest.fixture
def double(monkeypatch):
    monkeypatch.setattr(warm_up, "_warm", set())
    with device_double(monkeypatch) as double:
        yield double


def scan_of(shape, mm):
    values = np.random.default_rng(0).normal(0, 300, shape).astype(np.int16)
    return nib.Nifti1Image(values, np.diag([-mm, mm, mm, 1.0]))


@pytest.fixture
def long_scan():
    """Several tiles along z at 6 mm."""
    return scan_of((30, 30, 200), 6.0)


@pytest.fixture
def small_scan():
    """One tile for each of the five models at 1.5 mm."""
    return scan_of((40, 36, 30), 1.5)


def labels_of(image):
    return np.asanyarray(image.dataobj)


def assert_nearly_equal(image, other):
    """The device computes the last layer of a whole tile at once, with other last bits."""
    assert labels_of(image).any()
    assert np.mean(labels_of(image) != labels_of(other)) < 1e-4


def test_labels_of_the_device_are_the_cpus(double, long_scan):
    on_device = totalfast.segment(long_scan, device="gpu", **FASTEST)
    assert double.downloads
    assert_nearly_equal(on_device, totalfast.segment(long_scan, device="cpu", **FASTEST))


def test_the_host_never_waits_within_a_model(double, long_scan):
    with totalfast.Session() as session:
        session.segment(long_scan, **FASTEST)
        double.reset()
        session.segment(long_scan, **FASTEST)
    voxels = long_scan.shape[0] * long_scan.shape[1] * long_scan.shape[2]
    assert not double.waits
    assert double.uploads == [4 * voxels]
    slabs = double.downloads[1] // 4
    assert double.downloads == [voxels, 4 * slabs]  # labels, and one number per slab
    assert 1 < slabs <= double.events - 2  # an event per tile, and per download


def test_five_models_get_the_image_once(double, small_scan):
    with totalfast.Session() as session:
        session.segment(small_scan, **TOTAL)
        double.reset()
        session.segment(small_scan, **TOTAL)
    assert not double.waits
    assert double.uploads == [4 * 40 * 36 * 30]
    assert len(double.downloads) == 2 * 5


def test_a_session_leaves_nothing_on_the_device(double, small_scan):
    with totalfast.Session() as session:
        session.segment(small_scan, **TOTAL)
        first = double.allocated
        session.segment(small_scan, **TOTAL)
        assert double.allocated == first
    # Nothing but the Gaussian weights of a tile, float16, which nnU-Net keeps for the process.
    assert double.allocated in (0, 2 * 72 * 72 * 64)


@pytest.mark.parametrize(
    ("share", "place"),
    [
        (1.1, "the image and the sums of logits are on the GPU"),
        (0.99, "tile by tile"),
        (0.55, "summed up on the CPU"),
    ],
)
def test_the_plan_follows_the_free_memory(double, long_scan, monkeypatch, caplog, share, place):
    needs, need = [], device_plan._need
    monkeypatch.setattr(device_plan, "_need", lambda *a: needs.append(need(*a)) or needs[-1])
    with totalfast.Session() as session:
        whole = session.segment(long_scan, **FASTEST)
        session.segment(long_scan, **FASTEST)
        assert needs[0] > needs[-1]  # the weights are there now
        double.limit = double.allocated + int(share * needs[-1] / device_plan.DEVICE_SHARE)
        caplog.set_level(logging.INFO, logger="totalfast")
        again = session.segment(long_scan, **FASTEST)
    (plan,) = [line for line in caplog.messages if line.startswith("GPU memory: ")]
    assert place in plan
    assert not [line for line in caplog.messages if "memory is too small" in line]
    np.testing.assert_array_equal(labels_of(again), labels_of(whole))


def test_kept_blocks_are_free_and_a_fraction_is_a_limit(double, monkeypatch):
    held = torch.zeros(1000, device=DEVICE)
    free = free_device_bytes(DEVICE)
    assert free == double.limit - double.allocated < double.limit
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *_: double.allocated + 10**9)
    assert free_device_bytes(DEVICE) == free  # all of it was free without the kept blocks
    double.used_by_others = 10**11
    assert free_device_bytes(DEVICE) == free - 10**11 + 10**9
    double.fraction = 0.5
    assert free_device_bytes(DEVICE) == free - 0.5 * double.limit
    del held


def test_models_of_other_tasks_leave_a_small_device(
    double, small_scan, long_scan, monkeypatch, caplog
):
    caplog.set_level(logging.INFO, logger="totalfast")
    needs, need = [], device_plan._need
    monkeypatch.setattr(device_plan, "_need", lambda *a: needs.append(need(*a)) or needs[-1])
    with totalfast.Session() as session:
        session.segment(small_scan, **TOTAL)
        session.segment(long_scan, **FASTEST)
        session.segment(long_scan, **FASTEST)
        assert len(session.models._models) == 6
        # The memory is a little too small, unless the other five models leave.
        needed = int(needs[-1] / device_plan.DEVICE_SHARE)
        double.used_by_others = double.limit - double.allocated - needed + 1000
        session.segment(long_scan, **FASTEST)
        assert len(session.models._models) == 1
    plans = [line for line in caplog.messages if line.startswith("GPU memory: ")]
    assert all("the image and the sums" in plan for plan in plans)


def test_memory_that_ends_in_spite_of_the_plan_is_one_warning(
    double, long_scan, monkeypatch, caplog
):
    bars = []
    advance = progress.Progress.advance
    monkeypatch.setattr(
        progress.Progress, "advance", lambda bar, work: bars.append(work) or advance(bar, work)
    )
    with totalfast.Session() as session:
        whole = session.segment(long_scan, **FASTEST)
        tiles, bars[:] = np.count_nonzero(bars), []
        double.reset()
        double.allocations = 0
        session.segment(long_scan, **FASTEST)
        assert np.count_nonzero(bars) == tiles
        for place in (0.3, 0.6, 0.9):
            caplog.clear()
            bars.clear()
            double.fail_at, double.allocations = int(place * double.allocations), 0
            again = session.segment(long_scan, **FASTEST)
            np.testing.assert_array_equal(labels_of(again), labels_of(whole))
            warnings = [line for line in caplog.messages if line.startswith("WARNING: the GPU")]
            assert len(warnings) == 1
            assert "image tile by tile" in warnings[0]
            assert np.count_nonzero(bars) == tiles  # no tile is counted twice
            double.fail_at, double.allocations = -1, 0
            session.segment(long_scan, **FASTEST)


def test_a_device_that_is_too_small_is_one_error(double, long_scan, tmp_path, caplog):
    with totalfast.Session() as session:
        session.segment(long_scan, **FASTEST)
        double.used_by_others = double.limit - double.allocated - 10**6
        caplog.clear()
        with pytest.raises(totalfast.DeviceMemoryError, match="--device cpu"):
            session.segment(long_scan, tmp_path / "seg.nii.gz", ml=True, **FASTEST)
    assert not list(tmp_path.iterdir())


def test_a_device_without_room_for_weights_is_one_error(double, long_scan):
    double.limit = 10**4
    with pytest.raises(totalfast.DeviceMemoryError, match="memory is too small"):
        totalfast.segment(long_scan, **FASTEST)


def test_weights_find_room_where_other_models_were(double, long_scan, small_scan):
    with totalfast.Session() as session:
        session.segment(small_scan, **TOTAL)
        double.fail_at = double.allocations + 3  # while the next model goes to the device
        session.segment(long_scan, **FASTEST)
        assert double.allocations > double.fail_at


def test_a_logit_that_is_not_finite_is_an_error(double, long_scan, monkeypatch):
    with totalfast.Session() as session:
        session.segment(long_scan, **FASTEST)
        for future in session.models._models.values():
            forward = future.result().forwards[0]
            with torch.no_grad():
                forward.head.bias[3] = torch.inf
        with pytest.raises(totalfast.PredictionError, match="infinite or NaN"):
            session.segment(long_scan, **FASTEST)


def test_a_rough_pass_is_deterministic(double, monkeypatch):
    tilings = []
    queue = prediction.queue_part
    monkeypatch.setattr(
        prediction,
        "queue_part",
        lambda *a, **k: tilings.append(k["tiling"].deterministic) or queue(*a, **k),
    )
    scan = scan_of((60, 60, 60), 4.0)
    totalfast.segment(scan, roi_subset=["liver"], **TOTAL)
    assert tilings[0]
    assert not any(tilings[1:])
    totalfast.segment(scan, fastest=True, deterministic=True, **TOTAL)
    assert tilings[-1]


def test_a_first_tile_runs_while_the_scan_is_read(double, long_scan, monkeypatch):
    ran = []
    run_tile = warm_up._run_tile
    monkeypatch.setattr(
        warm_up, "_run_tile", lambda *a, **k: ran.append(k["deterministic"]) or run_tile(*a, **k)
    )
    read = pipeline.read_image

    def slowly(scan):
        while not ran:
            pass
        return read(scan)

    monkeypatch.setattr(pipeline, "read_image", slowly)
    with totalfast.Session() as session:
        session.segment(long_scan, **FASTEST)
        assert ran == [False]
        assert len(warm_up._warm) == 1


@pytest.mark.parametrize("forward", [(0, 1, 2), (2, 0, 1)])
@pytest.mark.parametrize("border", [0, 3])
def test_an_image_that_is_normalised_on_the_device_has_the_same_bits(double, forward, border):
    voxels = np.random.default_rng(1).normal(0, 900, (1, 20, 24, 28)).astype(np.float32)
    if border:
        voxels[:, :border] = voxels[..., -border:] = 0
    properties = {
        "mean": -370.00039267657144,
        "std": 436.5998675471528,
        "percentile_00_5": -1024.0,
        "percentile_99_5": 276.0,
    }
    model = SimpleNamespace(
        folder="model",
        plans=SimpleNamespace(
            transpose_forward=list(forward),
            foreground_intensity_properties_per_channel={"0": properties},
        ),
        configuration=SimpleNamespace(
            normalization_schemes=["CTNormalization"],
            use_mask_for_norm=[False],
            spacing=[3.0, 3.0, 3.0],
        ),
    )
    source = SourceImage(voxels, spacing_mm=(3.0, 3.0, 3.0))
    on_cpu = source.prepared(model, device=torch.device("cpu"))
    on_device = source.prepared(model, device=DEVICE)
    assert on_device.voxels.device == DEVICE
    assert torch.equal(on_device.voxels.cpu(), on_cpu.voxels)
    assert on_device.box == on_cpu.box
    assert (on_device.full_shape, on_device.cropped_shape, on_device.spacing_mm) == (
        on_cpu.full_shape,
        on_cpu.cropped_shape,
        on_cpu.spacing_mm,
    )
    theirs = schemes.CTNormalization(False, properties).run(voxels[0].copy())
    channel = torch.from_numpy(voxels[0].copy())
    _normalise_ct(channel, properties=properties)
    np.testing.assert_array_equal(channel.numpy().view(np.int32), theirs.view(np.int32))
    model.configuration.normalization_schemes = ["ZScoreNormalization"]
    assert source.prepared(model, device=DEVICE).voxels.device.type == "cpu"


def test_the_host_stays_a_few_tiles_ahead(monkeypatch):
    done, waited, counted = [], [], []

    class Event:
        def __init__(self, **_):
            self.number = len(events)
            events.append(self)

        def record(self, stream):
            pass

        def query(self):
            return self.number in done

        def synchronize(self):
            waited.append(self.number)

    events = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    queue = TileQueue(torch.device("cuda"), lambda: counted.append(len(events)))
    for _ in range(TILES_AHEAD):
        queue.add()
    assert not waited
    assert not counted
    queue.add()
    assert waited == [0]
    assert len(counted) == 1
    done.extend([1, 2, 4])
    queue.add()
    assert len(counted) == 3  # not the fourth, which waits behind an unfinished one
    queue.end()
    assert len(counted) == len(events)
    assert max(waited) < 3


def test_smaller_ways_end():
    ways = [Tiling(step=0.5)]
    while (smaller := ways[-1].smaller()) is not None:
        ways.append(smaller)
    assert [(way.on_device, way.image_on_device) for way in ways] == [
        (True, True),
        (True, False),
        (False, False),
    ]
    assert len({str(way) for way in ways}) == 3


def test_linear_export_on_the_device_gives_the_cpus_labels(double, long_scan):
    linear = FASTEST | {"export": "linear"}
    fine = scan_of((60, 60, 80), 3.0)
    on_device = totalfast.segment(fine, device="gpu", **linear)
    assert_nearly_equal(on_device, totalfast.segment(fine, device="cpu", **linear))
    assert sum(double.downloads) < 4 * 60 * 60 * 80  # labels, not logits


@pytest.mark.parametrize("export", ["auto", "linear"])
def test_guided_runs_on_the_device_give_the_cpus_labels(double, export, monkeypatch):
    scan = scan_of((60, 50, 200), 1.5)
    guide = np.zeros((50, 12, 15), dtype=np.uint8)
    guide[8:11, 4:9, 10:14] = 1
    monkeypatch.setattr(pipeline, "_guiding_labels", lambda *_: guide)
    monkeypatch.setattr(pipeline, "clean", lambda context, labels, *_: labels)
    body = {"task": "body", "export": export, **TOTAL}
    on_cpu = totalfast.segment(scan, guided=True, device="cpu", **body)
    double.reset()
    assert_nearly_equal(totalfast.segment(scan, guided=True, device="gpu", **body), on_cpu)
    assert not double.waits or export == "linear"
    assert not labels_of(on_cpu).all()


def test_without_page_locked_memory_labels_arrive_all_the_same(double, long_scan, monkeypatch):
    expected = totalfast.segment(long_scan, **FASTEST)
    empty = torch.empty

    def refused(*arguments, **keywords):
        if keywords.get("pin_memory"):
            raise RuntimeError("CUDA error: out of memory")
        return empty(*arguments, **keywords)

    monkeypatch.setattr(torch, "empty", refused)
    np.testing.assert_array_equal(
        labels_of(totalfast.segment(long_scan, **FASTEST)), labels_of(expected)
    )
