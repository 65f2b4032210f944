"""Loaded models, kept between runs or only until their use."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from totalfast.engine.backends import choose_backend, resolve_backend
from totalfast.engine.devices import select_device
from totalfast.engine.loading import load_model
from totalfast.engine.weights import find_part

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from totalfast.engine.backends import Backend
    from totalfast.engine.model import Model
    from totalfast.tasks import Part, Task


class _ModelKey(NamedTuple):
    folder: Path
    folds: tuple[int, ...] | None
    device: str
    backend: str


class ModelStore:
    """Loads each model once, in a thread.

    Parameters
    ----------
    keep
        Whether a model stays loaded after ``take``. If not, two models are in memory at a time: the
        one that predicts and the next one.

    Notes
    -----
    Thread-safe. ``predicting`` is a lock that is held while a network runs, so that only one
    network runs at a time.
    """

    def __init__(self, *, keep: bool) -> None:
        self.keep = keep
        self.predicting = threading.Lock()
        self._models: dict[_ModelKey, Future[Model]] = {}
        self._lock = threading.Lock()
        self._places: dict[tuple[str, str], tuple[torch.device, Backend]] = {}
        self._placing = threading.Lock()

    def load(self, task: Task, part: Part, *, device: str, backend: str = "auto") -> Future[Model]:
        """Start to load one of a task's models in a thread, unless loading has already started."""
        return self._start(_model_key(task, part, device, backend))

    def take(self, task: Task, part: Part, *, device: str, backend: str = "auto") -> Model:
        """Wait for one of a task's models; remove it from the store unless models are kept."""
        key = _model_key(task, part, device, backend)
        model = self._start(key).result()
        if not self.keep:
            with self._lock:
                self._models.pop(key, None)
        return model

    def place(self, device: str, backend: str) -> tuple[torch.device, Backend]:
        """Return the device and the backend of these names; the choice is logged once.

        The parameters and errors are those of ``select_device`` and ``choose_backend``.
        """
        with self._placing:
            if (device, backend) not in self._places:
                place = select_device(device)
                self._places[device, backend] = place, choose_backend(backend, place)
            return self._places[device, backend]

    def _start(self, key: _ModelKey) -> Future[Model]:
        with self._lock:
            model = self._models.get(key)
            failed = model is not None and model.done() and model.exception() is not None
            if model is None or failed:
                model = self._models[key] = _in_thread(lambda: self._load(key))
        return model

    def _load(self, key: _ModelKey) -> Model:
        place, backend = self.place(key.device, key.backend)
        model = load_model(key.folder, folds=key.folds, device=place, backend=backend)
        # The forwards hold all weights that they need; the rest of the networks is freed.
        return replace(model, networks=())


def _model_key(task: Task, part: Part, device: str, backend: str) -> _ModelKey:
    return _ModelKey(find_part(task, part), task.folds, device, resolve_backend(backend))


def _in_thread(load: Callable[[], Model]) -> Future[Model]:
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="totalfast-load")
    future: Future[Model] = pool.submit(load)
    pool.shutdown(wait=False)
    return future
