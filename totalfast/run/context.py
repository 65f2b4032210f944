"""Options, models, progress and memory of one run, for every step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from totalfast.run.empty_classes import EmptyClasses
from totalfast.run.memory_plan import plan_memory

if TYPE_CHECKING:
    from concurrent.futures import Future

    import torch

    from totalfast.geometry import Grid
    from totalfast.models.model import Model
    from totalfast.models.store import Loading, ModelStore
    from totalfast.options import Options
    from totalfast.run.memory_plan import Budget, MemoryPlan, StoredScan
    from totalfast.run.shared_scan import SharedScan
    from totalfast.run.work import Work
    from totalfast.system.pending_files import PendingFiles
    from totalfast.system.progress import Progress
    from totalfast.tasks import Part, Task


@dataclass(frozen=True, slots=True, kw_only=True)
class RunContext:
    """Options, models, progress and memory of one run.

    Parameters
    ----------
    options
        The user's options.
    store
        Where models are loaded.
    progress, work
        The progress bar, and the expected work of each stage.
    scan
        The scan as its header describes it.
    budget
        The memory that the run may take.
    files
        Collects all files of the run.
    empty_classes
        Why classes are empty in the result.
    models
        All models that the run needs, in the order of use.
    shared
        What the runs of several tasks on one scan share; None for a run of one task.
    """

    options: Options
    store: ModelStore
    progress: Progress
    work: Work
    scan: StoredScan
    budget: Budget
    files: PendingFiles
    empty_classes: EmptyClasses
    models: tuple[tuple[Task, Part], ...]
    shared: SharedScan | None = None

    @property
    def keeps_scan(self) -> bool:
        """Whether a step after the resampling needs the scan's intensities."""
        return self.scan.kept or self.shared is not None

    @property
    def _loading(self) -> Loading:
        options = self.options
        return {
            "device": options.device,
            "backend": options.network_backend,
            "trust_model": options.trust_model,
        }

    def start_loading(self, number: int) -> Future[Model]:
        """Start loading one of ``models``, unless it is loaded."""
        return self.store.load(
            *self.models[number],
            **self._loading,
        )

    def take(self, task: Task, part: Part) -> Model:
        """Wait until a model of a task is loaded, and start loading the next one.

        On a CPU the next one of the same task is loaded later: it takes a third of a second, and
        its memory would add to the peak.
        """
        model = self.store.take(
            task,
            part,
            **self._loading,
        )
        for number, (other_task, other_part) in enumerate(self.models[:-1]):
            if other_task is task and other_part is part:
                next_task, _ = self.models[number + 1]
                if next_task is not task or model.device.type != "cpu":
                    self.start_loading(number + 1)
        return model

    def is_loaded(self, task: Task, part: Part) -> bool:
        """Whether a model of a task is loaded."""
        return self.store.is_loaded(
            task,
            part,
            **self._loading,
        )

    def drop_other_models(self) -> None:
        """Free the models that a session keeps and this run does not need."""
        self.store.drop_others(
            self.models,
            **self._loading,
        )

    @property
    def device(self) -> torch.device:
        """Where networks run; waits until torch is imported and the device has started."""
        return self.store.place(self.options.device, self.options.network_backend)[0]

    def plan_memory(
        self, region: Grid, task: Task, *, on_gpu: bool | None = None, sums_on_host: bool = False
    ) -> MemoryPlan:
        """Estimate the memory for labelling a region of the scan.

        ``on_gpu`` is whether networks run on a CUDA device; None looks, which may have to wait.
        """
        return plan_memory(
            self.scan,
            region,
            task=task,
            options=self.options,
            on_gpu=self.device.type == "cuda" if on_gpu is None else on_gpu,
            sums_on_host=sums_on_host,
            keeps_models=self.store.keep,
        )

    def rough(self, *, work: float) -> RunContext:
        """Return the context of a pass that only finds a region: basic options, no report.

        It is deterministic, because one other voxel can move the region. ``work`` is the expected
        work of its model.
        """
        options = replace(
            self.options,
            deterministic=True,
            export="auto",
            force_split=False,
            save_probabilities=None,
            statistics=False,
            remove_small_blobs=False,
            higher_order_resampling_LEGACY=False,
        )
        return replace(
            self,
            options=options,
            work=replace(self.work, part=work, resample=0.0),
            scan=replace(self.scan, kept=True),
            empty_classes=EmptyClasses({}, enabled=False),
        )
