"""Exports on a device, run here on CPU tensors: labels of the compiled loops, few waits."""

from __future__ import annotations

import collections

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from totalfast.export import device_labels, device_slab, export_labels, on_device, resampling_axes
from totalfast.export.cell_export import CellExport
from totalfast.export.host_labels import empty_labels, signed
from totalfast.export.nearest_on_device import fill_nearest
from totalfast.export.on_device import DeviceExport
from totalfast.geometry import CENTERS, CORNERS, interpolation_weights, nearest_indices

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
DTYPES = ["float16", "float32", "float64"]


def noise(random, classes, shape):
    return random.normal(size=(classes, *shape))


def structured(random, classes, shape):
    """Smooth logits: one class wins in most cells, two to many near the borders."""
    coarse = random.normal(size=(1, classes, *(n // 4 + 2 for n in shape)))
    smooth = torch.nn.functional.interpolate(torch.from_numpy(coarse), shape, mode="trilinear")
    return 5 * smooth[0].numpy()


def ties(random, classes, shape):
    """Few different values, so that rounding and the order of classes decide."""
    return random.integers(-2, 2, size=(classes, *shape)) * 0.5


def nearly_ties(random, classes, shape, unit=2.0**-10):
    """Within one unit in float16's last place of one another."""
    first = random.normal(size=(1, *shape))
    return first + random.integers(-1, 2, size=(classes, *shape)) * np.abs(first) * unit


def nearly_ties_in_float32(random, classes, shape):
    return nearly_ties(random, classes, shape, unit=2.0**-23)


def not_finite(random, classes, shape):
    logits = noise(random, classes, shape)
    places = random.integers(0, logits.size, 4)
    logits.reshape(-1)[places] = [np.nan, np.inf, -np.inf, 0]
    return logits


def tiny(random, classes, shape):
    """Below the normal numbers of float16."""
    return noise(random, classes, shape) * 2.0**-20


def large(random, classes, shape):
    """Near float16's largest number."""
    return 65504 * (1 - random.random((classes, *shape)) * 2**-8)


def around_overflow(random, classes, shape):
    """Above float16's largest number; without that, they would be rounded to two numbers."""
    return 65540 + 60 * random.random((classes, *shape))


MAKERS = [
    noise,
    structured,
    ties,
    nearly_ties,
    nearly_ties_in_float32,
    not_finite,
    tiny,
    large,
]


def by_cells(logits, axes, dtype, regions, out_dtype=np.uint8):
    out = np.full([len(axis.lower) for axis in axes], 9, out_dtype)
    with CellExport(axes, out, rounded_to=dtype, regions=regions, threads=1) as export:
        export.add(0, logits)
    return out


def by_device(logits, axes, dtype, regions, out_dtype=np.uint8, slices=99, device="cpu"):
    """Slab by slab as from a sliding window, which uses the memory again."""
    out = np.full([len(axis.lower) for axis in axes], 9, out_dtype)
    with DeviceExport(axes, out, rounded_to=dtype, regions=regions) as export:
        for start in range(0, logits.shape[1], slices):
            slab = logits[:, start : start + slices].to(device, copy=True)
            export.add(start, slab)
            slab.fill_(99)
    return out


def check(logits, axes, dtype, regions=None, **options):
    out_dtype = options.get("out_dtype", np.uint8)
    expected = by_cells(logits, axes, dtype, regions, out_dtype)
    result = by_device(logits, axes, dtype, regions, **options)
    np.testing.assert_array_equal(result, expected)
    return result


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", DEVICES)
def test_labels_are_those_of_the_compiled_loops(make, dtype, device):
    random = np.random.default_rng(0)
    for classes, source, target in (
        (7, (6, 7, 8), (17, 15, 20)),
        (40, (5, 6, 7), (13, 6, 9)),  # more candidates in a cell than there are slots
        (3, (9, 8, 10), (5, 3, 10)),
        (1, (3, 3, 3), (4, 5, 6)),
    ):
        logits = torch.from_numpy(make(random, classes, source).astype(dtype))
        for coordinates in (CENTERS, CORNERS):
            axes = resampling_axes(source, target, coordinates, None)
            check(logits, axes, dtype, device=device)


@pytest.mark.parametrize("separate", [0, 1, 2])
@pytest.mark.parametrize("make", [noise, structured, not_finite])
@pytest.mark.parametrize("regions", [None, (3, 1, 2, 300, 5)])
def test_an_axis_may_be_resampled_by_nearest_neighbour(separate, make, regions):
    source, target = (6, 7, 8), (13, 10, 20)
    logits = torch.from_numpy(make(np.random.default_rng(1), 5, source).astype(np.float16))
    axes = resampling_axes(source, target, CENTERS, separate)
    labels = check(logits, axes, "float16", regions, out_dtype=np.uint16)
    assert len(np.unique(labels)) > 2


@pytest.mark.parametrize("make", [noise, structured, ties, not_finite, tiny])
@pytest.mark.parametrize("dtype", DTYPES)
def test_regions(make, dtype):
    source, target = (6, 7, 8), (13, 5, 20)
    logits = torch.from_numpy(make(np.random.default_rng(2), 4, source).astype(dtype))
    axes = resampling_axes(source, target, CENTERS, None)
    labels = check(logits, axes, dtype, regions=(2, 1, 7, 3), slices=2)
    assert len(np.unique(labels)) > 2


@pytest.mark.parametrize("infinite", [np.inf, -np.inf])
def test_a_region_with_infinite_logits(infinite):
    """Infinity times a weight of 0 is NaN, and that is outside."""
    logits = noise(np.random.default_rng(11), 3, (4, 5, 6)).astype(np.float16)
    logits[1] = infinite
    axes = resampling_axes((4, 5, 6), (7, 9, 11), CORNERS, None)
    labels = check(torch.from_numpy(logits), axes, "float16", regions=(1, 2, 3))
    assert (2 in labels) == (infinite > 0)


@pytest.mark.parametrize(
    ("classes", "regions", "out_dtype"),
    [
        (255, None, np.uint8),
        (9, range(246, 255), np.uint8),
        (300, None, np.uint16),
        (9, range(65500, 65509), np.uint16),
    ],
)
def test_large_labels(classes, regions, out_dtype):
    logits = noise(np.random.default_rng(3), classes, (3, 4, 5)).astype(np.float32)
    axes = resampling_axes((3, 4, 5), (5, 6, 7), CENTERS, None)
    labels = check(torch.from_numpy(logits), axes, "float32", regions, out_dtype=out_dtype)
    assert labels.max() > 2 ** (8 * labels.itemsize - 1) or classes == 300


@pytest.mark.parametrize("make", [noise, nearly_ties, tiny, around_overflow])
def test_logits_may_be_more_exact_than_what_they_are_rounded_to(make):
    axes = resampling_axes((4, 5, 6), (13, 6, 9), CENTERS, None)
    logits = torch.from_numpy(make(np.random.default_rng(7), 9, (4, 5, 6)).astype(np.float32))
    check(logits, axes, "float16")


@pytest.mark.parametrize("largest", [1.9, np.finfo(np.float32).max])
def test_float32_does_not_decide_within_its_errors(largest):
    ulps = np.random.default_rng(12).integers(0, 5, size=(2, 6, 9, 10))
    logits = (largest * (1 - ulps * 2.0**-24)).astype(np.float32)
    axes = resampling_axes((6, 9, 10), (40, 50, 60), CENTERS, None)
    check(torch.from_numpy(logits), axes, "float32")


@pytest.mark.parametrize("source", [(1, 1, 1), (1, 5, 4), (5, 1, 1), (2, 2, 1)])
@pytest.mark.parametrize("target", [(1, 1, 1), (3, 3, 3), (1, 9, 2)])
def test_axes_of_one_voxel(source, target):
    logits = torch.from_numpy(noise(np.random.default_rng(4), 6, source).astype(np.float16))
    for coordinates in (CENTERS, CORNERS):
        for slices in (1, 99):
            axes = resampling_axes(source, target, coordinates, None)
            check(logits, axes, "float16", slices=slices)


@pytest.mark.parametrize("empty", [0, 1, 2])
def test_an_empty_target_takes_slices(empty):
    axes = resampling_axes((4, 4, 4), (4, 4, 4), CENTERS, None)
    axes[empty] = interpolation_weights(np.empty(0), 4)
    labels = check(torch.zeros((3, 4, 4, 4), dtype=torch.half), axes, "float16", slices=2)
    assert labels.size == 0


@pytest.mark.parametrize("slices", [1, 3, 4, 99])
@pytest.mark.parametrize("target_slices", [4, 11, 40])
@pytest.mark.parametrize("bytes_at_a_time", [1, 2**27])
def test_slabs_and_parts_of_any_size(monkeypatch, slices, target_slices, bytes_at_a_time):
    monkeypatch.setattr(device_slab, "BYTES_AT_A_TIME", bytes_at_a_time)
    source, target = (11, 6, 7), (target_slices, 13, 9)
    logits = torch.from_numpy(structured(np.random.default_rng(5), 24, source).astype(np.float16))
    axes = resampling_axes(source, target, CENTERS, None)
    expected = by_cells(logits, axes, "float16", None)
    for voxels in (1, 13 * 9 * 5, 2**26):
        monkeypatch.setattr(on_device, "TARGET_VOXELS", voxels)
        for source_bytes in (1, 3 * logits[:, 0].nbytes, 2**28):
            monkeypatch.setattr(on_device, "SOURCE_BYTES", source_bytes)
            result = by_device(logits, axes, "float16", None, slices=slices)
            np.testing.assert_array_equal(result, expected)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    make=st.sampled_from([noise, ties, nearly_ties, nearly_ties_in_float32, not_finite]),
    classes=st.integers(1, 20),
    dtype=st.sampled_from(DTYPES),
    shape=st.tuples(*3 * [st.integers(1, 4)]),
    target=st.tuples(*3 * [st.integers(1, 9)]),
    slices=st.integers(1, 4),
    regions=st.booleans(),
)
def test_any_logits(seed, make, classes, dtype, shape, target, slices, regions):
    random = np.random.default_rng(seed)
    scale = 10.0 ** random.uniform(-4, 4)
    with np.errstate(over="ignore"):
        logits = torch.from_numpy((make(random, classes, shape) * scale).astype(dtype))
    axes = resampling_axes(shape, target, CENTERS, None)
    labels = random.permutation(classes) if regions else None
    check(logits, axes, dtype, labels, slices=slices)


def test_few_voxels_are_compared_exactly(monkeypatch):
    """The step before settles the rest, whatever the number of candidates."""
    marked = []
    exactly = device_labels._compare_exactly

    def watch(undecided, marks, labels):
        marked.append((marks > 0).double().mean().item())
        exactly(undecided, marks, labels)

    monkeypatch.setattr(device_labels, "_compare_exactly", watch)
    axes = resampling_axes((6, 7, 8), (17, 15, 20), CENTERS, None)
    for classes in (2, 5, 12, 40):
        logits = structured(np.random.default_rng(10), classes, (6, 7, 8)).astype(np.float32)
        check(torch.from_numpy(logits), axes, "float32")
    assert len(marked) == 4
    assert max(marked) < 0.002


class Waits(TorchDispatchMode):
    """Counts calls for which the host waits for a device, because it needs a number from there."""

    OPERATIONS = ("nonzero", "masked_select", "_unique2", "bincount", "_local_scalar_dense")
    METHODS = ("tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")

    def __init__(self, monkeypatch):
        super().__init__()
        self.calls = collections.Counter()
        for name in self.METHODS:
            monkeypatch.setattr(torch.Tensor, name, self.counted(name, getattr(torch.Tensor, name)))

    def counted(self, name, method):
        def call(tensor, *args, **keywords):
            self.calls[name] += 1
            return method(tensor, *args, **keywords)

        return call

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation._schema.name.removeprefix("aten::")
        self.calls[name] += name in self.OPERATIONS
        return operation(*args, **(kwargs or {}))

    def total(self):
        return {name: count for name, count in self.calls.items() if count}


@pytest.mark.parametrize("make", [noise, structured, ties, not_finite])
@pytest.mark.parametrize(
    ("regions", "expected"),
    [(None, {"nonzero": 3, "tolist": 1}), (tuple(range(24)), {"nonzero": 1})],
)
def test_the_number_of_waits_does_not_grow_with_the_slices(make, regions, expected, monkeypatch):
    monkeypatch.setattr(device_slab, "BYTES_AT_A_TIME", 2**18)  # more batches for more slices
    for slices in (3, 8, 16):
        logits = make(np.random.default_rng(6), 24, (slices, 8, 9)).astype(np.float16)
        axes = resampling_axes((slices, 8, 9), (3 * slices, 20, 20), CENTERS, None)
        with monkeypatch.context() as patch, Waits(patch) as waits:
            by_device(torch.from_numpy(logits), axes, "float16", regions)
        assert waits.total() == expected


@pytest.mark.parametrize("make", [noise, structured, ties, not_finite, tiny])
@pytest.mark.parametrize("coordinates", [CENTERS, CORNERS])
@pytest.mark.parametrize(
    ("classes", "regions"), [(7, None), (300, None), (5, (3, 1, 2, 4, 5)), (3, (1, 60000, 2))]
)
@pytest.mark.parametrize("device", DEVICES)
def test_nearest_on_a_device(monkeypatch, make, coordinates, classes, regions, device):
    random = np.random.default_rng(8)
    for target in ((17, 15, 20), (3, 4, 5), (6, 7, 8), (1, 1, 1), (6, 7, 9)):
        logits = torch.from_numpy(make(random, classes, (6, 7, 8)).astype(np.float16))
        options = {"coordinates": coordinates, "regions": regions, "labels": 300}
        expected = export_labels(logits, target, method="nearest", **options)
        indices = [
            nearest_indices(n, m, coordinates) for n, m in zip((6, 7, 8), target, strict=True)
        ]
        for bytes_at_a_time in (1, 700, 2**27):
            monkeypatch.setattr(device_slab, "BYTES_AT_A_TIME", bytes_at_a_time)
            labels = np.full(target, 9, expected.dtype)
            fill_nearest(labels, logits.to(device), indices, regions=regions)
            np.testing.assert_array_equal(labels, expected)


@pytest.mark.parametrize("regions", [None, (1, 2, 3, 4)])
def test_nearest_on_a_device_waits_once_at_the_end(regions, monkeypatch):
    logits = torch.from_numpy(noise(np.random.default_rng(9), 4, (6, 7, 8)))
    indices = [nearest_indices(n, 2 * n) for n in (6, 7, 8)]
    monkeypatch.setattr(device_slab, "BYTES_AT_A_TIME", 1)
    with monkeypatch.context() as patch, Waits(patch) as waits:
        fill_nearest(np.empty((12, 14, 16), np.uint8), logits, indices, regions=regions)
    assert waits.total() == {}


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("allowed", [True, False])
def test_labels_from_cuda_get_page_locked_memory_if_the_system_allows(dtype, allowed, monkeypatch):
    asked, empty = [], torch.empty

    def empty_as_on_cuda(*args, pin_memory=False, **keywords):
        asked.append(pin_memory)
        if not allowed:
            raise RuntimeError("CUDA error: out of memory")
        return empty(*args, **keywords)

    monkeypatch.setattr(torch, "empty", empty_as_on_cuda)
    labels = empty_labels((2, 3, 4), dtype, torch.device("cuda"))
    assert asked == [True]
    assert (labels.shape, labels.dtype) == ((2, 3, 4), dtype)
    assert labels.flags.c_contiguous
    labels[...] = np.arange(24).reshape(2, 3, 4)
    np.testing.assert_array_equal(signed(labels).numpy().ravel(), np.arange(24))
    assert empty_labels((2, 3, 4), dtype, torch.device("cpu")).shape == (2, 3, 4)
    assert asked == [True]
