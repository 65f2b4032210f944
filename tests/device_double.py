"""A double of a CUDA device: it computes on the CPU, counts, and runs out of memory.

Its tensors say that they are on ``cuda:0``. The CPU computes every operation on them, through
torch's own dispatcher, so that the tested code needs no change. It computes in float32 and counts
half of the memory, because a device would compute in float16 (autocast). What the double can't
show: speed, float16 arithmetic, and errors of drivers and kernels.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE = torch.device("cuda", 0)
CPU = torch.device("cpu")
aten = torch.ops.aten

WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::_unique2", "aten::masked_select"}
"""Operations whose result the host needs, so that it waits for the device."""


COPYING = {"aten::_to_copy", "aten::to"}


@dataclass
class DeviceDouble:
    """What a device was asked to do.

    ``waits`` counts the host's synchronisations by their reason, ``uploads`` and ``downloads`` are
    the copied bytes, one number per copy. ``limit`` is the memory in bytes.
    """

    limit: int = 10**12
    waits: Counter = field(default_factory=Counter)
    uploads: list[int] = field(default_factory=list)
    downloads: list[int] = field(default_factory=list)
    operations: Counter = field(default_factory=Counter)
    events: int = 0
    peak: int = 0
    used_by_others: int = 0
    fraction: float = 1.0
    fail_at: int = -1
    """Number of the allocation that fails; -1 for none."""
    allocations: int = 0
    _sizes: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Per storage its bytes, and how many tensors use it."""
    _lock: threading.RLock = field(default_factory=threading.RLock)

    @property
    def allocated(self) -> int:
        with self._lock:
            return sum(size for size, _ in self._sizes.values())

    def reset(self) -> None:
        for counts in (self.waits, self.uploads, self.downloads, self.operations):
            counts.clear()
        self.peak, self.events = self.allocated, 0

    def keep(self, tensor: DeviceTensor, *, is_computed: bool) -> None:
        """Count a tensor's memory while it lives."""
        storage = tensor.inner.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        if is_computed and tensor.dtype == torch.float32:
            size //= 2
        with self._lock:
            known, users = self._sizes.get(key, (size, 0))
            if users == 0:
                self.allocations += 1
                free = self.fraction * self.limit - self.used_by_others - self.allocated
                if size > free or self.allocations == self.fail_at:
                    raise torch.OutOfMemoryError(
                        f"CUDA out of memory. Tried to allocate {size} bytes. Double's limit."
                    )
            self._sizes[key] = known, users + 1
            self.peak = max(self.peak, self.allocated)
        weakref.finalize(tensor, self._drop, key)

    def _drop(self, key: int) -> None:
        with self._lock:
            size, users = self._sizes[key]
            if users == 1:
                del self._sizes[key]
            else:
                self._sizes[key] = size, users - 1

    def run(self, function, arguments, keywords):
        """Compute an operation on the CPU; wrap its results if it runs on the device."""
        name = function._schema.name
        leaves = tree_leaves((arguments, keywords))
        sources = [leaf for leaf in leaves if isinstance(leaf, DeviceTensor)]
        targets = [leaf for leaf in leaves if isinstance(leaf, torch.device)]
        target = targets[0] if targets else None
        device = DEVICE if target is not None and target.type == "cuda" else target
        if device == DEVICE:
            arguments, keywords = tree_map_only(torch.device, lambda _: CPU, (arguments, keywords))
        pinned = keywords.get("pin_memory")
        if pinned:
            keywords = keywords | {"pin_memory": False}
        inner = tree_map_only(DeviceTensor, lambda tensor: tensor.inner, (arguments, keywords))
        if sources or device == DEVICE:
            self._count(name, arguments, keywords, sources, device)
        if sources and name == "aten::slow_conv3d_forward":
            image, weight, _, bias, stride, padding = inner[0]
            result = aten.convolution(
                image, weight, bias, stride, padding, [1, 1, 1], False, [0, 0, 0], 1
            )
        else:
            result = function(*inner[0], **inner[1])
        if pinned:
            result._is_page_locked = True
        on_device = device == DEVICE or (sources and target is None)
        if name == "aten::_local_scalar_dense" or not on_device:
            return result
        if name == "aten::copy_" and not isinstance(arguments[0], DeviceTensor):
            return arguments[0]
        own = {id(source.inner): source for source in sources}
        is_computed = name not in COPYING

        def wrapped(tensor: torch.Tensor) -> DeviceTensor:
            return DeviceTensor(tensor, self, is_computed=is_computed)

        return tree_map_only(
            torch.Tensor,
            lambda tensor: own[id(tensor)] if id(tensor) in own else wrapped(tensor),
            result,
        )

    def _count(self, name, arguments, keywords, sources, device) -> None:
        self.operations[name] += 1
        if name in WAITING:
            self.waits[name] += 1
        elif name == "aten::index" and any(
            getattr(index, "dtype", None) in (torch.bool, torch.uint8) for index in arguments[1]
        ):
            self.waits["index by a mask"] += 1
        elif name in COPYING and sources and device is not None and device != DEVICE:
            self.downloads.append(arguments[0].nbytes)
            self.waits["download"] += 1
        elif name in COPYING and not sources:
            self.uploads.append(arguments[0].nbytes)
        elif name == "aten::copy_":
            target, source = arguments[:2]
            if not isinstance(target, DeviceTensor):
                self.downloads.append(source.nbytes)
                at_once = len(arguments) > 2 and arguments[2] or keywords.get("non_blocking")
                if not (at_once and getattr(target, "_is_page_locked", False)):
                    self.waits["download"] += 1
            elif not isinstance(source, DeviceTensor):
                self.uploads.append(source.nbytes)


