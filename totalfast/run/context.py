"""Options, models, progress and memory of one run, for every step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from totalfast.run.empty_classes import EmptyClasses
from totalfast.run.memory_plan import plan_memory

if TYPE_CHECKING:
    from totalfast.geometry import Grid
    from totalfast.models.model import Model
    from totalfast.models.store import ModelStore
    from totalfast.options import Options
    from totalfast.run.memory_plan import Budget, MemoryPlan, StoredScan
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

    @property
    def keeps_scan(self) -> bool:
        """Whether a step after the resampling needs the scan's intensities."""
        return self.scan.kept

    def start_loading(self, number: int) -> None:
        """Start loading one of ``models``, if there are that many."""
        if number < len(self.models):
            options = self.options
            self.store.load(
                *self.models[number],
                device=options.device,
                backend=options.backend,
                trust_model=options.trust_model,
            )

    def take(self, task: Task, part: Part) -> Model:
        """Wait until a model of a task is loaded, and start loading the next one."""
        options = self.options
        model = self.store.take(
            task,
            part,
            device=options.device,
            backend=options.backend,
            trust_model=options.trust_model,
        )
        for number, (other_task, other_part) in enumerate(self.models, start=1):
            if other_task is task and other_part is part:
                self.start_loading(number)
        return model

    def plan_memory(self, region: Grid, task: Task) -> MemoryPlan:
        """Estimate the memory for labelling a region of the scan."""
        return plan_memory(
            self.scan,
            region,
            task=task,
            options=self.options,
            budget=self.budget,
            keeps_models=self.store.keep,
        )

    def rough(self) -> RunContext:
        """Return the context of a pass that only finds a region: basic options, no report."""
        options = replace(
            self.options,
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
            work=replace(self.work, part=self.work.rough or self.work.part, resample=0.0),
            scan=replace(self.scan, kept=True),
            empty_classes=EmptyClasses({}, enabled=False),
        )
