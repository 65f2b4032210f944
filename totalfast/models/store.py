"""Loaded models, kept between runs or only until their use."""

from __future__ import annotations

import threading
import traceback
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypedDict

from totalfast.backends import choose_backend, resolve_backend
from totalfast.backends.devices import release_device_memory, select_device, start_device, too_small
from totalfast.errors import OptionError, SessionError
from totalfast.models.loading import load_model
from totalfast.models.weights import find_part
from totalfast.system.forks import check_process, threads_started, working
from totalfast.system.process_memory import release_free_memory
from totalfast.system.turns import MemoryGate, Turns

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    import torch
    from typing_extensions import Unpack

    from totalfast.backends import Backend
    from totalfast.models.model import Model
    from totalfast.tasks import Part, Task

MAX_MODELS = 10
"""Default number of kept models: the five of task total, and those of a few more tasks with their
rough models. One of TotalSegmentator's models takes about 0.13 GB, so ten take 1.3 GB."""


class _ModelKey(NamedTuple):
    """Everything that determines a loaded model."""

    folder: Path
    folds: tuple[int, ...] | None
    device: str
    backend: str
    trust_model: bool


class _Where(TypedDict):
    device: str


class Loading(_Where, total=False):
    """How a model is loaded; as the options of these names."""

    backend: str
    trust_model: bool