class DeviceTensor(torch.Tensor):
    """A tensor that says it is on ``DEVICE``."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor, double: DeviceDouble, *, is_computed: bool):
        with torch.inference_mode(False):  # a view of it must be of its kind
            tensor = torch.Tensor._make_wrapper_subclass(
                cls,
                inner.shape,
                strides=inner.stride(),
                storage_offset=inner.storage_offset(),
                dtype=inner.dtype,
                device=DEVICE,
            )
        tensor.inner, tensor.owner = inner, double
        double.keep(tensor, is_computed=is_computed)
        return tensor

    def tolist(self):
        return self.cpu().tolist()  # torch refuses it for subclasses

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), keywords=None):
        leaves = tree_leaves((arguments, keywords))
        double = next(leaf.owner for leaf in leaves if isinstance(leaf, DeviceTensor))
        return double.run(function, arguments, keywords or {})


class _Mode(TorchDispatchMode):
    """Sends operations without a device tensor to the double, too: those that make one."""

    def __init__(self, double: DeviceDouble) -> None:
        super().__init__()
        self._double = double

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        return self._double.run(function, arguments, keywords or {})


class _Event:
    """An event of a device that has always done everything."""

    def __init__(self, double: DeviceDouble) -> None:
        self._double = double

    def record(self, stream=None) -> None:
        self._double.events += 1

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


class _Stream:
    """A device's queue, in which nothing ever waits."""

    def __init__(self, double: DeviceDouble) -> None:
        self._double = double

    def synchronize(self) -> None:
        self._double.waits["stream"] += 1


@contextlib.contextmanager
def device_double(monkeypatch, **settings):
    """Make torch see the double as its only CUDA device, in this thread and in new ones."""
    double = DeviceDouble(**settings)
    torch._C._ensureCUDADeviceGuardSet()
    start = threading.Thread.run

    def run_with_double(thread) -> None:
        with _Mode(double):
            start(thread)

    for name, value in {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "empty_cache": lambda: None,
        "mem_get_info": lambda *_: (
            double.limit - double.used_by_others - double.allocated,
            double.limit,
        ),
        "memory_allocated": lambda *_: double.allocated,
        "memory_reserved": lambda *_: double.allocated,
        "get_per_process_memory_fraction": lambda *_: double.fraction,
        "get_device_name": lambda *_: "a double",
        "current_stream": lambda *_: _Stream(double),
        "Event": lambda **_: _Event(double),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    # Autocast would compute in float16, which a CPU does slowly and with other bits.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(threading.Thread, "run", run_with_double)
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with _Mode(double):
            yield double
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
