"""Models kept loaded between calls, and the default session behind ``totalfast.segment``.

Knows devices and loaded models; the steps of a run are in ``pipeline``.
"""

from __future__ import annotations

import functools
import logging
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from totalfast.engine.backends import choose_backend, resolve_backend
from totalfast.engine.models import find_part, load_model
from totalfast.errors import OptionError
from totalfast.files.targets import check_output
from totalfast.options import Options, check_radiomics, validate_device

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeAlias

    import nibabel as nib
    import torch

    from totalfast.engine.backends import Backend
    from totalfast.engine.models import Model
    from totalfast.labels.statistics import Statistics
    from totalfast.run.results import Delivered
    from totalfast.tasks import Part, Task

    ModelKey: TypeAlias = tuple[Path, tuple[int, ...] | None, str, str]
    """Folder, folds, and the names of device and backend."""

logger = logging.getLogger(__name__)


class Session:
    """Keeps models loaded, so that a second call loads nothing.

    Parameters
    ----------
    device
        "gpu", "cpu", "mps" or "gpu:X"; "gpu" falls back to the CPU. What ``segment`` uses unless
        its own ``device`` says otherwise.
    keep_models
        False lets each model go when it has been used, for a program that makes one call: two are
        in memory at a time, one that predicts and the next, instead of all that a task has.

    Notes
    -----
    May be used from several threads; predictions then take turns.
    """

    def __init__(self, *, device: str = "gpu", keep_models: bool = True) -> None:
        self.device = validate_device(device)
        self.keep_models = keep_models
        self.predicting = threading.Lock()
        self._models: dict[ModelKey, Future[Model]] = {}
        self._lock = threading.Lock()
        self._places: dict[tuple[str, str], tuple[torch.device, Backend]] = {}
        self._placing = threading.Lock()

    def segment(
        self,
        input: str | Path | nib.Nifti1Image | BinaryIO,  # noqa: A002 - upstream's name
        output: str | Path | None = None,
        **keywords: Any,  # noqa: ANN401 - typed by totalfast.segment
    ) -> nib.Nifti1Image | tuple[nib.Nifti1Image, Statistics]:
        """Segment one scan; arguments and result are those of ``totalfast.segment``."""
        from totalfast.files.dicom.read import open_series
        from totalfast.files.dicom.write import check_packages, check_series
        from totalfast.files.read import is_dicom
        from totalfast.run.pipeline import run

        options = Options.from_keywords({"device": self.device, **keywords})
        target = None if output is None else Path(output)
        if target is not None and not options.skip_saving:
            check_output(target, options)
        check_radiomics(input, target, options)
        if not is_dicom(input):
            if options.dicom_types:
                raise OptionError(
                    "To use output type dicom_rtstruct or dicom_seg you also have to use a Dicom "
                    "image as input."
                )
            return _result(run(input, target, options=options, session=self))
        options.resolved_task()  # before a series is converted for a task that makes no sense
        check_packages(options.dicom_types)
        with open_series(Path(input)) as series:
            check_series(series, options.dicom_types)
            found = run(series.image, target, options=options, session=self, series=series)
            return _result(found)

    def load(self, task: Task, part: Part, *, device: str, backend: str = "auto") -> Future[Model]:
        """Begin to load one of a task's models in a thread, if that has not been done before."""
        return self._begin(_model_key(task, part, device, backend))

    def take(self, task: Task, part: Part, *, device: str, backend: str = "auto") -> Model:
        """Wait for one of a task's models; from then on only a session that keeps models has it."""
        key = _model_key(task, part, device, backend)
        model = self._begin(key).result()
        if not self.keep_models:
            with self._lock:
                self._models.pop(key, None)
        return model

    def _begin(self, key: ModelKey) -> Future[Model]:
        with self._lock:
            known = self._models.get(key)
            failed = known is not None and known.done() and known.exception() is not None
            if known is None or failed:
                known = self._models[key] = _in_thread(lambda: self._load(*key))
        return known

    def place(self, device: str, backend: str) -> tuple[torch.device, Backend]:
        """Return the device and the backend that the names stand for; what they are is said once.

        Parameters and errors are those of ``select_device`` and ``choose_backend``.
        """
        with self._placing:
            if (device, backend) not in self._places:
                place = select_device(device)
                self._places[device, backend] = place, choose_backend(backend, place)
            return self._places[device, backend]

    def _load(
        self, folder: Path, folds: tuple[int, ...] | None, device: str, backend: str
    ) -> Model:
        place, run = self.place(device, backend)
        model = load_model(folder, folds=folds, device=place, backend=run)
        # What the backend does not need of them is free to go.
        return replace(model, networks=())


def _model_key(task: Task, part: Part, device: str, backend: str) -> ModelKey:
    return find_part(task, part), task.folds, device, resolve_backend(backend)


def _result(found: Delivered) -> nib.Nifti1Image | tuple[nib.Nifti1Image, Statistics]:
    """What upstream's call returns: the label map, and the figures if they were asked for."""
    return found.image if found.statistics is None else (found.image, found.statistics)


def _in_thread(load: Callable[[], Model]) -> Future[Model]:
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="totalfast-load")
    future: Future[Model] = pool.submit(load)
    pool.shutdown(wait=False)
    return future


@functools.cache
def default_session() -> Session:
    """Return the session that ``totalfast.segment`` uses."""
    return Session()


def select_device(name: str) -> torch.device:
    """Turn upstream's device names into torch's; an absent GPU becomes the CPU.

    Raises
    ------
    OptionError
        If "mps" is asked for where there is none.
    """
    import torch

    validate_device(name)
    if name == "mps":
        if not torch.backends.mps.is_available():
            raise OptionError("this machine has no MPS device; use device 'cpu'.")
        return torch.device("mps")
    if not name.startswith("gpu"):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        logger.info(
            "No GPU detected. Running on CPU. This can be very slow. The '--fast' option can help "
            "to reduce runtime."
        )
        return torch.device("cpu")
    index = int(name.partition(":")[2] or 0)
    if index >= torch.cuda.device_count():
        logger.info("Invalid GPU config, running on the CPU")
        return torch.device("cpu")
    return torch.device("cuda", index)