class ModelStore:
    """Loads each model once, in a thread.

    Parameters
    ----------
    keep
        Whether a model stays loaded after ``take``. If not, two models are in memory at a time: the
        one that predicts and the next one; one on a CPU.
    max_models
        Maximum number of models that stay; then the least recently used one is freed. None sets no
        limit.

    Raises
    ------
    OptionError
        If ``max_models`` is below 1.

    Notes
    -----
    Thread-safe. ``predicting`` is a lock that a run holds while a task's networks run, so that the
    networks of one run run at a time, in the order in which the runs asked for it. A run passes
    ``gate`` before it takes memory.
    """

    def __init__(self, *, keep: bool, max_models: int | None = MAX_MODELS) -> None:
        if max_models is not None and max_models < 1:
            raise OptionError(
                f"max_models must be 1 or more, or None for no limit, not {max_models}; "
                "keep_models=False keeps none."
            )
        self.keep = keep
        self.max_models = max_models
        self.predicting = Turns()
        self.gate = MemoryGate()
        self._models: OrderedDict[_ModelKey, Future[Model]] = OrderedDict()
        self._closed = False
        self._lock = threading.Lock()
        self._places: dict[tuple[str, str], tuple[torch.device, Backend]] = {}
        self._placing = threading.Lock()

    def load(
        self,
        task: Task,
        part: Part,
        **how: Unpack[Loading],
    ) -> Future[Model]:
        """Start to load one of a task's models in a thread, unless loading has already started."""
        return self._start(_model_key(task, part, **how))

    def take(
        self,
        task: Task,
        part: Part,
        **how: Unpack[Loading],
    ) -> Model:
        """Wait for one of a task's models; remove it from the store unless models are kept."""
        key = _model_key(task, part, **how)
        future = self._start(key)
        try:
            model = future.result()
        except Exception:
            with self._lock:
                if self._models.get(key) is future:
                    del self._models[key]  # the next call tries again
            raise
        finally:
            del future  # it refers to its error, which refers to this frame
        self._keep_or_drop(key)
        return model

    def place(self, device: str, backend: str) -> tuple[torch.device, Backend]:
        """Return the device and the backend of these names; the choice is logged once.

        The parameters and errors are those of ``select_device`` and ``choose_backend``.
        """
        self.check()
        backend = resolve_backend(backend)
        with self._placing:
            if (device, backend) not in self._places:
                place = select_device(device)
                start_device(place)
                self._places[device, backend] = place, choose_backend(backend, place)
            return self._places[device, backend]

    def is_loaded(
        self,
        task: Task,
        part: Part,
        **how: Unpack[Loading],
    ) -> bool:
        """Whether one of a task's models is in memory."""
        key = _model_key(task, part, **how)
        with self._lock:
            future = self._models.get(key)
        return future is not None and future.done() and future.exception() is None

    def drop_others(
        self,
        models: Iterable[tuple[Task, Part]],
        **how: Unpack[Loading],
    ) -> None:
        """Free all loaded models but these."""
        self._drop_all_but({_model_key(task, part, **how) for task, part in models})

    def announce_anew(self) -> None:
        """Forget the chosen devices, so that the next run logs the choice again."""
        with self._placing:
            self._places.clear()

    def check(self) -> None:
        """Check that models can be loaded and run.

        Raises
        ------
        SessionError
            If the store is closed.
        ForkError
            If the process was forked after a network had run.
        """
        check_process()
        if self._closed:
            raise SessionError("this session is closed; create a new one to segment more scans.")

    def close(self) -> None:
        """Free all models. A run that still needs one ends with a ``SessionError``."""
        check_process()
        with self._lock:
            self._closed = True
            self._models.clear()
        release_free_memory()
        release_device_memory()

    def _start(self, key: _ModelKey) -> Future[Model]:
        self.check()
        with self._lock:
            model = self._models.get(key)
            failed = model is not None and model.done() and model.exception() is not None
            if model is None or failed:
                model = self._models[key] = _in_thread(lambda: self._load(key))
        return model

    def _load(self, key: _ModelKey) -> Model:
        with working():
            place, backend = self.place(key.device, key.backend)
            if place.type != "cpu":
                threads_started()
            load = partial(
                load_model,
                key.folder,
                folds=key.folds,
                device=place,
                backend=backend,
                trust_model=key.trust_model,
            )
            try:
                model = self._with_memory(key, load, place)
            except Exception as error:
                _free_locals(error)
                raise
        # The forwards hold all weights that they need; the rest of the networks is freed.
        return replace(model, networks=())

    def _with_memory(self, key: _ModelKey, load: Callable[[], Model], place: torch.device) -> Model:
        """Load a model; if the device's memory is too small, free the other models and try again.

        Raises
        ------
        DeviceMemoryError
            If it is too small for this model.
        """
        import torch

        for is_last in (False, True):
            try:
                return load()
            except torch.OutOfMemoryError as error:
                _free_locals(error)
                if place.type == "cpu":
                    raise
                if is_last:
                    raise too_small(str(error)) from None
            self._drop_all_but({key})
        raise AssertionError  # the last attempt returns or raises

    def _drop_all_but(self, keys: Collection[_ModelKey]) -> None:
        """Free the loaded models with other keys; a run that uses one keeps it."""
        with self._lock:
            others = [k for k, model in self._models.items() if k not in keys and model.done()]
            for key in others:
                del self._models[key]
        release_free_memory()
        release_device_memory()

    def _keep_or_drop(self, key: _ModelKey) -> None:
        """Note that a model is in use now; drop those that are too many."""
        dropped: list[Future[Model]] = []
        with self._lock:
            if not self.keep:
                self._models.pop(key, None)
            elif key in self._models:
                self._models.move_to_end(key)
            loaded = [other for other, future in self._models.items() if future.done()]
            if self.max_models is not None:
                surplus = loaded[: max(len(loaded) - self.max_models, 0)]
                dropped += [self._models.pop(other) for other in surplus]
        if dropped:
            dropped.clear()
            release_free_memory()
            release_device_memory()


def _model_key(task: Task, part: Part, **how: Unpack[Loading]) -> _ModelKey:
    return _ModelKey(
        folder=find_part(task, part),
        folds=task.folds,
        device=how["device"],
        backend=resolve_backend(how.get("backend", "auto")),
        trust_model=how.get("trust_model", False),
    )


def _free_locals(error: BaseException | None) -> None:
    """Free what the functions of an error's traceback held, such as checkpoints."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _in_thread(load: Callable[[], Model]) -> Future[Model]:
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="totalfast-load")
    future: Future[Model] = pool.submit(load)
    pool.shutdown(wait=False)
    return future
